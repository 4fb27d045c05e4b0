"""Timing of steps in turn, and the figures made of it.

Machines are shared and their clocks move, so variants take turns, round by round; a step is judged by medians, and
against another by the median of the ratios within a round, too.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.bench.workloads import Precision, Workload


@dataclass(frozen=True)
class Seconds:
    """What one step took."""

    wall: float
    cpu: float
    """Of all threads of the process."""


@dataclass(frozen=True)
class Timings:
    """What one variant did."""

    losses: list[float]
    """Of the steps before the clock started, from the initial weights on."""
    seconds: list[Seconds]
    """Of the steps after them, a round each."""

    def of(self, clock: str) -> list[float]:
        """Seconds by one clock, "wall" or "cpu"."""
        return [getattr(step, clock) for step in self.seconds]


@dataclass(frozen=True)
class Result:
    """One workload in one precision."""

    workload: Workload
    precision: Precision
    timings: dict[str, Timings]
    """By name of the variant."""


def take_turns(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """Time `rounds` steps of each, all of them once a round."""
    names = list(steps)
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        # Shuffled, as what ran before leaves caches and free memory better or worse for what comes next.
        for name in order.sample(names, len(names)):
            taken[name].append(_time(steps[name], device))
    return taken


def _time(step: Callable[[], object], device: torch.device) -> Seconds:
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait_for(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass
class Stopwatch:
    """Time of a `with` block; set when it ends."""

    wall: float = 0.0
    work: float = 0.0
    """On a CPU the time of all threads of the process, which others on the machine disturb less; on a GPU `wall`."""


@contextmanager
def stopwatch(device: torch.device) -> Iterator[Stopwatch]:
    """Time a block, with all that it starts on the device."""
    watch = Stopwatch()
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    yield watch
    wait_for(device)
    watch.wall = time.perf_counter() - wall
    watch.work = watch.wall if device.type == "cuda" else time.process_time() - cpu


def wait_for(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """Time of our step over that of a peer; below 1, ours is faster."""

    of_medians: float
    per_round: float
    """Median of the ratios within a round: less moved by what slows several rounds down."""


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Compare times of the same rounds."""
    return Ratio(
        of_medians=statistics.median(ours) / statistics.median(peer),
        per_round=statistics.median(a / b for a, b in zip(ours, peer, strict=True)),
    )
