"""What the study of optimizers compares, and what it came to.

A case is one optimizer in one cell (a model size with a number of tokens) with hyperparameters that follow from its
best ones in the first cell. Every case is trained with the same seeds: cases are compared seed by seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pretrain.studies.statistics import finite_spread
from pretrain.tuning.descent import Descent, Settings
from pretrain.tuning.sweep_file import Sweep

FIRST: Final = "33k-1x"
"""The cell in which everything is tuned. The names are those of the study's file: parameters, data ratio."""
LONGER, LONGEST, LARGER = "33k-2x", "33k-4x", "74k-1x"
MOE = "moe"
"""The mixture of experts; the only cell that is not in the study's file."""
SCALAR = ("adamw", "nadamw", "lion")
MATRIX = ("muon", "soap")
SCALED = ("adamw", "muon", "soap")
"""Optimizers that are trained in every cell."""
MUON_ROUTER = "muon-router"
"""Muon on the routers, too."""

FULL, HALF = "tuned", "half the rate"
"""Variants: the best hyperparameters of the first cell, warm-up as the same share of the steps; half the rate."""
START, UNDERTUNED = "first guess", "rate 6e-4"
SMALL_DECAY, LARGE_DECAY = "decay 0.1", "decay 0.7"


class Case(NamedTuple):
    """What is trained with every seed."""

    optimizer: str
    cell: str = FIRST
    variant: str = FULL


Losses = Mapping[Case, Mapping[int, float]]
"""Case -> seed -> final validation loss, nats per token; inf for a run that failed."""
Curve = Sequence[tuple[float, float]]
"""(share of the steps, validation loss), by share."""


@dataclass(frozen=True)
class MoeTuning:
    """The mixture of experts: the sweep of one optimizer's learning rate."""

    optimizer: str
    rates: Mapping[float, float]
    """Learning rate -> loss; with the seed of tuning."""

    @property
    def best(self) -> float:
        """The learning rate with the lowest loss."""
        return min(self.rates, key=self.rates.__getitem__)


@dataclass(frozen=True)
class Study:
    """All that the report tells of."""

    sweep: Sweep
    """What was tuned; its threshold and margin are those that were used."""
    descents: Mapping[str, Descent]
    """Optimizer -> the search in the first cell."""
    settings: Mapping[Case, Settings]
    losses: Losses
    curves: Mapping[Case, Mapping[int, Curve]]
    """Of the longest runs, by seed."""
    moe: Sequence[MoeTuning]
    runs: int
    core_seconds: float
    """Of all runs together."""
    command: Sequence[str]
    """Words that repeat the study."""
    machine: Mapping[str, str]
    """What it ran on: name -> value."""

    @property
    def seeds(self) -> list[int]:
        return [*self.losses[Case("adamw")]]

    def best(self, optimizer: str, cell: str) -> Case:
        """The case of an optimizer in a cell: where two rates were tried, the one with the lower mean loss."""
        cases = [Case(optimizer, cell, FULL), Case(optimizer, cell, HALF)]
        # In the first cell the full rate is the best of many already.
        found = [case for case in cases if case in self.losses and (cell != FIRST or case.variant == FULL)]
        return min(found, key=lambda case: mean_loss(self.losses[case]))


def mean_loss(by_seed: Mapping[int, float]) -> float:
    """Mean over seeds; inf when one of them failed."""
    return math.fsum(by_seed.values()) / len(by_seed)


def noise_of(losses: Losses) -> float:
    """Standard deviation, from seed to seed, of the difference of two runs that share their seed: pooled over all pairs
    of first guesses among the cases. What a seed does to all runs alike is not in it. 0 when seeds tell nothing."""
    starts = [by_seed for case, by_seed in losses.items() if case.variant == START]
    pairs = itertools.combinations(starts, 2)
    spreads = [finite_spread({seed: one[seed] - other[seed] for seed in one}) for one, other in pairs]
    variances = [one.deviation**2 for one in spreads if one.seeds > 1]
    return math.sqrt(math.fsum(variances) / len(variances)) if variances else 0.0
