"""Coordinate descent over a grid of hyperparameters: pure decisions, losses come from a function that is given.

The rules are those of arXiv 2509.02046 (phase I) and of its released code:

1. Try the baseline and every configuration that differs from it in exactly one hyperparameter.
2. When the best configuration seen is better than the baseline by more than a threshold, it becomes the baseline.
3. End when all of that neighbourhood has been tried and nothing in it is better by more than the threshold.

To save runs, the new baseline is not the best one but another within the threshold of it, when that one's neighbourhood
needs at least 10 runs fewer.

The method sees one hyperparameter at a time: where two of them must change together (learning rate and batch size),
it ends early. That is its limit, not a fault of this code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pretrain.tuning.sensitivity import Value

Settings = tuple[tuple[str, Value], ...]
"""Hyperparameters by configuration key, in the order of the keys; hashable."""
Grid = Mapping[str, Sequence[Value]]
"""Configuration key -> values to try."""
Evaluate = Callable[[Sequence[Settings]], Mapping[Settings, float]]
"""Losses of some configurations; inf for what failed."""

SWITCH_SAVES = 10
"""Runs that a near-best baseline has to save before it is preferred to the best (the released code's figure)."""


@dataclass(frozen=True)
class Descent:
    """A finished coordinate descent."""

    baseline: Settings
    """The last baseline: nothing that differs from it in one hyperparameter is better by more than the threshold."""
    losses: Mapping[Settings, float]
    """Everything tried, in the order it was asked for."""
    baselines: tuple[Settings, ...]
    """All baselines, the last one included."""

    @property
    def best(self) -> Settings:
        """The configuration with the lowest loss; may be a neighbour of the baseline, better by less than the
        threshold."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def loss(self) -> float:
        """The lowest loss; inf when nothing worked."""
        return self.losses[self.best]


def settings_of(values: Mapping[str, Value]) -> Settings:
    """Hyperparameters as a hashable tuple, sorted by key."""
    return tuple(sorted(values.items()))


def changed(settings: Settings, values: Mapping[str, Value]) -> Settings:
    """The same hyperparameters with some of them set to something else."""
    return settings_of(dict(settings) | dict(values))


def neighbours(settings: Settings, grid: Grid) -> Iterator[Settings]:
    """Every configuration that differs in exactly one hyperparameter of the grid."""
    held = dict(settings)
    for key, values in grid.items():
        for value in values:
            if value != held[key]:
                yield changed(settings, {key: value})


def descend(
    start: Settings,
    grid: Grid,
    evaluate: Evaluate,
    *,
    threshold: float,
    allowed: Callable[[Settings], bool] = lambda _: True,
) -> Descent:
    """Coordinate descent from `start`, which has a value for every key of `grid` and perhaps others that stay.

    Args:
        threshold: a change is accepted when it lowers the loss by more than this (> 0, or the descent may not end).
        allowed: configurations that are not are left out, as if they were not in the grid.
    """
    assert threshold > 0
    losses: dict[Settings, float] = {}
    baselines = [start]

    def untried(baseline: Settings) -> list[Settings]:
        return [one for one in (baseline, *neighbours(baseline, grid)) if one not in losses and allowed(one)]

    while True:
        if wanted := untried(baselines[-1]):
            found = evaluate(wanted)
            losses.update({one: math.inf if math.isnan(found[one]) else found[one] for one in wanted})
        if not losses:
            losses[start] = math.inf  # nothing is allowed
        lowest = min(losses.values())
        if lowest >= losses.get(baselines[-1], math.inf) - threshold:
            return Descent(baselines[-1], losses, tuple(baselines))
        baselines.append(_next_baseline(losses, threshold, untried))


def _next_baseline(
    losses: Mapping[Settings, float], threshold: float, untried: Callable[[Settings], list[Settings]]
) -> Settings:
    """The best configuration, or one nearly as good whose neighbourhood needs far fewer runs."""
    best = min(losses, key=losses.__getitem__)
    near_best = [one for one, loss in losses.items() if loss <= losses[best] + threshold]
    cheapest = min(near_best, key=lambda one: len(untried(one)))
    saved = len(untried(best)) - len(untried(cheapest))
    return cheapest if saved >= SWITCH_SAVES else best
