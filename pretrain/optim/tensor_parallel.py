"""Weights that tensor parallelism splits: the axis, the group that holds the parts, and sums over the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.distributed import ProcessGroup

from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.rules import Slot


class TensorParallel:
    """The tensor-parallel groups of dense weights and of experts. Their ranks own parts of the same tensors."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        self._groups: dict[bool, ProcessGroup | None] = {False: groups.tp, True: groups.expt_tp}

    def group(self, shard: Shard) -> ProcessGroup | None:
        """The ranks that hold the parts of a tensor."""
        return self._groups[shard.logical.is_expert]

    def rank(self, shard: Shard) -> int:
        """This rank's number among them."""
        return int(get_pg_rank(self.group(shard)))

    def axis(self, shard: Shard) -> int | None:
        """The axis that is split; None if the tensor is whole on this rank."""
        logical = shard.logical
        mesh_axis = "expert_tensor" if logical.is_expert else "tensor"
        for i, axis in enumerate(logical.axes):
            if logical.sharded.get(axis) == mesh_axis and shard.shape[i] < logical.shape[i]:
                group = self.group(shard)
                part = (shard.offset[i], shard.shape[i])
                share = logical.shape[i] // get_pg_size(group)
                assert part == (get_pg_rank(group) * share, share), f"{shard.key}: {part} is not this rank's part"
                return i
        return None

    def sum_(
        self,
        slots: Sequence[Slot],
        values: Sequence[torch.Tensor],
        *,
        over: Callable[[LogicalTensor, str], bool] = lambda logical, axis: True,
    ) -> None:
        """Add up the values of parts of one tensor, in place. Collective.

        values: what each rank has found for its part of each slot's tensor, contiguous.
        over: (tensor, name of the axis that is split) -> whether the values are sums over that axis; others stay.
        """
        split: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for slot, value in zip(slots, values, strict=True):
            logical, axis = slot.shard.logical, self.axis(slot.shard)
            if axis is not None and over(logical, logical.axes[axis]):
                split[logical.is_expert].append(value)
        for is_expert, mine in split.items():
            if mine:
                flat = torch.cat([value.reshape(-1) for value in mine])
                dist.all_reduce(flat, group=self._groups[is_expert])
                parts = flat.split([value.numel() for value in mine])
                torch._foreach_copy_(mine, [part.view_as(value) for part, value in zip(parts, mine, strict=True)])
