"""How the best value of a hyperparameter moves with model size and data, and whether the data can tell.

`fit` is the published law, h(N, C) = A N^B C^G + D, fitted as published (arXiv 2509.02046, phase III). Its four
parameters are more than a few cells on a grid of powers of two can tell apart: the fit then runs along a valley where A
and D are huge and cancel, or turns into a step between two cells. `fit` finds that out and says so.

`fit_logs` is the better-posed law, log h linear in log N and log C with a ridge on the slopes, and knows how uncertain
its predictions are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import leastsq

Array = NDArray[np.float64]

START_EXPONENT = -0.5
"""Both exponents at the start of the fit; A starts at 0 and D at the mean (as published)."""
MAX_EVALUATIONS = 80_000
"""As published."""
MOST_CANCELLATION = 10.0
"""Power term over the mean value from which it cancels against D. Laws that generate data have about 1 to 2; degenerate
published fits 100 to 2,000 (measured: tests/tuning/test_scaling.py)."""
LARGEST_EXPONENT_ERROR = 0.25
"""Standard error of an exponent up to which it is known. Over a factor of ten in size, 0.25 moves the prediction by a
factor of 1.8: nearly a step of the usual grid of powers of two."""

PRIOR_SLOPE = 0.5
"""Standard deviation of the slopes before any data: fits of tuned learning rates found -0.15 to -0.4 (published rule
for mixtures of experts, 17 cells: tokens^-.395 dim^-.150)."""
INTERVAL_DEVIATIONS = 2.0
"""Half width of a prediction interval: about 95 %."""


@dataclass(frozen=True)
class Point:
    """The best value found in one cell."""

    model_size: float
    """Non-embedding parameters, N."""
    ratio: float
    """Tokens over 20 N, C."""
    value: float


@dataclass(frozen=True)
class PowerLaw:
    """h(N, C) = a N^b C^g + d."""

    a: float
    b: float
    g: float
    d: float
    identifiable: bool
    """Whether the points determine the four parameters."""
    warning: str
    """Why they do not, in one line; empty when they do."""

    def predict(self, model_size: float, ratio: float) -> float:
        """Value at a model size (parameters) and a data ratio."""
        return float(self.a * model_size**self.b * ratio**self.g + self.d)


def fit(points: Sequence[Point]) -> PowerLaw:
    """The published law by nonlinear least squares (MINPACK's Levenberg-Marquardt) from (0, -0.5, -0.5, mean).

    Look at `identifiable` before trusting a prediction far from the points. Raises ValueError without points.
    """
    sizes, ratios, values = _columns(points)
    if np.ptp(values) == 0:
        value = float(values[0])
        return PowerLaw(0.0, 0.0, 0.0, value, False, f"all values are {value:g}: they show no law, only that value")

    def residual(parameters: Array) -> Array:
        return _power_term(parameters, sizes, ratios) + parameters[3] - values

    mean = float(values.mean())
    start = np.array([0.0, START_EXPONENT, START_EXPONENT, mean])
    if len(points) < len(start):
        warning = f"{len(points)} points cannot determine 4 parameters: predicts their mean"
        return PowerLaw(0.0, 0.0, 0.0, mean, False, warning)
    # Trial steps may overflow; they are rejected.
    with np.errstate(over="ignore", invalid="ignore"):
        found, _, _, _, status = leastsq(residual, start, maxfev=MAX_EVALUATIONS, full_output=True)
        # 1 to 4: a minimum, by one of MINPACK's tests.
        warning = _doubt(found, points) if status in (1, 2, 3, 4) else "the fit did not converge"
    a, b, g, d = map(float, found)
    return PowerLaw(a, b, g, d, not warning, f"not identifiable: {warning}" if warning else "")


def _columns(points: Sequence[Point]) -> tuple[Array, Array, Array]:
    """Sizes, ratios and values."""
    if not points:
        raise ValueError("no points: a fit needs the best values of several cells")
    sizes, ratios, values = np.array([(point.model_size, point.ratio, point.value) for point in points], dtype=float).T
    return sizes, ratios, values


def _power_term(parameters: Array, sizes: Array, ratios: Array) -> Array:
    """A N^B C^G."""
    term: Array = parameters[0] * sizes ** parameters[1] * ratios ** parameters[2]
    return term


def _doubt(parameters: Array, points: Sequence[Point]) -> str:
    """Why the points do not determine these parameters; empty when they do."""
    sizes, ratios, values = _columns(points)
    term = _power_term(parameters, sizes, ratios)
    cancellation = np.abs(term).max() / np.abs(values).mean()
    if not cancellation <= MOST_CANCELLATION:
        return (
            f"A N^B C^G is {cancellation:.2g} times the values and D cancels it (B = {parameters[1]:.1g}, "
            f"G = {parameters[2]:.1g}): the fit is a straight line in log N and log C"
        )
    errors = _exponent_errors(parameters, points)
    if not max(errors) <= LARGEST_EXPONENT_ERROR:
        return f"B = {parameters[1]:.2g} +- {errors[0]:.2g}, G = {parameters[2]:.2g} +- {errors[1]:.2g}"
    return ""


def _exponent_errors(parameters: Array, points: Sequence[Point]) -> tuple[float, float]:
    """Standard errors of B and G by the linearised model; infinite where there are no points to spare."""
    sizes, ratios, values = _columns(points)
    spare = len(points) - len(parameters)
    if spare < 1:
        return math.inf, math.inf
    term = _power_term(parameters, sizes, ratios)
    # Logarithms from their means, and a relative change of A: conditions the matrix, changes no error of B and G.
    columns = [term, term * _centred_log(sizes), term * _centred_log(ratios), np.ones_like(term)]
    jacobian = np.stack(columns, axis=1)
    lengths = np.linalg.norm(jacobian, axis=0)
    if not lengths.all() or np.linalg.matrix_rank(jacobian / lengths) < len(parameters):
        return math.inf, math.inf
    residual = term + parameters[3] - values
    covariance = np.linalg.inv((jacobian / lengths).T @ (jacobian / lengths)) * (residual @ residual) / spare
    errors = np.sqrt(np.diag(covariance)) / lengths
    return float(errors[1]), float(errors[2])


def _centred_log(values: Array) -> Array:
    logs = np.log(values)
    centred: Array = logs - logs.mean()
    return centred


@dataclass(frozen=True, eq=False)
class LogLaw:
    """log h = intercept + slopes . (log N - mean, log C - mean), with the uncertainty of all three."""

    intercept: float
    slopes: tuple[float, float]
    """Exponents of N and C."""
    centre: tuple[float, float]
    """Means of log N and log C over the points."""
    deviation: float
    """Standard deviation of log h about the law."""
    covariance: Array
    """[3, 3] of intercept and slopes."""

    def predict(self, model_size: float, ratio: float) -> float:
        """Value at a model size (parameters) and a data ratio."""
        return math.exp(float(self._row(model_size, ratio) @ np.array([self.intercept, *self.slopes])))

    def interval(self, model_size: float, ratio: float) -> tuple[float, float]:
        """Where the best value of one more cell lies with about 95 %."""
        row = self._row(model_size, ratio)
        deviation = math.sqrt(float(row @ self.covariance @ row) + self.deviation**2)
        factor = math.exp(INTERVAL_DEVIATIONS * deviation)
        predicted = self.predict(model_size, ratio)
        return predicted / factor, predicted * factor

    def _row(self, model_size: float, ratio: float) -> Array:
        return np.array([1.0, math.log(model_size) - self.centre[0], math.log(ratio) - self.centre[1]])


def fit_logs(points: Sequence[Point], *, grid_factor: float = 2.0) -> LogLaw:
    """Linear regression of log h on log N and log C, with a normal prior of deviation PRIOR_SLOPE on the slopes.

    A value from a grid of powers of `grid_factor` is known to half a step only: the scatter about the law is taken to
    be at least that of a uniform error of a step. Raises ValueError for values that are not positive.
    """
    sizes, ratios, values = _columns(points)
    if (values <= 0).any():
        raise ValueError(f"the values of a law in logarithms must be positive, but one is {values.min():g}")
    logs = np.log(values)
    matrix = np.stack([np.ones_like(logs), _centred_log(sizes), _centred_log(ratios)], axis=1)
    least = math.log(grid_factor) / math.sqrt(12)
    deviation = least
    # The ridge depends on the scatter and the scatter on the fit; once over is enough for a figure of this accuracy.
    for _ in range(2):
        ridge = np.diag([0.0, 1.0, 1.0]) * (deviation / PRIOR_SLOPE) ** 2
        inverse = np.linalg.inv(matrix.T @ matrix + ridge)
        found = inverse @ matrix.T @ logs
        residual = logs - matrix @ found
        deviation = max(least, math.sqrt(residual @ residual / max(1, len(points) - 3)))
    return LogLaw(
        intercept=float(found[0]),
        slopes=(float(found[1]), float(found[2])),
        centre=(float(np.log(sizes).mean()), float(np.log(ratios).mean())),
        deviation=deviation,
        covariance=inverse * deviation**2,
    )
