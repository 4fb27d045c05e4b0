"""`pretrain sweep`: tune every optimizer of a file, several runs at once, nothing twice, within a budget."""

from __future__ import annotations

import functools
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.errors import UserError
from pretrain.metrics.formats import duration
from pretrain.run import open_data
from pretrain.run_directory import locked
from pretrain.signals import DONE, REQUEUE, graceful_stop
from pretrain.tuning.descent import Settings
from pretrain.tuning.ledger import LEDGER_FILE, Ledger, Row, open_ledger
from pretrain.tuning.phases import RATE_FACTORS, Tuning, UnfinishedError, side_by_side, tune
from pretrain.tuning.running import LOG_FILE, Train, train_in_process
from pretrain.tuning.sweep_file import Sweep, load_sweep
from pretrain.tuning.sweep_report import write_report
from pretrain.tuning.trials import FAILED, Trial, discard_checkpoints, make_trial, run_trial

SHOWN = 40
"""Trials that --dry-run names."""


@dataclass
class Budget:
    """What may still be started."""

    trials: float = math.inf
    until: float = math.inf
    """On the monotonic clock."""
    is_stopped: Callable[[], bool] = lambda: False
    why: str = ""
    """Why nothing more may be started."""

    def take(self) -> bool:
        """Whether one more trial may start; counts it."""
        if self.is_stopped():
            self.why = "asked to stop"
        elif self.trials < 1:
            self.why = "--max-trials is used up"
        elif time.monotonic() >= self.until:
            self.why = "--max-hours is used up"
        if self.why:
            return False
        self.trials -= 1
        return True


@dataclass
class Workers:
    """Gets losses from the ledger or by training, several at once."""

    sweep: Sweep
    ledger: Ledger
    pool: ThreadPoolExecutor
    budget: Budget
    train: Train
    jobs: int
    waiting: int = 0
    """Trials that were asked for and have not ended. What will be asked for after them nobody knows."""
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _of_key: defaultdict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def evaluate(self, optimizer: str, cell: str, wanted: Sequence[Settings]) -> dict[Settings, float]:
        """Losses of some configurations, means over seeds. Raises UnfinishedError when some may not be run."""
        trials = [make_trial(self.sweep, optimizer, cell, *one) for one in seeded(self.sweep, wanted)]
        missing = [trial for trial in trials if trial.key not in self.ledger.rows]
        with self._guard:
            self.waiting += len(missing)
        done = list(self.pool.map(self._run, missing))
        if not all(done):
            raise UnfinishedError(trial for trial, is_done in zip(missing, done, strict=True) if not is_done)
        return mean_losses(self.ledger.rows, trials)

    def _run(self, trial: Trial) -> bool:
        """Train a trial, unless that may not be; whether its row is in the ledger."""
        # Optimizers that differ in their grids only may ask for one run at the same time.
        with self._guard:
            lock = self._of_key[trial.key]
        with lock:
            is_new = trial.key not in self.ledger.rows
            try:
                is_done = not is_new or self._train(trial)
            except Exception:
                self.budget.why = "an error"  # Nothing more is started: the error ends the sweep.
                raise
            finally:
                with self._guard:
                    self.waiting -= 1
            if is_new and is_done:
                self._say(trial)
            return is_done

    def _train(self, trial: Trial) -> bool:
        with self._guard:
            if not self.budget.take():
                return False
        row = run_trial(trial, self.train, is_stopped=self.budget.is_stopped)
        if row is None:
            self.budget.why = "asked to stop"
            return False
        self._refuse_hopeless(trial, row)
        self.ledger.add(row)
        discard_checkpoints(trial)
        return True

    def _refuse_hopeless(self, trial: Trial, row: Row) -> None:
        """When nothing has ever worked, the fault is not the hyperparameters': it is no result."""
        if row.reason.startswith(FAILED) and all(one.reason for one in self.ledger.ended()):
            log = trial.config.run.directory / LOG_FILE
            raise UserError(f"{trial.label}: {row.reason}; nothing has worked so far, so mend this first (see {log})")

    def _say(self, trial: Trial) -> None:
        row = self.ledger.rows[trial.key]
        ended = self.ledger.ended()
        mean = statistics.fmean(one.seconds for one in ended)
        left = duration(mean * self.waiting / self.jobs)
        result = row.reason or f"loss {row.loss:.4f}"
        print(f"[{len(ended)} done, {self.waiting} asked for, {left}] {trial.label}: {result}", flush=True)


def sweep(
    file: Path,
    *,
    jobs: int,
    max_trials: int | None = None,
    max_hours: float | None = None,
    dry_run: bool = False,
    train: Train = train_in_process,
) -> int:
    """Go on with the sweep of a file until it is done or the budget is used up, and write the report.

    Returns DONE, or REQUEUE when something is left. Raises UserError.
    """
    found = load_sweep(file)
    for cell in found.cells:
        _check_data(found, cell.name)
    directory = found.written.directory
    tunings = [Tuning(name) for name in found.written.optimizer]
    with (
        nullcontext() if dry_run else locked(directory),
        open_ledger(directory, writing=not dry_run) as ledger,
        graceful_stop() as stop,
        _pool(jobs) as pool,
    ):
        budget = Budget(
            0 if dry_run else math.inf if max_trials is None else max_trials,
            math.inf if max_hours is None else time.monotonic() + 3600 * max_hours,
            lambda: stop.signal is not None,
        )
        workers = Workers(found, ledger, pool, budget, train, jobs)
        try:
            side_by_side([functools.partial(tune, tuning, found, workers.evaluate) for tuning in tunings])
        except UnfinishedError as unfinished:
            print(_left(found, ledger, unfinished.trials, dry_run=dry_run, why=budget.why))
            if dry_run:
                return DONE
            write_report(found, tunings, ledger, finished=False)
            print(f"to go on: pretrain sweep {file} --jobs {jobs}")
            return REQUEUE
        if dry_run:
            print(f"nothing left to run: {len(ledger.rows)} trials in {directory / LEDGER_FILE}")
        else:
            print(write_report(found, tunings, ledger, finished=True))
    return DONE


@contextmanager
def _pool(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for runs. On an error or a second Ctrl-C, what waits is not begun; runs under way end by
    themselves: a terminal's Ctrl-C reaches them, too."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def seeded(found: Sweep, wanted: Sequence[Settings]) -> Iterator[tuple[Settings, int]]:
    """Every configuration with every seed."""
    return ((settings, seed) for settings in wanted for seed in found.written.seeds)


def mean_losses(rows: Mapping[str, Row], trials: Sequence[Trial]) -> dict[Settings, float]:
    """Configuration -> mean loss over its seeds; inf when one of them failed."""
    losses: dict[Settings, list[float]] = {}
    for trial in trials:
        losses.setdefault(trial.settings, []).append(rows[trial.key].loss)
    return {settings: statistics.fmean(values) for settings, values in losses.items()}


def most_trials(found: Sweep) -> int:
    """More runs than this the sweep cannot make: the whole grid in every cell of phases 1 and 2."""
    searched, checked = len(found.cells_of(1, 2)), len(found.cells_of(3))
    grids = [math.prod(map(len, optimizer.grid.values())) for optimizer in found.written.optimizer.values()]
    runs = sum(searched * size + checked * len(RATE_FACTORS) for size in grids)
    return runs * len(found.written.seeds)


def _check_data(found: Sweep, cell: str) -> None:
    """Datasets that are missing or do not fit are the sweep's fault, not its trials'. Raises DataError."""
    name, optimizer = next(iter(found.written.optimizer.items()))
    open_data(found.run_config(name, cell, tuple(optimizer.start.items())))


def _left(found: Sweep, ledger: Ledger, trials: Sequence[Trial], *, dry_run: bool, why: str) -> str:
    """What is left, in words; with --dry-run the next trials by name."""
    most = most_trials(found)
    left = (
        f"{len(ledger.rows)} trials done, {len(trials)} to be run next; a sweep of this file makes at most {most:,} "
        "(coordinate descent usually makes a small part of them)"
    )
    if not dry_run:
        return f"stopped ({why}): {left}"
    lines = [f"  {trial.key}  {trial.label}" for trial in trials[:SHOWN]]
    rest = [f"  and {len(trials) - SHOWN} more"] if len(trials) > SHOWN else []
    return "\n".join([*lines, *rest, left])
