"""Runs of every kind of optimizer that begin on one layout of ranks and end on another; what they leave, as wholes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.optim import rules
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.tensor_parallel import TensorParallel
from tests.optim.build import (
    KINDS,
    MOE,
    Layout,
    config_of,
    full_value,
    here,
    make_groups,
    make_shards,
    part_of,
)

STEPS = 4
# Name: precision; tensor, expert and expert tensor parallel size of the first half of the run and of the second.
MOVES = {
    "fp32": (torch.float32, (4, 2, 1), (1, 2, 2)),
    "bf16": (torch.bfloat16, (2, 1, 2), (2, 2, 1)),
}
SUMMING = ("muon", "cautious", "adam_mini", "muonh", "adamh")
"""Kinds that add up numbers over the parts of a matrix."""

Tensors = dict[str, torch.Tensor]


def train(optimizer: ShardedOptimizer, shards: Sequence, steps: range) -> None:
    """Steps with gradients that half a matrix has none of (step 1), and an expert (step 2)."""
    for step in steps:
        for shard in shards:
            if shard.trainable:
                grad = full_value(shard.logical, f"grad {step}")
                if step == 1 and shard.key.endswith("0.mlp.linear_fc1.weight"):
                    grad[:, : grad.shape[1] // 2] = 0
                if step == 2 and ".experts." in shard.key:
                    grad[2] = 0
                shard.tensor.main_grad = part_of(shard, grad).reshape(shard.tensor.shape).clone()
        optimizer.step(1.0 - step / 20)


def straight(kind: str, dtype: torch.dtype, steps: int = STEPS, **keys: Any) -> Tensors:
    """Weights and states of a run on one process. `keys`: of the optimizer."""
    shards = make_shards(MOE, Layout(), dtype=dtype)
    optimizer = ShardedOptimizer(shards, config_of(kind, **keys), make_groups(Layout()))
    train(optimizer, shards, range(steps))
    return {tensor.key: tensor.data for tensor in optimizer.whole_state()}


def moving_worker() -> dict[str, Tensors]:
    """Weights and states by kind and move, and of half a run without the sums over parts; the same on every rank."""
    found = {}
    # Small batches, so that ranks that own different experts would cut them differently.
    with mock.patch.object(rules, "BATCH_NUMEL", 2000):
        for kind in KINDS:
            for name, (dtype, before, after) in MOVES.items():
                found[f"{kind} {name}"] = _moved(kind, dtype, before, after)
        with mock.patch.object(TensorParallel, "sum_"):
            for kind in SUMMING:
                shards, optimizer = _build(kind, torch.float32, (2, 1, 2))
                train(optimizer, shards, range(STEPS // 2))
                found[f"{kind} without sums"] = _gathered(optimizer.whole_state(), agree=False)
    return found


def _build(kind: str, dtype: torch.dtype, sizes: tuple[int, int, int]):
    layout = here(*sizes)
    shards = make_shards(MOE, layout, dtype=dtype)
    return shards, ShardedOptimizer(shards, config_of(kind), _groups(layout))


@functools.cache
def _groups(layout: Layout):
    return make_groups(layout)


def _moved(kind: str, dtype: torch.dtype, before: tuple[int, int, int], after: tuple[int, int, int]) -> Tensors:
    shards, optimizer = _build(kind, dtype, before)
    train(optimizer, shards, range(STEPS // 2))
    middle, scalars = _gathered(optimizer.whole_state()), optimizer.state_dict()

    shards, optimizer = _build(kind, dtype, after)
    for shard in shards:
        shard.tensor.data.zero_()
    for tensor in optimizer.whole_state():
        tensor.data.copy_(middle[tensor.key][_box(tensor.global_offset, tensor.local_shape)])
    optimizer.load_state_dict(scalars)
    optimizer.load_finished()
    train(optimizer, shards, range(STEPS // 2, STEPS))
    whole = _gathered(optimizer.whole_state())
    for shard in shards:
        if shard.logical.trainable:
            assert torch.equal(shard.view(), part_of(shard, whole[shard.key]).to(dtype)), shard.key
    return whole


def _gathered(tensors: Sequence[ShardedTensor], *, agree: bool = True) -> Tensors:
    """Whole tensors from the boxes of all ranks, which must cover them, and agree where several have the same."""
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, [(t.key, t.global_shape, t.global_offset, t.data, t.replica_id) for t in tensors])
    whole: Tensors = {}
    main: dict[str, int] = {}
    for key, shape, offset, data, replica in (entry for rank in every for entry in rank):
        part = whole.setdefault(key, torch.full(shape, torch.nan))[_box(offset, data.shape)]
        assert not agree or part.isnan().all() or torch.equal(part, data), f"{key}: copies differ"
        part.copy_(data)
        main[key] = main.get(key, 0) + (data.numel() if replica == (0, 0, 0) else 0)
    for key, value in whole.items():
        assert not value.isnan().any(), f"{key}: not covered"
        assert main[key] == value.numel(), f"{key}: {main[key]} of {value.numel()} entries have one main replica"
    return whole


def _box(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
