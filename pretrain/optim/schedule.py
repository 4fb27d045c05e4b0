"""Learning rate over the budget, as a pure function of the step.

Step n is the n-th optimizer update, counted from 1. Warm-up is linear and reaches the peak at step `warmup_steps`;
the last step of the budget, `total_steps`, is done with `min_lr_ratio` of the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
