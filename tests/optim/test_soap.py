"""Blocks, and SOAP on them: against pytorch_optimizer, in fp64, on parts of tensors, and across growths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import pytorch_optimizer
import torch

from pretrain.config.optim import OptimConfig, SoapConfig
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim import soap
from pretrain.optim.blocks import Blocks
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.soap import Soap
from pretrain.optim.states import block_axes, states_of
from tests.helpers.growth import Model
from tests.optim.blockwise import (
    EXPERTS,
    check_experts_grew,
    check_width_grew,
    growing,
    layout_differences,
    matrices,
    matrix,
    resumed_difference,
    slot_of,
    step_of,
)
from tests.optim.build import Layout, full_value, make_groups, make_shard

LR = 1e-3


def config_of(block_size: int = 8, every_steps: int = 2, **keys: float) -> OptimConfig:
    plain = {"lr": LR, "weight_decay": 0.0, "clip_grad": 0.0, "eps": 1e-8}
    return OptimConfig(kind="soap", soap=SoapConfig(block_size=block_size, every_steps=every_steps), **plain | keys)


# Blocks.


@pytest.mark.parametrize("tensor", matrices()[-8:], ids=lambda t: t.key)
def test_blocks_are_those_of_the_states_entry_by_entry(tensor):
    blocks = Blocks(make_shard(tensor, Layout()), 8)
    box = full_value(tensor, "box")
    cut = blocks.cut(box)
    first, second = block_axes(tensor)
    grid = states_of(tensor, "soap", config_of())["exp_avg_sq"].tensor
    assert (blocks.rows, blocks.columns) == grid.shape[-2:]
    assert blocks.numbers == list(range(len(cut)))
    # The slow way: every block by the indices of its place in the grid of the states' axes.
    for number, place in enumerate(itertools.product(*(range(n) for n in grid.shape[:-2]))):
        at = dict(zip(grid.axes[:-2], place, strict=True))
        r, c = at.pop(f"{first}_blocks") * blocks.rows, at.pop(f"{second}_blocks") * blocks.columns
        here = at | {first: slice(r, r + blocks.rows), second: slice(c, c + blocks.columns)}
        assert torch.equal(cut[number], box[tuple(here[axis] for axis in tensor.axes)])
    assert torch.equal(blocks.join(cut), box)
    assert not torch.equal(blocks.join(cut.flip(1)), box)


def test_blocks_of_a_part_are_blocks_of_the_whole():
    for tensor in matrices():
        box, seen = full_value(tensor, "box"), []
        whole = Blocks(make_shard(tensor, Layout()), 4).cut(box)
        for rank in range(4):
            shard = make_shard(tensor, Layout(4, rank, tp=2, ep=2, etp=2))
            blocks = Blocks(shard, 4)
            where = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.shape, strict=True))
            assert torch.equal(blocks.cut(box[where]), whole[blocks.numbers]), tensor.key
            assert blocks.count == len(blocks.numbers)
            seen += blocks.numbers
        assert set(seen) == set(range(len(whole)))
    # Of 48 rows, 12 a rank: blocks of 8 do not fit.
    with pytest.raises(AssertionError, match="ffn is cut inside a block of 8"):
        Blocks(make_shard(matrix("layers.0.mlp.linear_fc1.weight"), Layout(4, 1, tp=4)), 8)


# The rule.


def gradients(size: int, steps: int = 60) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, size, generator=generator) for _ in range(steps)]


def our_replay(block_size: int, every_steps: int, size: int = 32) -> torch.Tensor:
    """How far a matrix moves under the gradients."""
    tensor = LogicalTensor("m", ("hidden", "ffn"), (size, size), "matrix", {})
    shard = Shard(tensor, (0, 0), (size, size), torch.nn.Parameter(torch.zeros(size, size)), (0, 0, 0))
    optimizer = ShardedOptimizer([shard], config_of(block_size, every_steps), make_groups(Layout()))
    for grad in gradients(size):
        shard.tensor.grad = grad.clone()
        optimizer.step(1.0)
    return shard.tensor.detach()


def their_replay(block_size: int, every_steps: int, size: int = 32, dtype=torch.float32) -> torch.Tensor:
    """The same by pytorch_optimizer's SOAP with a parameter for every block."""
    corners = list(itertools.product(range(0, size, block_size), repeat=2))
    params = [torch.nn.Parameter(torch.zeros(block_size, block_size, dtype=dtype)) for _ in corners]
    theirs = pytorch_optimizer.SOAP(
        params,
        lr=LR,
        betas=(0.95, 0.99),
        shampoo_beta=0.95,
        weight_decay=0.0,
        precondition_frequency=every_steps,
        eps=1e-8,
    )
    for grad in gradients(size):
        for param, (r, c) in zip(params, corners, strict=True):
            param.grad = grad[r : r + block_size, c : c + block_size].to(dtype, copy=True)
        theirs.step()
    moved = torch.zeros(size, size, dtype=dtype)
    for param, (r, c) in zip(params, corners, strict=True):
        moved[r : r + block_size, c : c + block_size] = param.detach()
    return moved


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# The distance from fp64 is that of the first basis: of one gradient's Gram matrix, fp32 hardly sees the smallest
# eigenvalues. Measured: 1.4e-4, 6e-6, 5e-6.
@pytest.mark.parametrize(("block_size", "every_steps", "rounding"), [(32, 10, 3e-4), (16, 10, 2e-5), (16, 1, 2e-5)])
def test_soap_is_pytorch_optimizers(block_size, every_steps, rounding, monkeypatch):
    ours, theirs = our_replay(block_size, every_steps), their_replay(block_size, every_steps)
    assert relative(ours, theirs) < 1e-6
    assert relative(ours, their_replay(block_size, every_steps, dtype=torch.float64)) < rounding
    # Negative controls: blocks of another size, and bases that stay as the first step made them.
    assert relative(our_replay(8, every_steps), theirs) > 1e-2
    monkeypatch.setattr(soap, "_move_bases", lambda state, which: None)
    assert relative(our_replay(block_size, every_steps), theirs) > 1e-2


def off_diagonal(matrices: torch.Tensor) -> float:
    return float((matrices - matrices.diagonal(dim1=-2, dim2=-1).diag_embed()).norm() / matrices.norm())


@pytest.mark.parametrize("every_steps", [1, 1000])
def test_bases_follow_the_gram_matrices(every_steps):
    """Rectangular blocks, too, where the first gradient says nothing of some directions of the larger side."""
    config, shard = config_of(every_steps=every_steps), make_shard(matrix("linear_qkv.weight"), Layout())
    rule, slot = Soap(config), slot_of(shard, config)
    grams: dict[str, torch.Tensor | float] = {"left": 0.0, "right": 0.0}
    for step in range(1, 41):
        # Gradients of a few strong directions, the same in all steps.
        strengths = torch.logspace(0, -2, shard.shape[-1])
        box = full_value(shard.logical, f"grad {step}") * strengths
        list(rule.directions([slot], [box.reshape(shard.tensor.shape)], step=step))
        blocks = Blocks(shard, 8).cut(box).double()
        for side, gram in (("left", blocks @ blocks.mT), ("right", blocks.mT @ blocks)):
            grams[side] = 0.95 * grams[side] + 0.05 * gram
    for side, size in (("left", 6), ("right", 8)):
        basis, gram = slot.state[f"basis_{side}"].flatten(0, -3), slot.state[f"gram_{side}"].flatten(0, -3)
        assert relative(gram, grams[side]) < 1e-6
        torch.testing.assert_close(basis.mT @ basis, torch.eye(size).expand_as(basis), rtol=0, atol=1e-5)
        rotated = basis.double().mT @ grams[side] @ basis.double()
        # Moved each step, the basis is nearly that of the eigenvectors; that of the first gradient alone is not.
        assert (off_diagonal(rotated) < 0.1) == (every_steps == 1), off_diagonal(rotated)


LAYOUTS = [Layout(4, rank, tp=2, ep=2, etp=2) for rank in range(4)]


def test_parts_move_as_the_whole_does(monkeypatch):
    config = config_of(block_size=4)
    assert layout_differences(lambda: Soap(config), config, LAYOUTS) < 1e-6
    # Negative control: were parts cut differently from the whole, one would see.
    monkeypatch.setattr(Blocks, "cut", lambda self, box: box.reshape(-1, self.rows, self.columns))
    assert layout_differences(lambda: Soap(config), config, LAYOUTS[:1], steps=3) > 0.1


def test_batches_of_blocks_change_nothing(monkeypatch):
    config, shard = config_of(), make_shard(matrix("experts.linear_fc1.weight"), Layout())
    rule, whole, batched = Soap(config), slot_of(shard, config), slot_of(shard, config)
    expected = [step_of(rule, [whole], step)[0] for step in range(1, 5)]
    monkeypatch.setattr("pretrain.optim.blocks.BATCH_NUMEL", 5 * 8 * 8)
    assert len(list(Blocks(shard, 8).batches())) > 5
    found = [step_of(rule, [batched], step)[0] for step in range(1, 5)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected[-1].abs().max() > 0.1


def experts_without_tokens(idle_steps: set[int], steps: int) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Directions and (copies of) states, step by step; expert 2 has no gradient in some of them."""
    config, shard = config_of(), make_shard(matrix("experts.linear_fc1.weight"), Layout())
    rule, slot = Soap(config), slot_of(shard, config)
    for step in range(1, steps + 1):
        grad = full_value(shard.logical, f"grad {step}")
        if step in idle_steps:
            grad[2] = 0
        ((_, direction),) = rule.directions([slot], [grad.view(shard.tensor.shape)], step=step)
        assert direction.isfinite().all()
        yield direction, {name: value.clone() for name, value in slot.state.items()}


def test_experts_without_tokens(monkeypatch):
    # Never a token: no basis, no update. The first one makes the basis, the second moves the weights.
    *before, (third, state), (fourth, _) = experts_without_tokens({1, 2}, 4)
    for direction, kept in before:
        assert not direction[2].any()
        assert not kept["basis_left"][2].any()
    assert before[1][0][0].any(), "the others go on"
    assert state["basis_left"][2].any()
    assert not third[2].any()
    assert fourth[2].any()
    # A break after step 6: bases stay while those of others move, and the update fades as Adam's does.
    steps = list(experts_without_tokens(set(range(7, 30)), 29))
    (sixth, held), (last, kept) = steps[5], steps[-1]
    assert torch.equal(kept["basis_left"][2], held["basis_left"][2])
    assert not torch.equal(kept["basis_left"][1], held["basis_left"][1])

    def size(n: int) -> float:
        """Of m / sqrt(v), n steps after the first, in the last n - 5 of which both only faded."""
        return 0.95 ** (n - 5) / 0.99 ** ((n - 5) / 2) * math.sqrt(1 - 0.99**n) / (1 - 0.95**n)

    torch.testing.assert_close(last[2], sixth[2] * (size(28) / size(5)), rtol=1e-4, atol=1e-6)
    assert size(28) < 0.3 * size(5)
    # Negative control: bases of blocks without gradient would be made up from nothing.
    monkeypatch.setattr(soap, "have_gradient", lambda grads: torch.ones(len(grads), dtype=torch.bool))
    (_, state), *_ = experts_without_tokens({1}, 1)
    assert state["basis_left"][2].any()


def test_a_fresh_block_forgets_its_momentum():
    """After a change of block sizes m would be carried and v not: the update would be several times the usual size."""
    config, shard = config_of(), make_shard(matrix("experts.linear_fc1.weight"), Layout())
    rule, slot = Soap(config), slot_of(shard, config)
    for step in range(1, 10):
        step_of(rule, [slot], step)
    carried = slot.state["exp_avg"].clone()
    for name, value in slot.state.items():
        if name != "exp_avg":
            value.zero_()
    (first,) = step_of(rule, [slot], 1000)
    assert not first.any()
    fresh = {name: value.clone() for name, value in slot.state.items()}
    sizes = {}
    for name, average in (("forgotten", fresh["exp_avg"]), ("carried", carried)):
        for key, value in slot.state.items():
            value.copy_(average if key == "exp_avg" else fresh[key])
        (second,) = step_of(rule, [slot], 1001)
        sizes[name] = float(second.square().mean().sqrt())
    assert sizes["forgotten"] == pytest.approx(0.05 / 0.1, rel=1e-3)  # (1 - b1) / sqrt(1 - b2), and no bias left
    assert sizes["carried"] > 2


def test_resume_is_identical():
    config = config_of()
    assert resumed_difference(config) == 0
    for name in ("exp_avg", "exp_avg_sq", "gram_left", "basis_right"):
        assert resumed_difference(config, forget=name) > 0.01 * LR, name


def test_cost_is_that_of_the_blocks():
    rule, shard = Soap(config_of(8)), make_shard(matrix("experts.linear_fc1.weight"), Layout())
    part = make_shard(shard.logical, Layout(2, 1, ep=2))
    assert rule.flops(shard) == pytest.approx(2 * rule.flops(part), rel=1e-4)
    assert rule.flops(part) > 0
    assert Soap(config_of(24)).flops(shard) > 2 * rule.flops(shard), "larger blocks cost more"


# Growth.


@pytest.fixture(scope="module")
def grown() -> Iterator[Callable[..., tuple[Model, Model]]]:
    def changes(block_size: int) -> dict[str, object]:
        return {"optim.kind": "soap", "optim.soap.block_size": block_size, "optim.weight_decay": 0.0}

    with growing(changes) as of:
        yield of


BLOCKED = ("exp_avg_sq", "gram_left", "gram_right", "basis_left", "basis_right")


@pytest.mark.parametrize("policy", ["asymmetric", "copy", "reset"])
def test_growth_of_experts(policy, grown):
    source, model = grown(16, experts={"noise": 0.01}, optimizer_state=policy)
    check_experts_grew(source, model, BLOCKED, policy)
    before = {key: value.clone() for key, value in model.tensors.items()}
    model.train(1, first=3)
    basis, weight = (model.tensors[prefix + EXPERTS] for prefix in ("optimizer.basis_left.", ""))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16).expand_as(basis), rtol=0, atol=1e-5)
    kept = basis == before[f"optimizer.basis_left.{EXPERTS}"]
    moved = (weight != before[EXPERTS]).flatten(1).any(1)
    # A block that has its basis goes on with it (step 4 is none that moves bases) and moves its weights.
    is_old = {"asymmetric": [True] * 4 + [False] * 4, "copy": [True] * 8, "reset": [False] * 8}[policy]
    assert kept.flatten(1).all(1).tolist() == moved.tolist() == is_old


def test_growth_of_the_width(grown):
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    source, model = grown(16, hidden={}, optimizer_state="asymmetric")
    check_width_grew(source, model, BLOCKED, key)
    # A block of all 32 channels becomes one of 64: nothing is left of its preconditioners, only the average.
    source, model = grown(64, hidden={}, optimizer_state="asymmetric")
    assert source.tensors[f"optimizer.basis_right.{key}"].shape[-1] == 32
    for name in BLOCKED:
        assert not model.tensors[f"optimizer.{name}.{key}"].any()
    assert model.tensors[f"optimizer.exp_avg.{key}"].any()
    model.train(1, first=3)
    assert model.tensors[f"optimizer.basis_right.{key}"].any()
    assert not model.tensors[f"optimizer.exp_avg.{key}"].any()
