"""What the benchmark prints of growth: a table, and whether the targets hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pretrain.bench.growth import GrowthResult
from pretrain.bench.measure import ratio
from pretrain.bench.report import aligned
from pretrain.bench.workloads import Workload
from pretrain.model.counts import count_parameters

LARGEST_OF_FLOOR = 3.0
"""What filling the new tensors may take, over the time that copying and exchanging their bytes takes."""
LARGEST_OF_ROUND_TRIP = 1.0
"""What a growth in the job may take, over one by way of a checkpoint."""

HEADER = [
    "growth",
    "live s",
    "round trip s",
    "live / round trip",
    "training steps",
    "transplant s",
    "floor s",
    "transplant / floor",
    "both models MiB",
    "planned MiB",
    "with gradients MiB",
]


def table(workload: Workload, results: Sequence[GrowthResult], *, processes: int) -> str:
    """A heading and a row per kind of growth; medians over rounds."""
    count = f"{processes} processes" if processes > 1 else "1 process"
    millions = count_parameters(workload.model).total / 1e6
    step = statistics.median(results[0].steps)
    heading = (
        f"growth of {workload.name}, bf16, {count}: {millions:.0f} M parameters, {workload.describe()}; a training "
        f"step takes {step:.3f} s (transplant and floor by CPU time on a CPU, all else by wall time)"
    )
    rows = [HEADER, ["-" * 3] * len(HEADER), *map(_row, results)]
    return "\n".join([heading, "", *aligned(rows)])


def _row(result: GrowthResult) -> list[str]:
    seconds = {name: statistics.median(result.of(name)) for name in ("live", "round_trip", "transplant", "floor")}
    both, peak = (statistics.median(result.of(name)) / 2**20 for name in ("both_bytes", "peak_bytes"))
    return [
        result.kind,
        f"{seconds['live']:.3f}",
        f"{seconds['round_trip']:.3f}",
        f"{of_round_trip(result):.3f}",
        f"{in_steps(result):.1f}",
        f"{seconds['transplant']:.3f}",
        f"{seconds['floor']:.3f}",
        f"{of_floor(result):.2f}",
        f"{both:,.0f}",
        f"{result.planned_bytes / 2**20:,.0f}",
        f"{peak:,.0f}",
    ]


def of_round_trip(result: GrowthResult) -> float:
    """A growth in the job over one by way of a checkpoint, a ratio of medians."""
    return ratio(result.of("live"), result.of("round_trip")).of_medians


def of_floor(result: GrowthResult) -> float:
    """Filling the new tensors over what it takes at least, a ratio of medians."""
    return ratio(result.of("transplant"), result.of("floor")).of_medians


def in_steps(result: GrowthResult) -> float:
    """Training steps of the old model in the time of a growth."""
    return ratio(result.of("live"), result.steps).of_medians


def of_plan(result: GrowthResult) -> float:
    """Memory in use while both models are there, over what is planned for it."""
    return statistics.median(result.of("both_bytes")) / result.planned_bytes


def verdict(results: Sequence[GrowthResult]) -> str:
    """Whether the targets hold, a line per kind of growth."""
    lines = []
    for result in results:
        found = [
            (of_floor(result), LARGEST_OF_FLOOR, "of the floor"),
            (of_round_trip(result), LARGEST_OF_ROUND_TRIP, "of the round trip"),
            (of_plan(result), 1.0, "of the planned memory"),
        ]
        lines.append(f"{result.kind}: {'; '.join(_judged(*figures) for figures in found)}")
    return "\n".join(lines)


def _judged(value: float, target: float, what: str) -> str:
    if math.isnan(value):
        return f"share {what} not known here"
    return f"{value:.2f} {what}, target {target:.1f}: {'holds' if value <= target else 'MISSED'}"
