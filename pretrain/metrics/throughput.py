"""Where the time goes: seconds per step, and goodput with its opposite by cause, over all restarts of a run.

Goodput is the time in training steps that were kept over the wall time of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import psutil
import torch

Phase = Literal["start", "step", "data", "eval", "save", "growth", "sync", "skipped", "lost", "restart"]
"""Where a second went: process start and restoring; training steps that were kept; waiting for data; validation;
saving checkpoints; growing the model; meeting other sites; steps whose update was skipped; work after the checkpoint
that a restart went back to; standing still between two processes of the run."""

TRAINING: tuple[Phase, ...] = ("step", "data", "skipped")
"""Phases that make up step_seconds."""


@dataclass(frozen=True)
class Interval:
    """Steps between two rows."""

    steps: int
    seconds: float
    """Wall time of the steps, data wait included; without evaluation, saving and the other phases."""
    data_seconds: float
    """Part of `seconds` spent waiting for data."""


class RunClock:
    """Charges every second since the process began to one phase.

        clock = RunClock()                      # the phase is "start"
        clock.begin_steps()                     # from here on it is "step" unless a `with` says otherwise
        while ...:
            with clock.phase("data"): ...
            clock.end_step(kept=not skipped)
            with clock.phase("eval"): ...

    Times are the host's: with a GPU they are right where the loop waits for the device once a step (it reads the loss).
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        started_at: float | None = None,
    ) -> None:
        """`started_at`: when the process began, seconds since 1970 (default: as the system says, before imports)."""
        self._monotonic, self._wall = monotonic, wall
        self._started_at = psutil.Process().create_time() if started_at is None else started_at
        self._seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._phase: Phase = "start"
        # Never negative: the wall clock may have been set back meanwhile.
        self._seconds["start"] = max(0.0, wall() - self._started_at)
        self._since = monotonic()
        self._steps = 0
        self.last_step_seconds = 0.0
        """Wall time of the latest step, data wait included."""
        self._step_end = 0.0
        self._step_mark = 0.0
        self._interval_mark = self._training_seconds()

    def begin_steps(self) -> None:
        """End the start-up."""
        self._switch("step")
        self._interval_mark = self._training_seconds()
        self._step_end = self._interval_mark[0]

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Charge the time inside to `name`, and to nothing else; nests."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def end_step(self, *, kept: bool = True) -> None:
        """An optimizer step is over; `kept` is false when its update was skipped."""
        self._switch(self._phase)
        total = self._training_seconds()[0]
        self.last_step_seconds, self._step_end = total - self._step_end, total
        if not kept:
            wasted = self._seconds["step"] - self._step_mark
            self._seconds["step"] -= wasted
            self._seconds["skipped"] += wasted
        self._step_mark = self._seconds["step"]
        self._steps += 1

    def take_interval(self) -> Interval:
        """The steps since the last call (at least one must have ended)."""
        assert self._steps > 0, "no step has ended since the last interval"
        self._switch(self._phase)
        total, data = self._training_seconds()
        interval = Interval(self._steps, total - self._interval_mark[0], data - self._interval_mark[1])
        self._steps, self._interval_mark = 0, (total, data)
        return interval

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that goodput counts over restarts."""
        self._switch(self._phase)
        return {"seconds": dict(self._seconds), "saved_at": self._wall()}

    def load_state_dict(self, state: Mapping[str, Any], *, last_alive: float | None = None) -> None:
        """Go on from a checkpoint. `last_alive`: wall time of the last row the run wrote before it stopped; from the
        checkpoint to there is lost work, from there to the start of this process the run stood still."""
        for name, seconds in state["seconds"].items():
            self._seconds[name] += seconds
        stopped_at = max(state["saved_at"], last_alive or 0.0)
        self._seconds["lost"] += stopped_at - state["saved_at"]
        self._seconds["restart"] += max(0.0, self._started_at - stopped_at)
        self._step_mark = self._seconds["step"]
        self._interval_mark = self._training_seconds()

    def goodput(self) -> dict[str, Any]:
        """`wall_seconds`, `goodput` (share of it in kept steps, without data wait) and `seconds` by phase."""
        self._switch(self._phase)
        wall = sum(self._seconds.values())
        return {
            "wall_seconds": round(wall, 3),
            "goodput": round(self._seconds["step"] / wall, 4) if wall > 0 else 0.0,
            "seconds": {name: round(seconds, 3) for name, seconds in self._seconds.items() if seconds > 0},
        }

    def _switch(self, name: Phase) -> None:
        now = self._monotonic()
        self._seconds[self._phase] += now - self._since
        self._since, self._phase = now, name

    def _training_seconds(self) -> tuple[float, float]:
        return sum(self._seconds[name] for name in TRAINING), self._seconds["data"]


def rates(
    interval: Interval, *, tokens_per_step: int, flops_per_step: float, devices: int, peak_tflops: float = 0.0
) -> dict[str, float]:
    """Fields of a row: `step_seconds`, `data_seconds`, `tokens_per_second`, `model_tflops` (per device) and, for a
    given peak rate of a device in TFLOP/s, `mfu`."""
    step_seconds = interval.seconds / interval.steps
    model_tflops = flops_per_step / step_seconds / devices / 1e12
    fields = {
        "step_seconds": step_seconds,
        "data_seconds": interval.data_seconds / interval.steps,
        "tokens_per_second": tokens_per_step / step_seconds,
        "model_tflops": model_tflops,
    }
    return fields | ({"mfu": model_tflops / peak_tflops} if peak_tflops else {})


def memory_bytes(device: torch.device) -> int:
    """Most memory allocated on a CUDA device so far; on the CPU, memory of this process that is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
