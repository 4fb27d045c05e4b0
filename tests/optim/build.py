"""Shards and process groups of a layout, made by hand: the optimizer's input without a model or megatron-core's DDP."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config.optim import Kind, OptimConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim.routing import rules_of

MOE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    ffn_size=48,
    qk_norm=True,
    num_experts=4,
    top_k=2,
    expert_ffn_size=24,
    shared_expert_ffn_size=16,
    first_dense_layers=1,
    router={"score_function": "sigmoid", "bias_update_rate": 1e-3},
)


KINDS: tuple[Kind, ...] = get_args(Kind)
_BLOCKS: dict[str, Any] = {
    "soap": {"soap": {"block_size": 4, "every_steps": 2}},
    "kron": {"kron": {"block_size": 4}},
}


def config_of(kind: str, **keys: Any) -> OptimConfig:
    """An optimizer with its defaults and `keys`, the router with the hidden matrices, blocks that fit any layout."""
    routes = {"*.router.weight": rules_of(kind)[0]}
    return OptimConfig.model_validate({"kind": kind, "routes": routes, **_BLOCKS.get(kind, {}), **keys})


@dataclass(frozen=True)
class Layout:
    """One rank's place; ranks count tensor first, then (for experts) expert, then data."""

    world: int = 1
    rank: int = 0
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def etp_rank(self) -> int:
        return self.rank % self.etp

    @property
    def ep_rank(self) -> int:
        return self.rank // self.etp % self.ep

    @property
    def edp_rank(self) -> int:
        return self.rank // (self.etp * self.ep)


def here(tp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
    """The layout of this rank of the running process group."""
    return Layout(dist.get_world_size(), dist.get_rank(), tp, ep, etp)


def full_value(logical: LogicalTensor, tag: str, scale: float = 1.0) -> torch.Tensor:
    """Random unsharded tensor that depends on the key and `tag` only."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{logical.key} {tag}".encode()))
    return torch.randn(logical.shape, generator=generator) * scale


def make_shard(logical: LogicalTensor, layout: Layout, *, dtype: torch.dtype = torch.float32) -> Shard:
    """A parameter with its part of the logical tensor's random initial value."""
    size = {"tensor": layout.tp, "expert": layout.ep, "expert_tensor": layout.etp}
    rank = {"tensor": layout.tp_rank, "expert": layout.ep_rank, "expert_tensor": layout.etp_rank}
    shape = logical.local_shape(size)
    offset = tuple(
        rank[logical.sharded[axis]] * n if axis in logical.sharded else 0
        for axis, n in zip(logical.axes, shape, strict=True)
    )
    box = full_value(logical, "init", 0.1)[_slices(offset, shape)].contiguous()
    tensor = torch.nn.Parameter(box.reshape(_module_shape(logical, shape)).to(dtype))
    mesh_axis, copy, data = (
        ("expert_tensor", layout.etp_rank, layout.edp_rank)
        if logical.is_expert
        else ("tensor", layout.tp_rank, layout.dp_rank)
    )
    replica = 0 if mesh_axis in logical.sharded.values() else copy
    return Shard(logical, offset, shape, tensor, (0, replica, data))


def make_shards(model: ModelConfig, layout: Layout, *, dtype: torch.dtype = torch.float32) -> list[Shard]:
    return [make_shard(logical, layout, dtype=dtype) for logical in logical_tensors(model)]


def freeze_experts(shards: list[Shard], trained: Collection[int]) -> list[Shard]:
    """The shards with experts cut into one for each run that trains, all in `trained`, or is frozen."""
    found = []
    for shard in shards:
        first = shard.offset[0]
        experts = range(first, first + shard.shape[0]) if shard.logical.is_expert else ()
        found += [] if experts else [shard]
        for trains, members in itertools.groupby(experts, key=lambda expert: expert in trained):
            mine = list(members)
            part = shard.tensor.detach()[mine[0] - first : mine[-1] + 1 - first]
            offset, shape = (mine[0], *shard.offset[1:]), (len(mine), *shard.shape[1:])
            tensor = torch.nn.Parameter(part, requires_grad=trains)
            found.append(replace(shard, offset=offset, shape=shape, tensor=tensor))
    return found


def set_grads(shards: list[Shard], tag: str, scale: float = 1.0) -> None:
    """Give every parameter that trains its part of a random gradient that depends on key and `tag`."""
    for shard in shards:
        if shard.trainable:
            box = full_value(shard.logical, f"grad {tag}", scale)[_slices(shard.offset, shard.shape)]
            shard.tensor.main_grad = box.reshape(shard.tensor.shape).clone()


def boxes(shards: list[Shard]) -> dict[str, torch.Tensor]:
    """This rank's weights as logical boxes."""
    return {shard.key: shard.view().detach().clone() for shard in shards}


def part_of(shard: Shard, full: torch.Tensor) -> torch.Tensor:
    """What a rank with `shard` holds of an unsharded tensor."""
    return full[_slices(shard.offset, shard.shape)]


def grown_twice(logical: LogicalTensor) -> list[np.ndarray]:
    """Ages of a model whose width grew first, then its experts (interleaved) and attention, and layer 0 with them."""
    vectors = [np.zeros(size, dtype=np.int64) for size in logical.shape]
    for axis, vector in zip(logical.axes, vectors, strict=True):
        if axis in ("hidden", "expert_ffn", "shared_ffn"):
            vector[len(vector) // 2 :] = 1
        elif axis == "expert":
            vector[1::2] = 2
        elif axis == "kv_group":
            vector[3:] = 2
    if logical.layer == 0:
        vectors[0][:] = 2
    return vectors


def ages_of_entries(vectors: Sequence[np.ndarray]) -> torch.Tensor:
    """The age of every entry, the slow way: a tensor of the whole shape."""
    return torch.from_numpy(functools.reduce(np.maximum.outer, vectors))


def make_groups(layout: Layout) -> ProcessGroupCollection:
    """The groups of a layout; collective. Without torch.distributed: None for each."""
    if not dist.is_initialized():
        return ProcessGroupCollection(tp=None, dp_cp=None, expt_tp=None, expt_dp=None)
    at = [Layout(layout.world, rank, layout.tp, layout.ep, layout.etp) for rank in range(layout.world)]
    return ProcessGroupCollection(
        tp=_partition(at, lambda x: x.dp_rank),
        dp_cp=_partition(at, lambda x: x.tp_rank),
        expt_tp=_partition(at, lambda x: (x.ep_rank, x.edp_rank)),
        expt_dp=_partition(at, lambda x: (x.ep_rank, x.etp_rank)),
    )


def _partition(at: list[Layout], key: Callable[[Layout], object]) -> dist.ProcessGroup:
    """This rank's group of the ranks with the same key."""
    mine = None
    for value in sorted({key(x) for x in at}):
        ranks = [x.rank for x in at if key(x) == value]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def _module_shape(logical: LogicalTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The 1-, 2- or (experts) 3-dimensional shape a module would store the box in."""
    if len(shape) == 1:
        return shape
    lead = shape[:1] if logical.is_expert else ()
    axes = logical.axes[len(lead) :]
    return (*lead, shape[len(lead)], -1) if axes[0] == "hidden" else (*lead, -1, shape[-1])
