"""How fast this machine copies memory and passes it between processes: what any growth is bound by."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.bench.measure import stopwatch

BUFFER_BYTES = 256 << 20
"""Larger than any cache of a core."""
REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """Bytes per second of one process while all others do the same, by the clock of `Stopwatch.work`."""

    copy: float
    """Read and written: a copy of n bytes counts as 2 n."""
    exchange: float
    """Received from other processes; infinite where there is none."""


def measure_rates(device: torch.device) -> Rates:
    """Copy and pass around large buffers. Collective."""
    source, target = (torch.ones(BUFFER_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * BUFFER_BYTES / _median_seconds(lambda: target.copy_(source), device)
    size = dist.get_world_size()
    if size == 1:
        return Rates(copy, float("inf"))
    used = BUFFER_BYTES // size * size  # all_to_all_single splits into equal parts
    seconds = _median_seconds(lambda: dist.all_to_all_single(target[:used], source[:used]), device)
    return Rates(copy, used / size * (size - 1) / seconds)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # the first call connects processes
    taken = []
    for _ in range(REPEATS):
        dist.barrier()
        with stopwatch(device) as watch:
            work()
        taken.append(watch.work)
    return statistics.median(taken)
