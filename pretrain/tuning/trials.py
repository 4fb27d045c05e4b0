"""Trials: training one configuration of a sweep with one seed, to a row of the ledger."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.errors import RunDirectoryError
from pretrain.metrics.history import read_histories
from pretrain.run_directory import CHECKPOINTS, locked
from pretrain.signals import DONE, REQUEUE
from pretrain.tuning.descent import Settings
from pretrain.tuning.ledger import Row, trial_key
from pretrain.tuning.running import LOG_FILE, Train, events, is_finished
from pretrain.tuning.sweep_file import Sweep

RUNS, TRIAL_FILE = "runs", "trial.toml"
LOCK_POLL_SECONDS = 1.0
FAILED = "ended with code"
"""How the reason of a failure begins that may not be the hyperparameters' fault."""
ATTEMPTS = 2
"""Times that a run is started when a signal kills it (a machine short of memory does that) while nobody asked us to
stop. The second goes on from the first's checkpoint."""


@dataclass(frozen=True)
class Trial:
    """One configuration of a cell, to be trained with one seed."""

    optimizer: str
    cell: str
    settings: Settings
    seed: int
    key: str
    config: Config

    @property
    def label(self) -> str:
        """One line for people."""
        values = " ".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.optimizer} {self.cell} seed {self.seed} {values}"


def make_trial(sweep: Sweep, optimizer: str, cell: str, settings: Settings, seed: int) -> Trial:
    """A trial, in a run directory named by its key. Raises ConfigError when its configuration breaks a rule."""
    config = sweep.run_config(optimizer, cell, settings, seed=seed)
    key = trial_key(config)
    run = config.run.model_copy(update={"directory": sweep.written.directory / RUNS / key})
    return Trial(optimizer, cell, settings, seed, key, config.model_copy(update={"run": run}))


def run_trial(trial: Trial, train: Train, *, is_stopped: Callable[[], bool]) -> Row | None:
    """Train to the end and return the row, or None when the run was asked to stop before (it goes on from its newest
    checkpoint when it is run again). What is there already, of a sweep that was killed, counts."""
    config, directory = trial.config, trial.config.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    _wait_for_lock(directory)
    began = time.monotonic()
    if not is_finished(config):
        config_file = directory / TRIAL_FILE
        config_file.write_text(dump_config(config))
        for _ in range(ATTEMPTS):
            code = train(config_file, directory / LOG_FILE)
            if code >= 0 or is_stopped():
                break
        if code == REQUEUE or (code != DONE and is_stopped()):
            return None
        if code != DONE:
            return _row(trial, math.inf, _why(config, code), time.monotonic() - began)
    (history,) = read_histories([directory])
    loss = history.valid[-1]["valid_loss"]  # JSON has no word for NaN: it is None then
    goodput = history.last_event("goodput")
    seconds = goodput["wall_seconds"] if goodput else time.monotonic() - began
    return _row(trial, math.inf if loss is None else loss, "loss is not finite" if loss is None else "", seconds)


def discard_checkpoints(trial: Trial) -> None:
    """Free the disk of what a trial in the ledger has no more use for; a sweep would keep hundreds of them."""
    shutil.rmtree(trial.config.run.directory / CHECKPOINTS, ignore_errors=True)


def _row(trial: Trial, loss: float, reason: str, seconds: float) -> Row:
    return Row(
        key=trial.key,
        optimizer=trial.optimizer,
        cell=trial.cell,
        seed=trial.seed,
        settings=dict(trial.settings),
        loss=loss,
        reason=reason,
        seconds=round(seconds, 3),
        tokens=trial.config.total_steps * trial.config.batch.tokens_per_step,
    )


def _why(config: Config, code: int) -> str:
    """Why training failed, in a line."""
    if any(event["event"] == "diverged" for event in events(config)):
        return "diverged"
    log = config.run.directory / LOG_FILE
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f"{FAILED} {code}: {lines[-1].strip() if lines else 'it said nothing'}"


def _wait_for_lock(directory: Path) -> None:
    """Wait for a run that a killed sweep left behind: it trains on, and its result will do."""
    while True:
        try:
            with locked(directory):
                return
        except RunDirectoryError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
        time.sleep(LOCK_POLL_SECONDS)
