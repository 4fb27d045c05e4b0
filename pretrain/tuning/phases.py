"""The three phases of tuning one optimizer (arXiv 2509.02046): full coordinate descent in some cells; in more cells
only what was sensitive in them; a law of size and data fitted to both, extrapolated and put to the test."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pretrain.errors import UserError
from pretrain.tuning import sensitivity
from pretrain.tuning.descent import Descent, Grid, Settings, changed, descend, settings_of
from pretrain.tuning.scaling import LogLaw, Point, PowerLaw, fit, fit_logs
from pretrain.tuning.sensitivity import Sensitivity, Value, find_sensitive
from pretrain.tuning.sweep_file import Cell, Sweep
from pretrain.tuning.trials import Trial

RATE_FACTORS = (0.5, 1.0, 2.0)
"""Of the predicted learning rate, that are tried in a cell of phase 3."""

EvaluateIn = Callable[[str, str, Sequence[Settings]], Mapping[Settings, float]]
"""(optimizer, cell, configurations) -> losses. Raises UnfinishedError when they are not all known."""
T = TypeVar("T")


class UnfinishedError(Exception):
    """Losses that were asked for are not known: nothing more was to be run."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        super().__init__()
        self.trials = list(trials)


@dataclass(frozen=True)
class Fit:
    """How the best value of one hyperparameter moves with size and data."""

    key: str
    points: Sequence[Point]
    law: PowerLaw
    """As published."""
    logs: LogLaw | None
    """The better-posed one; None when a value is not positive."""

    @property
    def uses_logs(self) -> bool:
        """Whether predictions come from the law in logarithms: the published one is often not identifiable."""
        return not self.law.identifiable and self.logs is not None

    def predict(self, model_size: float, ratio: float) -> float:
        """Best value at a model size (parameters) and a data ratio."""
        law = self.logs if self.logs is not None and self.uses_logs else self.law
        return law.predict(model_size, ratio)


@dataclass(frozen=True)
class Check:
    """What came of a prediction."""

    predicted: Mapping[str, float]
    """Key -> what its law says."""
    settings: Settings
    """The same as values of the grids; what has no law as in the nearest cell."""
    losses: Mapping[float, float]
    """Factor on the learning rate -> loss."""
    threshold: float

    @property
    def stood(self) -> bool:
        """Whether no other learning rate was better by more than the threshold."""
        return math.isfinite(self.losses[1.0]) and min(self.losses.values()) >= self.losses[1.0] - self.threshold


@dataclass
class Tuning:
    """What is known of one optimizer so far, by cell and by key."""

    optimizer: str
    searches: dict[str, Descent] = field(default_factory=dict)
    sensitivity: dict[str, Sensitivity] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)

    @property
    def sensitive(self) -> list[str]:
        """Keys that were found sensitive."""
        return [key for key, found in self.sensitivity.items() if found.sensitive]

    def best_near(self, cell: Cell, among: Sequence[Cell]) -> Settings:
        """The best hyperparameters of the cell nearest in log size and log data ratio."""
        return self.searches[min(among, key=lambda other: distance(cell, other)).name].best


def distance(one: Cell, other: Cell) -> float:
    """How far apart two cells are: in log of size and of data ratio."""
    return math.hypot(math.log(one.model_size / other.model_size), math.log(one.ratio / other.ratio))


def tune(tuning: Tuning, sweep: Sweep, evaluate: EvaluateIn) -> None:
    """All phases of one optimizer; `tuning` is filled as they go. Raises UnfinishedError, or UserError when a cell has
    no run that worked."""
    optimizer = sweep.written.optimizer[tuning.optimizer]
    start = settings_of(optimizer.start)
    first, second, third = (sweep.cells_of(phase) for phase in (1, 2, 3))
    search = functools.partial(_search, tuning, sweep, evaluate)
    side_by_side([functools.partial(search, cell, start, optimizer.grid) for cell in first])
    if not second and not third:
        return
    trials = {cell.name: _as_trials(tuning.searches[cell.name]) for cell in first}
    tuning.sensitivity = find_sensitive(trials, sweep.written.margin)
    grid = {key: optimizer.grid[key] for key in tuning.sensitive}
    side_by_side([functools.partial(search, cell, tuning.best_near(cell, first), grid) for cell in second])
    tuning.fits = _fits(tuning, [*first, *second])
    side_by_side([functools.partial(_check, tuning, sweep, evaluate, cell, [*first, *second]) for cell in third])


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls that mostly wait, a thread each. When some are unfinished, one UnfinishedError tells of all; any other
    exception goes first."""
    if not calls:
        return []
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, UnfinishedError):
            raise error
    if errors:
        raise UnfinishedError(trial for error in errors if isinstance(error, UnfinishedError) for trial in error.trials)
    return [future.result() for future in futures]


def _search(tuning: Tuning, sweep: Sweep, evaluate: EvaluateIn, cell: Cell, start: Settings, grid: Grid) -> None:
    """Coordinate descent in a cell."""
    name = tuning.optimizer
    found = descend(
        start,
        grid,
        functools.partial(evaluate, name, cell.name),
        threshold=sweep.written.threshold,
        # Asked again and again for the same configurations, and each is read from files.
        allowed=functools.cache(functools.partial(sweep.allows, name, cell.name)),
    )
    if not math.isfinite(found.loss):
        raise UserError(
            f"optimizer.{name} in cell {cell.name}: none of {len(found.losses)} configurations has a finite loss (the "
            "ledger says why); start from a lower learning rate or a longer warm-up"
        )
    tuning.searches[cell.name] = found


def _as_trials(descent: Descent) -> list[sensitivity.Trial]:
    return [sensitivity.Trial(dict(settings), loss) for settings, loss in descent.losses.items()]


def _fits(tuning: Tuning, cells: Sequence[Cell]) -> dict[str, Fit]:
    """The laws of the sensitive keys whose values are numbers."""
    fits = {}
    for key in tuning.sensitive:
        values = [dict(tuning.searches[cell.name].best)[key] for cell in cells]
        if not all(_is_number(value) for value in values):
            continue
        points = [Point(cell.model_size, cell.ratio, float(value)) for cell, value in zip(cells, values, strict=True)]
        logs = fit_logs(points) if min(point.value for point in points) > 0 else None
        fits[key] = Fit(key, points, fit(points), logs)
    return fits


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(tuning: Tuning, sweep: Sweep, evaluate: EvaluateIn, cell: Cell, known: Sequence[Cell]) -> None:
    """Train what the laws predict for a cell, and with other learning rates beside it."""
    optimizer = sweep.written.optimizer[tuning.optimizer]
    predicted = {key: law.predict(cell.model_size, cell.ratio) for key, law in tuning.fits.items()}
    on_grid = {key: snap(value, optimizer.grid[key]) for key, value in predicted.items()}
    settings = changed(tuning.best_near(cell, known), on_grid)
    rate = dict(settings)[optimizer.lr]
    assert _is_number(rate)
    variants = {factor: changed(settings, {optimizer.lr: factor * float(rate)}) for factor in RATE_FACTORS}
    losses = evaluate(tuning.optimizer, cell.name, list(variants.values()))
    by_factor = {factor: losses[one] for factor, one in variants.items()}
    tuning.checks[cell.name] = Check(predicted, settings, by_factor, sweep.written.threshold)


def snap(value: float, grid: Sequence[Value]) -> Value:
    """The value of a grid that is nearest: by ratio, or by difference where something is not positive."""
    numbers = [float(entry) for entry in grid]
    if value > 0 and min(numbers) > 0:
        return min(grid, key=lambda entry: abs(math.log(float(entry) / value)))
    return min(grid, key=lambda entry: abs(float(entry) - value))
