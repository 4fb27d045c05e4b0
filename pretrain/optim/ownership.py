"""Sharing out shards over the ranks of a data-parallel group: which rank keeps whose state and does its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What owning a shard costs."""

    flops: int
    state_bytes: int


def assign_owners(loads: Sequence[Load], num_ranks: int) -> list[int]:
    """The owner of each shard: greedy, largest first, onto the least loaded rank (Graham's LPT rule).

    Shards that need arithmetic are spread by it; then those that need only memory fill up what is left of that. A pure
    function of its arguments: ranks that pass equal lists agree without talking.
    """
    flops, state_bytes = [0] * num_ranks, [0] * num_ranks
    owners = [0] * len(loads)
    for i in sorted(range(len(loads)), key=lambda i: (-loads[i].flops, -loads[i].state_bytes, i)):
        if loads[i].flops:
            owner = min(range(num_ranks), key=lambda rank: (flops[rank], state_bytes[rank], rank))
        else:
            owner = min(range(num_ranks), key=lambda rank: (state_bytes[rank], rank))
        owners[i] = owner
        flops[owner] += loads[i].flops
        state_bytes[owner] += loads[i].state_bytes
    return owners
