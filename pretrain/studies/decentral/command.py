"""`pretrain study decentral`: train every arm with every seed, then write what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.demo import prepare_corpus
from pretrain.run_directory import locked, write_atomically
from pretrain.signals import DONE, REQUEUE, graceful_stop
from pretrain.studies.command import machine
from pretrain.studies.decentral.arms import ARMS, CENTRAL, FOUR, LOST, Arm, arm_config, arm_named
from pretrain.studies.decentral.claims import judge
from pretrain.studies.decentral.pictures import draw_absence, draw_costs, draw_curves, draw_gaps
from pretrain.studies.decentral.report import (
    ABSENCE_PICTURE,
    COSTS_PICTURE,
    CURVES_PICTURE,
    GAPS_PICTURE,
    markdown,
    to_json,
)
from pretrain.studies.decentral.results import Outcome, Study, outcome
from pretrain.studies.decentral.running import Cores, StoppedError, Task, Train, train_sites
from pretrain.studies.evidence import summary_of
from pretrain.tuning.ledger import Ledger, Row, open_ledger, trial_key
from pretrain.tuning.trials import RUNS

CONFIG_FILE = Path("configs/studies/decentral.toml")
REPORT_FILE, RESULTS_FILE = "README.md", "results.json"
QUICK_STEPS = 40
QUICK = (
    f"budget.tokens={QUICK_STEPS * 2048}",
    "eval.batches=1",
    f"eval.every_steps={QUICK_STEPS // 2}",
    "schedule.warmup_steps=4",
)
"""Enough to see every kind of arm train; not to compare them."""
QUICK_ARMS = [arm_named(name) for name in (CENTRAL, "diloco-10", "merge-10", FOUR, LOST)]


def decentral_study(
    *,
    seeds: int,
    out: Path,
    jobs: int,
    quick: bool = False,
    config_file: Path = CONFIG_FILE,
    train: Train = train_sites,
) -> int:
    """Train what is not trained yet, `jobs` processes at once, and write README.md, results.json and pictures to `out`;
    returns DONE, or REQUEUE when asked to stop before the end. Raises UserError."""
    base = load_config(config_file, QUICK if quick else [])
    arms = QUICK_ARMS if quick else ARMS
    with locked(out), open_ledger(out, writing=True) as ledger, graceful_stop() as stop:
        prepare_corpus(base, "1/3")
        tasks = [make_task(base, arm, seed, out) for arm in arms for seed in range(1, seeds + 1)]
        print(f"2/3 {len(tasks)} runs, {jobs} processes at once", flush=True)
        try:
            train_all(tasks, ledger, jobs=jobs, train=train, is_stopped=lambda: stop.signal is not None)
        except StoppedError:
            print(f"stopped: {len(ledger.rows)} runs done; to go on, give the command again")
            return REQUEUE
        print("3/3 report", flush=True)
        words = ["pretrain", "study", "decentral", "--seeds", str(seeds), *(["--quick"] if quick else [])]
        study = gather(base, tasks, command=words)
        write(study, out)
    paper, own = judge(study)
    print(f"\n{summary_of([*paper, *own], len(study.seeds))}\nsee: {out / REPORT_FILE}")
    return DONE


def make_task(base: Config, arm: Arm, seed: int, out: Path) -> Task:
    """The run of an arm with this seed, in a directory that is named by what it trains. Raises ConfigError."""
    key = trial_key(arm_config(base, arm, seed=seed, directory=out))
    if arm.loses_a_site:
        # Its configuration is that of a run which loses none.
        key += "-lost"
    directory = out / RUNS / f"{arm.name}-seed{seed}-{key}"
    return Task(arm, seed, key, arm_config(base, arm, seed=seed, directory=directory))


def train_all(
    tasks: Sequence[Task], ledger: Ledger, *, jobs: int, train: Train, is_stopped: Callable[[], bool]
) -> None:
    """Train every run that is not in the ledger, as many at once as have a core for each process. Raises UserError, or
    StoppedError when asked to stop; what waits is then not started, and what runs is ended."""
    # The largest last: they wait for all cores that they want.
    waiting = sorted((task for task in tasks if task.key not in ledger.rows), key=lambda task: task.arm.sites)
    cores, failed = Cores(jobs), False

    def run(task: Task) -> Outcome:
        with cores.taken(task.arm.sites):
            if stops():
                raise StoppedError
            if not task.is_finished:
                train(task, stops)
            return outcome(task)

    def stops() -> bool:
        return failed or is_stopped()

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = {pool.submit(run, task): task for task in waiting}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                task, found = futures[future], future.result()
                ledger.add(_row(task, found))
                print(f"  {done}/{len(waiting)} {task.label}: loss {found.loss:.4f}, {found.seconds:.0f} s", flush=True)
        except BaseException:
            failed = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _row(task: Task, found: Outcome) -> Row:
    config = task.config
    return Row(
        key=task.key,
        optimizer=config.optim.kind,
        cell=task.arm.name,
        seed=task.seed,
        settings={},
        loss=found.loss,
        reason="",
        seconds=round(found.seconds, 3),
        tokens=config.total_steps * config.batch.tokens_per_step,
    )


def gather(base: Config, tasks: Sequence[Task], *, command: Sequence[str]) -> Study:
    """Read what the finished runs came to."""
    outcomes: dict[str, list[Outcome]] = {}
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.arm.name, task)
        outcomes.setdefault(task.arm.name, []).append(outcome(task))
    return Study(base, first, outcomes, command, machine(first[CENTRAL].config))


def write(study: Study, out: Path) -> None:
    """README.md, results.json and the pictures."""
    pictures = {
        GAPS_PICTURE: draw_gaps(study),
        CURVES_PICTURE: draw_curves(study),
        COSTS_PICTURE: draw_costs(study),
        **({ABSENCE_PICTURE: draw_absence(study)} if LOST in study.outcomes else {}),
    }
    for name, figure in pictures.items():
        figure.savefig(out / name, facecolor="white")
    write_atomically(out / RESULTS_FILE, json.dumps(to_json(study), indent=1) + "\n")
    write_atomically(out / REPORT_FILE, markdown(study))
