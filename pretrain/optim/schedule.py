"""Learning rate over the budget, as a pure function of the step; and those of entries that joined on the way.

Step n is the n-th optimizer update, counted from 1. Warm-up is linear and reaches the peak at step `warmup_steps`;
the last step of the budget, `total_steps`, is done with `min_lr_ratio` of the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from pretrain.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """A curve start -> peak -> end over `total_steps` steps; by default as shares of the peak learning rate.

    A curve that begins in the middle of a run is the same thing with other ends, asked for at
    `step - first_step`.
    """

    kind: Literal["cosine", "wsd", "linear", "constant"]
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0
    """Value at step 0, which warm-up starts from."""
    peak: float = 1.0
    end: float = 0.0
    """Value at step `total_steps` and after it (`constant` stays at the peak)."""
    decay_steps: int = 0
    """wsd: the last so many steps, in which the value falls; 0 leaves it at the peak."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"

    @classmethod
    def from_config(cls, config: ScheduleConfig, total_steps: int) -> Schedule:
        """The schedule of a run with `total_steps` optimizer updates."""
        return cls(
            kind=config.kind,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps,
            end=config.min_lr_ratio,
            decay_steps=round(config.decay_fraction * total_steps),
            decay_shape=config.decay_shape,
        )

    def lr_ratio(self, step: int) -> float:
        """Learning rate of update `step` (from 1) over the peak learning rate."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        return self.end + (self.peak - self.end) * self._height(step)

    def rewarmed(self, first_step: int, *, ratio: float, steps: int, start: float = 1.0) -> Schedule:
        """The curve of entries that join this schedule's run after `first_step` updates, asked for at
        `step - first_step`: the first update they take part in is 1.

        With eta this schedule's value at `first_step`: linear from `start * eta` to `ratio * eta` in `steps` steps (0:
        there at once), then a curve of the same kind to the same end at the same last step. Cosine: a full one of its
        own (SPARKLING, arXiv 2602.02472, eq. 27-28). wsd: stays until this schedule's decay begins or the warm-up is
        over, whichever is later. `first_step` is past this schedule's own warm-up.
        """
        now = self.lr_ratio(first_step)
        left = self.total_steps - first_step
        return replace(self, total_steps=left, warmup_steps=steps, start=start * now, peak=ratio * now)

    def _height(self, step: int) -> float:
        """Height over `end`, 1 to 0, once warm-up is done."""
        match self.kind:
            case "constant":
                return 1.0
            case "wsd":
                # A decay longer than what warm-up leaves starts right after it.
                first = max(self.warmup_steps, self.total_steps - self.decay_steps)
                return _fall(_progress(step, first, self.total_steps), self.decay_shape) if self.decay_steps else 1.0
            case _:
                return _fall(_progress(step, self.warmup_steps, self.total_steps), self.kind)


@dataclass(frozen=True)
class Rewarm:
    """A warm-up of its own that a growth gives to entries, see `Schedule.rewarmed`."""

    step: int
    """Updates done before the growth."""
    ratio: float
    steps: int
    start: float = 1.0
    all_entries: bool = False
    """Whether all entries there are follow it, not only those that the growth brings in."""


@dataclass(frozen=True)
class Schedules:
    """Learning rates by age: 0 for entries that were there from the start of the run, n for those of the n-th growth.

    Every curve starts from the base curve, not from that of another growth.
    """

    base: Schedule
    growths: tuple[Rewarm | None, ...] = ()
    """The n-th growth at n - 1; None for one without a re-warm-up, whose entries follow the curve of age 0."""

    def lr_ratio(self, step: int) -> float:
        """Learning rate of update `step` (from 1) over the peak learning rate, for entries of age 0."""
        return self._of(0, step)

    def newer(self, step: int) -> tuple[float, ...]:
        """The same for ages 1, 2, ..."""
        return tuple(self._of(age, step) for age in range(1, len(self.growths) + 1))

    def _of(self, age: int, step: int) -> float:
        """Of the re-warm-ups that an age takes part in, the last one that has begun; else the base curve."""
        own = age if age and self.growths[age - 1] else 0
        for number, growth in reversed(list(enumerate(self.growths, start=1))):
            if growth is None or step <= growth.step:
                continue
            if number == own or (growth.all_entries and number > own):
                curve = self.base.rewarmed(growth.step, ratio=growth.ratio, steps=growth.steps, start=growth.start)
                return curve.lr_ratio(step - growth.step)
        return self.base.lr_ratio(step)


def _progress(step: int, first: int, last: int) -> float:
    """Share of the way from `first` to `last`, within [0, 1]."""
    if step <= first:
        return 0.0
    return min(1.0, (step - first) / (last - first)) if last > first else 1.0


def _fall(progress: float, shape: str) -> float:
    """A fall from 1 to 0 while `progress` goes from 0 to 1."""
    match shape:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "sqrt":  # "1 - sqrt" of Haegele et al., arXiv 2405.18392
            return 1.0 - math.sqrt(progress)
    raise ValueError(f"unknown shape {shape!r}")
