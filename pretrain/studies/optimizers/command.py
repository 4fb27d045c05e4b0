"""`pretrain study optimizers`: tune, compare with every seed, then write what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.demo import prepare_corpus
from pretrain.run_directory import locked, write_atomically
from pretrain.signals import DONE, REQUEUE, graceful_stop
from pretrain.studies.command import machine
from pretrain.studies.optimizers.cases import FIRST, START, Study
from pretrain.studies.optimizers.pictures import draw_flip, draw_losses
from pretrain.studies.optimizers.protocol import Lab, compare, joined, load_study, measure_noise, with_thresholds
from pretrain.studies.optimizers.report import (
    FLIP_PICTURE,
    LOSSES_PICTURE,
    SPEED_UP_PICTURE,
    markdown,
    speed_ups_of,
    summary,
    to_json,
)
from pretrain.tuning.descent import settings_of
from pretrain.tuning.ledger import open_ledger
from pretrain.tuning.phases import UnfinishedError
from pretrain.tuning.running import Train, train_in_process
from pretrain.tuning.speedup_command import draw
from pretrain.tuning.sweep import Budget
from pretrain.tuning.sweep_file import Sweep
from pretrain.tuning.trials import make_trial

SWEEP_FILE = Path("configs/studies/optimizers.toml")
REPORT_FILE, RESULTS_FILE = "README.md", "results.json"


def optimizer_study(
    *,
    seeds: int,
    out: Path,
    jobs: int,
    quick: bool = False,
    file: Path = SWEEP_FILE,
    train: Train = train_in_process,
) -> int:
    """Train what is not trained yet, `jobs` runs at once, and write README.md, results.json and pictures to `out`;
    returns DONE, or REQUEUE when asked to stop before the end. Raises UserError."""
    sweep = load_study(file, out, quick=quick)
    words = ["pretrain", "study", "optimizers", "--seeds", str(seeds), *(["--quick"] if quick else [])]
    with locked(out), open_ledger(out, writing=True) as ledger, graceful_stop() as stop:
        name, optimizer = next(iter(sweep.written.optimizer.items()))
        prepare_corpus(sweep.run_config(name, FIRST, settings_of(optimizer.start)), "1/4")
        pool = ThreadPoolExecutor(jobs)
        lab = Lab(ledger, pool, Budget(is_stopped=lambda: stop.signal is not None), train, jobs)
        try:
            study = conduct(sweep, lab, seeds=range(1, seeds + 1), quick=quick, command=words)
        except UnfinishedError:
            print(f"stopped: {len(ledger.rows)} runs done; to go on, give the command again")
            return REQUEUE
        finally:
            # On an error, what waits is not begun; runs under way end by themselves.
            pool.shutdown(cancel_futures=True)
        print("4/4 report", flush=True)
        write(study, out)
    print(f"\n{summary(study)}\nsee: {out / REPORT_FILE}")
    return DONE


def conduct(sweep: Sweep, lab: Lab, *, seeds: Sequence[int], quick: bool, command: Sequence[str]) -> Study:
    """Get every loss that the study needs. Raises UnfinishedError when asked to stop."""
    print(f"2/4 noise of the first guesses, {lab.jobs} runs at once", flush=True)
    noise = measure_noise(sweep, lab, seeds)
    sweep = with_thresholds(sweep, noise.losses)
    print(f"3/4 tuning and comparison; D1 = {sweep.written.threshold:.3g}", flush=True)
    found = compare(sweep, lab, seeds, quick=quick)
    every = joined([noise, *(one.compared for one in found.values())])
    first = next(case for case in noise.settings if case.variant == START)
    config = make_trial(sweep, first.optimizer, first.cell, noise.settings[first], seeds[0]).config
    return Study(
        sweep=sweep,
        descents={name: one.descent for name, one in found.items()},
        settings=every.settings,
        losses=every.losses,
        curves={case: curves for one in found.values() for case, curves in one.curves.items()},
        moe=[tuned for one in found.values() for tuned in one.moe],
        runs=len(lab.ledger.rows),
        core_seconds=math.fsum(row.seconds for row in lab.ledger.rows.values()),
        command=command,
        machine=machine(config),
    )


def write(study: Study, out: Path) -> None:
    """README.md, results.json and the pictures."""
    pictures = {LOSSES_PICTURE: draw_losses(study), FLIP_PICTURE: draw_flip(study)}
    size = speed_ups_of(study)
    if not isinstance(size, str):
        pictures[SPEED_UP_PICTURE] = draw([size])
    for name, figure in pictures.items():
        figure.savefig(out / name, facecolor="white")
    write_atomically(out / RESULTS_FILE, json.dumps(to_json(study), indent=1) + "\n")
    write_atomically(out / REPORT_FILE, markdown(study))
