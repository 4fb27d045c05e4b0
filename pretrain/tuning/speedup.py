"""How many times fewer tokens an optimizer needs than the baseline for the same loss.

For every model size a curve L(D) = a D^-b + c goes through the baseline's losses over data ratio D. A loss L of another
optimizer at D is worth the data D_eff = ((L - c) / a)^(-1/b) of the baseline; its speed-up is D_eff / D (arXiv
2509.02046). Tokens only: what a step costs is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from pretrain.errors import UserError
from pretrain.metrics.formats import count

LEAST_POINTS = 3
"""As many as the curve has parameters."""
THRESHOLD = 3e-3
"""Smallest difference in loss that the published study counts as one."""
SPREAD = 1.1
"""Runs count as the same ratio of tokens to parameters up to this factor: batches do not divide budgets evenly."""


@dataclass(frozen=True)
class Result:
    """The final loss of a run."""

    optimizer: str
    model_size: float
    """Non-embedding parameters (of a mixture of experts, those active per token)."""
    ratio: float
    """Data ratio: tokens over 20 parameters."""
    loss: float
    """Final validation loss, nats per token."""


@dataclass(frozen=True)
class LossCurve:
    """L(D) = a D^-b + c of the baseline at one model size."""

    a: float
    b: float
    c: float
    ratios: tuple[float, ...]
    """Where it was fitted."""
    residual: float
    """Largest distance of a loss from it, nats per token."""

    def loss(self, ratio: float) -> float:
        """Loss at a data ratio."""
        return self.a * ratio**-self.b + self.c

    def data_for(self, loss: float) -> float:
        """D_eff: data ratio at which the baseline has this loss; inf when it never gets there."""
        return math.inf if loss <= self.c else ((loss - self.c) / self.a) ** (-1 / self.b)

    def resolution(self, ratio: float, error: float) -> float:
        """By what share a speed-up at the baseline's loss at `ratio` changes with an error of that loss."""
        return error / (self.b * (self.loss(ratio) - self.c))


@dataclass(frozen=True)
class SpeedUp:
    """One optimizer at one data ratio, beside the baseline's curve."""

    optimizer: str
    ratio: float
    loss: float
    effective_ratio: float
    """D_eff; inf when the baseline's curve never falls to this loss."""
    extrapolated: bool
    """Whether D_eff lies outside the ratios that the curve was fitted to. The baseline itself never does."""

    @property
    def factor(self) -> float:
        """Tokens of the baseline per token of this optimizer."""
        return self.effective_ratio / self.ratio


@dataclass(frozen=True)
class SizeSpeedUps:
    """All optimizers at one model size."""

    model_size: float
    baseline: str
    curve: LossCurve
    rows: tuple[SpeedUp, ...]
    """By optimizer, in the order they were given, and ratio; the baseline is one of them."""

    @property
    def largest_ratio(self) -> float:
        """Of the baseline's runs."""
        return self.curve.ratios[-1]


def fit_curve(ratios: Sequence[float], losses: Sequence[float]) -> LossCurve:
    """Least squares through at least LEAST_POINTS losses, the last of which is below the first."""
    order = np.argsort(ratios)
    x, y = np.array(ratios, dtype=float)[order], np.array(losses, dtype=float)[order]
    drop = y[0] - y[-1]
    assert len(x) >= LEAST_POINTS
    assert drop > 0
    # a and b stay positive as exponentials. The start has the floor a little below the last loss.
    start = [math.log(2 * drop), math.log(0.5), y[-1] - drop]

    def residual(p: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.exp(p[0]) * (x / x[0]) ** -np.exp(p[1]) + p[2] - y
        return found

    tight = 1e-12
    log_a, log_b, c = least_squares(residual, start, method="lm", xtol=tight, ftol=tight, gtol=tight).x
    b = math.exp(log_b)
    distance = np.abs(residual(np.array([log_a, log_b, c]))).max()
    return LossCurve(math.exp(log_a) * float(x[0]) ** b, b, float(c), tuple(map(float, x)), float(distance))


def speed_ups(results: Iterable[Result], *, baseline: str = "adamw") -> list[SizeSpeedUps]:
    """Every optimizer beside the baseline, by model size; of several runs of one optimizer and ratio the best counts.

    Raises UserError for a size at which the baseline has too few ratios, or no fall in loss.
    """
    best: dict[float, dict[tuple[str, float], float]] = {}
    for result in sorted(results, key=lambda result: (result.model_size, result.ratio)):
        cells = best.setdefault(result.model_size, {})
        key = (result.optimizer, _same_ratio(result, cells))
        cells[key] = min(result.loss, cells.get(key, math.inf))
    return [_of_size(size, cells, baseline) for size, cells in best.items()]


def _same_ratio(result: Result, cells: Iterable[tuple[str, float]]) -> float:
    """The ratio under which a run is counted: that of an earlier run of its optimizer, when they are close."""
    known = [ratio for optimizer, ratio in cells if optimizer == result.optimizer]
    return next((ratio for ratio in known if result.ratio <= SPREAD * ratio), result.ratio)


def _of_size(size: float, cells: dict[tuple[str, float], float], baseline: str) -> SizeSpeedUps:
    own = {ratio: loss for (optimizer, ratio), loss in cells.items() if optimizer == baseline}
    place = f"--baseline {baseline}: at {count(size)} parameters it has"
    if len(own) < LEAST_POINTS:
        raise UserError(
            f"{place} runs on {len(own)} numbers of tokens, but its curve needs {LEAST_POINTS}: train it on more "
            "budgets, or choose another baseline"
        )
    first, last = own[min(own)], own[max(own)]
    if not last < first:
        raise UserError(f"{place} a loss that does not fall with data ({first:.4f} to {last:.4f}): tune it first")
    curve = fit_curve(list(own), list(own.values()))
    optimizers = dict.fromkeys(sorted((name for name, _ in cells), key=lambda name: name != baseline))
    rows = []
    for name in optimizers:
        for ratio in sorted(ratio for other, ratio in cells if other == name):
            data = curve.data_for(cells[name, ratio])
            outside = not curve.ratios[0] <= data <= curve.ratios[-1]
            rows.append(SpeedUp(name, ratio, cells[name, ratio], data, outside and name != baseline))
    return SizeSpeedUps(size, baseline, curve, tuple(rows))
