"""Whether the ranks that hold copies of a weight still hold the same one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist

from pretrain.model.shards import Shard


def differing_replicas(shards: Iterable[Shard]) -> list[str]:
    """Keys of the tensors whose copies on different ranks differ in any bit; the same on every rank.

    Collective over all ranks, each with all shards of its own. Only checksums travel.
    """
    mine = [(shard.key, shard.offset, _checksum(shard.tensor)) for shard in shards]
    everyone: list[list[tuple[str, tuple[int, ...], str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    checksums = defaultdict(set)
    for of_rank in everyone:
        for key, offset, checksum in of_rank:
            checksums[key, offset].add(checksum)
    return sorted({key for (key, _), values in checksums.items() if len(values) > 1})


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()
