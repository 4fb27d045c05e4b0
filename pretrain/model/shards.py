"""This rank's shards of the logical tensors, located by megatron-core's ShardedTensor metadata.

A shard pairs a live parameter (or buffer) with the box it fills in its logical tensor. Any tensor that has the
parameter's shape (its gradient, its fp32 master, an optimizer moment) can be viewed as that box, and turned
into a megatron-core ShardedTensor under a key of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.model.logical import LogicalTensor


@dataclass(frozen=True)
class Shard:
    """One rank's box of one logical tensor."""

    logical: LogicalTensor
    offset: tuple[int, ...]
    """Where the box starts, per logical axis."""
    shape: tuple[int, ...]
    """Extent of the box, per logical axis."""
    tensor: torch.Tensor
    """The parameter or buffer that holds it, in its module's own shape."""
    replica_id: tuple[int, int, int]
    """(pipeline, tensor, data) index among the ranks that hold the same box, as in megatron-core."""

    @property
    def key(self) -> str:
        return self.logical.key

    @property
    def counts_in_norm(self) -> bool:
        """Whether this rank's data-parallel group is the one that counts the box: not a tensor-parallel or
        pipeline copy of it. (Sum over these shards, once per data-parallel group, covers each entry once.)"""
        return self.replica_id[:2] == (0, 0)

    def view(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """`tensor` (default: the parameter itself), which has the parameter's shape, as the logical box."""
        return (self.tensor if tensor is None else tensor).view(self.shape)

    def sharded(self, tensor: torch.Tensor | None = None, *, key: str | None = None) -> ShardedTensor:
        """megatron-core's description of `tensor` as this box of the global tensor `key` (default: the weight)."""
        data = self.view(tensor).detach()
        return ShardedTensor(
            key=key or self.key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=self.logical.shape,
            global_offset=self.offset,
            axis_fragmentations=tuple(g // s for g, s in zip(self.logical.shape, self.shape, strict=True)),
            replica_id=self.replica_id,
        )
