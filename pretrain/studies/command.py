"""`pretrain study growth`: train every arm with every seed, then write what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.data.baselines import ngram_baselines
from pretrain.demo import prepare_corpus
from pretrain.run_directory import MANIFEST_FILE, locked, write_atomically
from pretrain.studies.arms import ARMS, SMALL, Arm, Family, Rates, arm_config, arm_named, sweep_configs
from pretrain.studies.pictures import draw_curves, draw_final_losses
from pretrain.studies.report import CURVES_PICTURE, FINAL_PICTURE, Study, Sweep, best_rate, markdown, summary, to_json
from pretrain.studies.results import curve, outcome
from pretrain.studies.running import Job, run_jobs
from pretrain.tuning.running import Train, train_in_process

CONFIG_FILE = Path("configs/studies/growth.toml")
RUNS, REPORT_FILE, RESULTS_FILE = "runs", "README.md", "results.json"
QUICK_STEPS = 64
QUICK = (f"budget.steps={QUICK_STEPS}", "eval.batches=2")
"""Enough to see every arm train and grow; not to compare them."""


def growth_study(
    *,
    seeds: int,
    out: Path,
    jobs: int,
    quick: bool = False,
    config_file: Path = CONFIG_FILE,
    train: Train = train_in_process,
) -> int:
    """Train what is not trained yet, `jobs` runs at once, and write README.md, results.json and pictures to `out`;
    returns the exit code. Raises UserError."""
    base = load_config(config_file, QUICK if quick else [])
    with locked(out):
        prepare_corpus(base, "1/4")
        print(f"2/4 sweep of the learning rate, {jobs} runs at once", flush=True)
        sweep = _swept(sweep_configs(base, out / RUNS), at_once=jobs, train=train)
        rates = {size: best_rate(found) for size, found in sweep.items()}
        configs = {seed: seed_configs(base, seed, out / RUNS, rates=rates) for seed in range(1, seeds + 1)}
        listed = [job for of_seed in configs.values() for job in jobs_of(of_seed)]
        print(f"3/4 {len(listed)} runs", flush=True)
        run_jobs(listed, at_once=jobs, train=train)
        print("4/4 report", flush=True)
        words = ["pretrain", "study", "growth", "--seeds", str(seeds), *(["--quick"] if quick else [])]
        study = gather(base, configs, sweep=sweep, command=words)
        write(study, configs, out)
    print(f"\n{summary(study)}\nsee: {out / REPORT_FILE}")
    return 0


def seed_configs(base: Config, seed: int, folder: Path, *, rates: Rates) -> dict[str, Config]:
    """Arm -> its run with this seed."""
    return {
        arm.name: arm_config(base, arm, rates=rates, seed=seed, directory=folder / f"{arm.name}-seed{seed}")
        for arm in ARMS
    }


def _swept(configs: dict[Family, list[Config]], *, at_once: int, train: Train) -> Sweep:
    """Train the runs of the sweep; size -> peak learning rate -> validation loss."""
    run_jobs([Job(config) for of_size in configs.values() for config in of_size], at_once=at_once, train=train)
    return {
        size: {config.optim.lr: outcome(config, seed=config.run.seed).loss for config in of_size}
        for size, of_size in configs.items()
    }


def jobs_of(configs: dict[str, Config]) -> list[Job]:
    """The runs of one seed; those that grow start from the small one."""
    return [Job(config, _source(configs, arm_named(name))) for name, config in configs.items()]


def gather(base: Config, configs: dict[int, dict[str, Config]], *, sweep: Sweep, command: Sequence[str]) -> Study:
    """Read what the finished runs came to."""
    first = next(iter(configs.values()))
    sequences = base.eval.batches * base.batch.global_batch_size
    return Study(
        base=base,
        configs=first,
        outcomes={
            arm.name: [outcome(of_seed[arm.name], seed=seed) for seed, of_seed in configs.items()] for arm in ARMS
        },
        sweep=sweep,
        baselines=ngram_baselines(
            base.data.train[0].prefix,
            base.data.valid[0].prefix,
            sequence_length=base.batch.sequence_length,
            num_samples=sequences,
        ),
        command=command,
        machine=machine(first[SMALL]),
    )


def write(study: Study, configs: dict[int, dict[str, Config]], out: Path) -> None:
    """README.md, results.json and the pictures."""
    curves = {
        arm.name: [curve(of_seed[arm.name], _source(of_seed, arm)) for of_seed in configs.values()] for arm in ARMS
    }
    draw_final_losses(study.losses).savefig(out / FINAL_PICTURE, facecolor="white")
    draw_curves(curves).savefig(out / CURVES_PICTURE, facecolor="white")
    write_atomically(out / RESULTS_FILE, json.dumps(to_json(study), indent=1) + "\n")
    write_atomically(out / REPORT_FILE, markdown(study))


def _source(configs: dict[str, Config], arm: Arm) -> Config | None:
    """The run that an arm goes on from, if it grows."""
    return configs[SMALL] if arm.grows else None


def machine(config: Config) -> dict[str, str]:
    """Where a run was trained, by its own account."""
    start: dict[str, Any] = json.loads((config.run.directory / MANIFEST_FILE).read_text())["starts"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return {
        "date": start["time"][:10],
        "device": f"{start['device']}, one thread a run, {os.cpu_count()} cores",
        "Python": start["python"],
        "versions": versions,
    }
