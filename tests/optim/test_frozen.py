"""Every kind of optimizer with some experts frozen: it does to the others what it does when all train."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain.model.logical import logical_tensors
from pretrain.optim import rules
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key
from tests.helpers.distributed import run_ranks
from tests.optim.build import KINDS, MOE, Layout, config_of, freeze_experts, here, make_groups, make_shards
from tests.optim.moving import Tensors, straight, train

STEPS = 3
# Of 4: a run of two in the middle of a rank that has all, one of each kind on two ranks.
TRAINED = (1, 2)
# Tensor, expert and expert tensor parallel size on 4 ranks.
LAYOUTS = ((1, 1, 1), (2, 2, 1), (4, 1, 2))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(kind, layout, "fp32") for kind in KINDS for layout in LAYOUTS] + [
    (kind, LAYOUTS[2], "bf16") for kind in ("adamw", "muon", "soap")
]


@dataclass(frozen=True)
class Part:
    """A box of a weight or a state that one rank has."""

    key: str
    offset: tuple[int, ...]
    values: torch.Tensor
    is_main: bool


def parts_of(kind: str, layout: Layout, dtype: torch.dtype, groups) -> tuple[list[Part], bool]:
    """This rank's weights (masters) and states after some steps, and whether frozen weights are as they were."""
    shards = freeze_experts(make_shards(MOE, layout, dtype=dtype), TRAINED)
    frozen = [(shard, shard.view().detach().clone()) for shard in shards if not shard.trainable]
    optimizer = ShardedOptimizer(shards, config_of(kind, clip_grad=0.0, weight_decay=0.5), groups)
    train(optimizer, shards, range(STEPS))
    found = [
        Part(tensor.key, tuple(tensor.global_offset), tensor.data, tensor.replica_id == (0, 0, 0))
        for tensor in optimizer.whole_state()
    ]
    return found, all(torch.equal(shard.view(), before) for shard, before in frozen)


def worker() -> dict[tuple[str, tuple[int, int, int], str], tuple[list[Part], bool]]:
    found = {}
    groups = {sizes: make_groups(here(*sizes)) for sizes in LAYOUTS}
    # Small batches, so that ranks that own different experts would cut them differently.
    with mock.patch.object(rules, "BATCH_NUMEL", 2000):
        for kind, sizes, precision in CASES:
            found[kind, sizes, precision] = parts_of(kind, here(*sizes), DTYPES[precision], groups[sizes])
    return found


@functools.cache
def outcomes() -> list:
    return run_ranks(worker, 4)


@functools.cache
def all_train(kind: str, precision: str) -> Tensors:
    return straight(kind, DTYPES[precision], STEPS, clip_grad=0.0, weight_decay=0.5)


@pytest.mark.parametrize(("kind", "sizes", "precision"), CASES)
def test_trained_entries_move_as_when_all_train(kind: str, sizes: tuple[int, int, int], precision: str) -> None:
    expected = all_train(kind, precision)
    experts: Counter[str] = Counter()
    seen = set()
    for parts, frozen_stayed in (rank[kind, sizes, precision] for rank in outcomes()):
        assert frozen_stayed
        for part in parts:
            place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.values.shape, strict=True))
            theirs = expected[part.key][place]
            # As layouts differ among each other; a batch of matrices may have another size, too.
            assert (part.values - theirs).abs().max() <= 1e-6 * max(1.0, float(theirs.abs().max())), part.key
            seen.add(part.key)
            if ".experts." in part.key and part.is_main:
                rest = theirs[0].numel()
                experts.update({f"{part.key} {part.offset[0] + i}": rest for i in range(part.values.shape[0])})
    assert seen == expected.keys()
    # Each trained expert once, in parts that make it up; none of the others.
    weights = {tensor.key: tensor for tensor in logical_tensors(MOE)}
    for key, value in expected.items():
        if weights[split_state_key(key)[1]].is_expert:
            counts = [experts[f"{key} {expert}"] for expert in range(len(value))]
            assert counts == [value[0].numel() if expert in TRAINED else 0 for expert in range(len(value))], key


def test_a_step_of_another_gradient_is_noticed() -> None:
    expected = all_train("adamw", "fp32")
    parts, _ = parts_of("adamw", Layout(), torch.float32, make_groups(Layout()))
    part = next(part for part in parts if part.key.endswith("experts.linear_fc1.weight") and part.offset[0] == 1)
    assert (part.values - expected[part.key][1:3]).abs().max() <= 1e-6
    assert (part.values - expected[part.key][2:4]).abs().max() > 1e-2


def test_boxes_of_other_ranks_are_refused() -> None:
    """Data-parallel copies that train different experts would mix tensors up."""
    (message,) = set(run_ranks(different_experts, 2))
    assert "expert shards of data-parallel copies differ" in message


def different_experts() -> str:
    shards = freeze_experts(make_shards(MOE, here()), (dist.get_rank(),))
    try:
        ShardedOptimizer(shards, config_of("adamw"), make_groups(here()))
    except RuntimeError as error:
        return str(error).split(" between")[0]
    return ""
