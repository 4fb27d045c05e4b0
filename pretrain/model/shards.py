"""This rank's shards of the logical tensors, located by megatron-core's ShardedTensor metadata.

A shard pairs a live parameter (or buffer) with the box it fills in its logical tensor. Any tensor that has the
parameter's shape (its gradient, its fp32 master, an optimizer moment) can be viewed as that box, and turned
into a megatron-core ShardedTensor under a key of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config.schema import ModelConfig
from pretrain.model.logical import LogicalTensor, MeshAxis, logical_tensors
from pretrain.model.transformer_engine import TE_NAMES


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
    def trainable(self) -> bool:
        """Whether it is trained here: no buffer, and no weights of frozen experts."""
        return self.logical.trainable and self.tensor.requires_grad

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
            axis_fragmentations=None,
            replica_id=self.replica_id,
        )


def collect_shards(chunks: Sequence[GPTModel], model: ModelConfig, groups: ProcessGroupCollection) -> list[Shard]:
    """Shards of all weights and persistent buffers of this rank's model chunks, in the model's order.

    Weights of experts of which some are frozen are several shards of one key, by their first expert.

    Raises:
        AssertionError: a parameter that no logical tensor describes, or that fills another box than described.
    """
    logical = {tensor.key: tensor for tensor in logical_tensors(model)}
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.dp_cp}
    sizes: dict[MeshAxis, int] = {
        "tensor": groups.tp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
    }
    shards = []
    for chunk in chunks:
        owned = (*chunk.parameters(), *chunk.buffers())
        by_pointer = {tensor.data_ptr(): tensor for tensor in owned}
        for item in chunk.sharded_state_dict(metadata=metadata).values():
            if isinstance(item, ShardedObject):
                continue  # An empty `_extra_state` of megatron-core's linears.
            key, tensor = _logical_key(item.key), by_pointer[item.data.data_ptr()]
            assert key in logical, f"parameters without a logical tensor: {key}"
            shards.append(_locate(logical[key], item, tensor, sizes))
        covered = {id(shard.tensor) for shard in shards}
        missing = [name for name, parameter in chunk.named_parameters() if id(parameter) not in covered]
        assert not missing, f"parameters without a logical tensor: {missing}"
    order = {key: position for position, key in enumerate(logical)}
    return sorted(shards, key=lambda shard: (order[shard.key], shard.offset))


def _logical_key(key: str) -> str:
    """The logical key of a tensor under megatron-core's name for it."""
    for theirs, ours in TE_NAMES.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def _locate(
    logical: LogicalTensor,
    item: ShardedTensor | ShardedTensorFactory,
    tensor: torch.Tensor,
    sizes: Mapping[MeshAxis, int],
) -> Shard:
    """The box of `logical` that megatron-core's description `item` of `tensor` amounts to."""
    # Fused gate and up: megatron-core splits them into two boxes; the gate's place is that of both.
    located = item.build()[0] if isinstance(item, ShardedTensorFactory) else item
    shape = logical.local_shape(sizes)
    if located.prepend_axis_num:
        # One parameter per expert: a box of extent one along the axes that megatron-core prepends.
        shape = (1,) * located.prepend_axis_num + shape[located.prepend_axis_num :]
    elif logical.is_expert:
        # Experts that train and frozen ones are parameters apart.
        shape = (located.local_shape[0], *shape[1:])
    assert math.prod(shape) == tensor.numel(), f"{logical.key}: box {shape} for a tensor of {tuple(tensor.shape)}"
    offset = _unravel(located.global_offset, located.global_shape, logical)
    return Shard(logical, offset, shape, tensor, tuple(located.replica_id))


def _unravel(offset: Sequence[int], shape: Sequence[int], logical: LogicalTensor) -> tuple[int, ...]:
    """Offset in megatron-core's fused axes -> offset in logical axes (a fused axis is a product of several)."""
    assert math.prod(shape) == logical.numel, f"{logical.key}: {tuple(shape)} in megatron-core, {logical.shape} here"
    result: list[int] = []
    axis = 0
    for start, size in zip(offset, shape, strict=True):
        remaining, covered, place = size, 1, start
        while covered < size:
            covered *= logical.shape[axis]
            remaining //= logical.shape[axis]
            result.append(place // remaining)
            place %= remaining
            axis += 1
        assert covered == size, f"{logical.key}: axis of {size} is no product of {logical.shape}"
        assert place == 0, f"{logical.key}: offset {start} splits a fused axis"
    result.extend([0] * (len(logical.shape) - axis))
    return tuple(result)
