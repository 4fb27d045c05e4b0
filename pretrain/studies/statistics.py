"""Means over seeds, their spread, and what paired differences between two arms say.

Arms of one seed share their data and, if they grow, the run before: their difference is taken seed by seed, and what
the seed does to both drops out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "not resolved"]

# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom (any table of it).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    """Of one seed, from n - 1; NaN for a single seed."""
    seeds: int

    @property
    def half_width(self) -> float:
        """Half the 95 % confidence interval of the mean, by Student's t; infinite for a single seed."""
        if self.seeds < 2:
            return math.inf
        # More degrees of freedom than the table has: its last quantile, which is larger than theirs.
        return _T[min(self.seeds - 1, len(_T)) - 1] * self.deviation / math.sqrt(self.seeds)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean."""
        return self.mean - self.half_width, self.mean + self.half_width


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one value a seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def finite_spread(by_seed: Mapping[int, float]) -> Spread:
    """Mean and deviation over the seeds that have a finite value; NaN when none has."""
    values = [value for value in by_seed.values() if math.isfinite(value)]
    return spread(values) if values else Spread(math.nan, math.nan, 0)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Spread:
    """Second minus first, by seed, over the seeds that both have."""
    return spread([second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())])


def judge_lower(second_minus_first: Spread) -> Verdict:
    """Whether the first arm is lower: the interval of the difference must leave out zero."""
    low, high = second_minus_first.interval
    if low > 0:
        return "reproduced"
    return "not reproduced" if high < 0 else "not resolved"


def judge_equal(second_minus_first: Spread, margin: float) -> Verdict:
    """Whether two arms are equal within +-margin: the interval of the difference must lie inside, or outside."""
    low, high = second_minus_first.interval
    if -margin < low and high < margin:
        return "reproduced"
    return "not reproduced" if low > margin or high < -margin else "not resolved"


def gap_closed(small: Mapping[int, float], scratch: Mapping[int, float], arm: Mapping[int, float]) -> Spread:
    """Share of the way from the small model's loss to that of the final size from scratch, by seed."""
    seeds = sorted(small.keys() & scratch.keys() & arm.keys())
    return spread([(small[seed] - arm[seed]) / (small[seed] - scratch[seed]) for seed in seeds])
