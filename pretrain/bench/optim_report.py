"""What the benchmark prints of optimizers: a table, and whether our updates hold against the peers'."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pretrain.bench.measure import ratio
from pretrain.bench.optim import ESTIMATE, OURS, OURS_MATRICES, PASSES, OptimResult
from pretrain.bench.report import aligned
from pretrain.bench.workloads import Workload
from pretrain.model.counts import count_parameters

LARGEST_OF_PEER = 1.05
"""What an update of ours may take, over that of the fastest peer: two copies of one come out a few percent apart."""

HEADER = ["optimizer", "variant", "tensors", "update s (min..max)", "ours / it", "of a step", "state bytes a weight"]


def table(workload: Workload, results: Sequence[OptimResult], *, clock: str) -> str:
    """A heading, and rows for every kind: the whole model, then its own rule beside the peers; medians over rounds."""
    millions = count_parameters(workload.model).total / 1e6
    heading = (
        f"optimizers on {workload.name}, fp32: {millions:.1f} M parameters, {workload.describe()}; {clock} time; "
        f"forward and backward pass take {statistics.median(_of(results[0], PASSES, clock)):.3f} s"
    )
    rows = [HEADER, ["-" * 3] * len(HEADER)]
    rows += [row for result in results for row in _rows(result, clock)]
    return "\n".join([heading, "", *aligned(rows)])


def _rows(result: OptimResult, clock: str) -> list[list[str]]:
    state = f"{result.state_bytes / result.parameters:.2f}"
    rows = [[result.kind, OURS, "all", _range(result, OURS, clock), "", f"{share(result, clock):.1%}", state]]
    if ESTIMATE in result.seconds:
        rows.append(["", f"{ESTIMATE}, every {result.every_steps}", "all", _range(result, ESTIMATE, clock), "", "", ""])
    tensors = "matrices" if OURS_MATRICES in result.seconds else "all"
    if tensors == "matrices":
        rows.append(["", OURS, tensors, _range(result, OURS_MATRICES, clock), "", "", ""])
    for name in peers_of(result):
        compared = f"{over_peer(result, name, clock):.2f}"
        rows.append(["", name, tensors, _range(result, name, clock), compared, "", ""])
    return rows


def peers_of(result: OptimResult) -> list[str]:
    """Names of the variants that are not ours."""
    return [name for name in result.seconds if name not in (PASSES, OURS, OURS_MATRICES, ESTIMATE)]


def share(result: OptimResult, clock: str) -> float:
    """Share of a training step that is the optimizer's, estimates included."""
    update, passes = (statistics.median(_of(result, name, clock)) for name in (OURS, PASSES))
    if ESTIMATE in result.seconds:
        update += statistics.median(_of(result, ESTIMATE, clock)) / result.every_steps
    return update / (update + passes)


def over_peer(result: OptimResult, name: str, clock: str) -> float:
    """Our update over a peer's on the same tensors, a ratio of medians."""
    ours = OURS_MATRICES if OURS_MATRICES in result.seconds else OURS
    return ratio(_of(result, ours, clock), _of(result, name, clock)).of_medians


def verdict(results: Sequence[OptimResult], *, clock: str) -> str:
    """Whether the target against the fastest peer holds, a line per kind that has one."""
    lines = []
    for result in results:
        found = {name: over_peer(result, name, clock) for name in peers_of(result)}
        if found:
            name = max(found, key=lambda peer: found[peer])
            holds = "holds" if found[name] <= LARGEST_OF_PEER else "MISSED"
            lines.append(f"{result.kind}: {found[name]:.2f} of {name}, target {LARGEST_OF_PEER:.2f}: {holds}")
    return "\n".join(lines)


def _of(result: OptimResult, name: str, clock: str) -> list[float]:
    return [getattr(seconds, clock) for seconds in result.seconds[name]]


def _range(result: OptimResult, name: str, clock: str) -> str:
    seconds = _of(result, name, clock)
    return f"{statistics.median(seconds):.4f} ({min(seconds):.4f}..{max(seconds):.4f})"
