"""Entries of several ages: the blocks, learning rates per entry, and twins that stay or cease to be equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim import adam
from pretrain.optim.ages import Ages, Block, blocks
from pretrain.optim.sharded import ShardedOptimizer
from pretrain_kernels.newton_schulz import newton_schulz
from tests.optim.build import (
    MOE,
    Layout,
    ages_of_entries,
    boxes,
    full_value,
    grown_twice,
    make_groups,
    make_shards,
    set_grads,
)

LR, DECAY = 1e-2, 0.1
ADAMW = OptimConfig(lr=LR, weight_decay=DECAY)
MUON = OptimConfig(kind="muon", lr=LR, weight_decay=DECAY, muon=MuonConfig(lr=2e-2), routes={"*.router.weight": "muon"})
KINDS = pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
STEPS = 30


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Blocks.


def check_blocks(found: list[Block], ages: np.ndarray) -> None:
    """Whether blocks cover a box once, each with entries of its age only. `ages`: that of every entry of the box."""
    covered = np.zeros(ages.shape, dtype=int)
    for block in found:
        covered[block.where] += 1
        assert (ages[block.where] == block.age).all(), block
    assert (covered == 1).all()


def test_blocks_partition_any_box():
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = rng.integers(1, 7, size=rng.integers(1, 5))
        vectors = [rng.integers(0, rng.integers(1, 4), size=size) for size in shape]
        offset = [int(rng.integers(0, size)) for size in shape]
        extent = [int(rng.integers(1, size - start + 1)) for size, start in zip(shape, offset, strict=True)]
        box = tuple(slice(start, start + size) for start, size in zip(offset, extent, strict=True))
        check_blocks(blocks(vectors, offset, extent), ages_of_entries(vectors).numpy()[box])


def test_blocks_of_the_wrong_place_are_noticed():
    vectors = [np.array([0, 0, 1, 1]), np.array([0, 2, 2])]
    ages = ages_of_entries(vectors).numpy()
    found = blocks(vectors, (0, 0), (4, 3))
    check_blocks(found, ages)
    for wrong in (found[1:], [*found, found[0]], blocks([vectors[0][::-1], vectors[1]], (0, 0), (4, 3))):
        with pytest.raises(AssertionError):
            check_blocks(wrong, ages)
    with pytest.raises(AssertionError, match="ages of"):
        blocks(vectors, (0, 0), (4, 4))


def test_blocks_are_few():
    half, old, interleaved = np.array([0, 0, 1, 1]), np.zeros(5, dtype=int), np.array([0, 1] * 4)
    whole = (slice(0, 4), slice(0, 5))
    assert blocks([half, old], (2, 0), (2, 5)) == [Block(1, (slice(0, 2), slice(0, 5)))]
    assert [block.age for block in blocks([half, old], (0, 0), (4, 5))] == [0, 1]
    # Two axes that doubled: the old quarter, the one beside it, and the rows below both.
    assert [block.age for block in blocks([half, half], (0, 0), (4, 4))] == [0, 1, 1]
    # A layer that is new as a whole is one block, whatever its axes went through before.
    assert blocks([np.full(4, 2), np.array([0, 1, 1, 0, 2])], (0, 0), (4, 5)) == [Block(2, whole)]
    assert blocks([half, np.full(5, 1)], (0, 0), (4, 5)) == [Block(1, whole)]
    assert [block.age for block in blocks([interleaved, old], (0, 0), (8, 5))] == [0, 1] * 4


# Learning rates per entry, on a whole model.


def train(config: OptimConfig, *, ages: Ages | None, rates, dtype: torch.dtype = torch.float32, steps: int = STEPS):
    """Shards and optimizer of a small model after some steps; `rates(step)` are the learning rates by age."""
    shards = make_shards(MOE, Layout(), dtype=dtype)
    optimizer = ShardedOptimizer(shards, config, make_groups(Layout()), ages=ages)
    for step in range(1, steps + 1):
        set_grads(shards, str(step))
        first, *newer = rates(step)
        optimizer.step(first, newer)
    return shards, optimizer


def three_rates(step: int) -> tuple[float, ...]:
    return 1 - step / 40, 1.3 - step / 60, 0.2 + step / 50


@KINDS
def test_every_entry_has_the_rate_of_its_age(config):
    # Gradients do not depend on the weights here, so that entries of an age move as in a run where all have its rate.
    mixed = {shard.key: shard for shard in train(config, ages=grown_twice, rates=three_rates)[0]}
    seen = set()
    for age in range(3):
        same = train(config, ages=None, rates=lambda step, age=age: three_rates(step)[age : age + 1])[0]
        for shard in same:
            where = ages_of_entries(grown_twice(shard.logical)) == age
            mine, theirs = (s.view().detach()[where] for s in (mixed[shard.key], shard))
            if shard.logical.trainable and where.any():
                assert relative(mine, theirs) < 1e-6, shard.key
                seen.add((age, shard.logical.kind))
            if shard.logical.trainable and not where.all():  # negative control: entries of another age
                mine, theirs = (s.view().detach()[~where] for s in (mixed[shard.key], shard))
                assert relative(mine, theirs) > 1e-3, shard.key
    assert {(age, kind) for age in range(3) for kind in ("matrix", "router", "norm")} <= seen


def test_adamw_of_several_ages_is_torch_once_per_rate():
    logical = LogicalTensor("m", ("expert", "hidden", "ffn"), (4, 16, 24), "matrix", {})
    vectors = [np.array([0, 2, 0, 2]), np.arange(16) // 8, np.arange(24) // 18]
    start = full_value(logical, "init")
    parameter = torch.nn.Parameter(start.clone())
    shard = Shard(logical, (0, 0, 0), logical.shape, parameter, (0, 0, 0))
    config = ADAMW.model_copy(update={"clip_grad": 0})
    optimizer = ShardedOptimizer([shard], config, make_groups(Layout()), ages=lambda _: vectors)
    params = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    oracles = [
        torch.optim.AdamW([p], lr=LR, betas=(0.9, 0.95), eps=config.eps, weight_decay=DECAY, fused=False)
        for p in params
    ]
    for step in range(1, STEPS + 1):
        grad, rates = full_value(logical, f"grad {step}"), three_rates(step)
        parameter.grad = grad.clone()
        optimizer.step(rates[0], rates[1:])
        for param, oracle, rate in zip(params, oracles, rates, strict=True):
            param.grad, oracle.param_groups[0]["lr"] = grad, LR * rate
            oracle.step()
    ages = ages_of_entries(vectors)
    for age, param in enumerate(params):
        mine, theirs = parameter.detach(), param.detach()
        assert relative(mine[ages == age], theirs[ages == age]) < 1e-6
        assert relative(mine[ages != age], theirs[ages != age]) > 1e-3
    # The moments know of no rates.
    state = {entry.key: entry.data for entry in optimizer.named_state()}
    for name in ("exp_avg", "exp_avg_sq"):
        assert relative(state[f"optimizer.{name}.m"], oracles[0].state[params[0]][name]) < 1e-6


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ages_of_one_rate_are_as_if_nothing_grew(config, dtype):
    never = boxes(train(config, ages=None, rates=lambda step: (1 - step / 40,), dtype=dtype, steps=4)[0])
    equal = boxes(train(config, ages=grown_twice, rates=lambda step: (1 - step / 40,) * 3, dtype=dtype, steps=4)[0])
    other = boxes(train(config, ages=grown_twice, rates=three_rates, dtype=dtype, steps=4)[0])
    assert all(torch.equal(value, equal[key]) for key, value in never.items())
    for logical in logical_tensors(MOE):
        if logical.trainable and ages_of_entries(grown_twice(logical)).any():
            assert not torch.equal(never[logical.key], other[logical.key]), logical.key


def test_tensors_of_one_rate_share_a_pass(monkeypatch):
    sizes = []

    def count(params, *rest, **keys):
        sizes.append(len(params))
        adamw_(params, *rest, **keys)

    adamw_ = adam.adamw_
    monkeypatch.setattr(adam, "adamw_", count)
    trainable = sum(shard.logical.trainable for shard in make_shards(MOE, Layout()))
    train(ADAMW, ages=None, rates=lambda _: (1.0,), steps=1)
    assert len(sizes) == 3, "with decay and without, and experts"
    assert sum(sizes) == trainable

    sizes.clear()
    train(ADAMW, ages=whole_layers, rates=three_rates, steps=1)
    assert sum(sizes) == trainable
    assert len(sizes) == 5, "each of two rates with decay and without, and the experts of one layer"

    sizes.clear()
    train(ADAMW, ages=grown_twice, rates=three_rates, steps=1)
    assert sizes.count(1) > trainable / 2, "negative control: tensors of several rates go alone"


def whole_layers(logical: LogicalTensor) -> list[np.ndarray]:
    """Ages of a model that grew in depth: layer 1 is new."""
    return [np.full(size, int(logical.layer == 1)) for size in logical.shape]


def test_rates_of_all_ages_are_needed():
    with pytest.raises(AssertionError, match="entries of growth 2"):
        train(ADAMW, ages=grown_twice, rates=lambda _: (1.0, 1.3), steps=1)


# Twins: a matrix [S; S] or [S, S] that gets the same gradient on both blocks.

SHAPE = (16, 32)
"""Of S in [S, S]; transposed in [S; S]. The grown axis is the long one: the short one's blocks would all get one norm
by being orthogonal."""
AXES = pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])


def half_shape(axis: int) -> tuple[int, int]:
    return SHAPE if axis == 1 else (SHAPE[1], SHAPE[0])


def halves(tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    old, new = tensor.detach().chunk(2, dim=axis)
    return old, new


class Twins:
    """One matrix, its second half along `axis` a copy that a growth brought in."""

    def __init__(self, config: OptimConfig, axis: int, *, state: str, step: int = 1000) -> None:
        """state: `equal` on both halves, or `new` for zero on the copy. step: updates done before."""
        self.axis = axis
        shape = tuple(2 * n if i == axis else n for i, n in enumerate(half_shape(axis)))
        logical = LogicalTensor("m", ("hidden", "ffn"), shape, "matrix", {})
        generator = torch.Generator().manual_seed(0)
        self._generator = generator
        self.parameter = torch.nn.Parameter(self._twice(0.1 * torch.randn(half_shape(axis), generator=generator)))
        shard = Shard(logical, (0, 0), shape, self.parameter, (0, 0, 0))
        config = config.model_copy(update={"clip_grad": 0})
        vectors = [np.arange(n) // (n // 2) if i == axis else np.zeros(n, dtype=int) for i, n in enumerate(shape)]
        self.optimizer = ShardedOptimizer([shard], config, make_groups(Layout()), ages=lambda _: vectors)
        for entry in self.optimizer.named_state():
            entry.data.copy_(self._twice(torch.rand(half_shape(axis), generator=generator)))
            if state == "new":
                halves(entry.data, axis)[1].zero_()
        self.optimizer.load_state_dict({"kind": config.kind, "step": step})

    def _twice(self, half: torch.Tensor) -> torch.Tensor:
        return torch.cat([half, half], dim=self.axis)

    def step(self, new_ratio: float = 1.0, *, grad: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Train a step on equal gradients (random by default); what the old and the new half moved by."""
        before = self.parameter.detach().clone()
        half = torch.randn(half_shape(self.axis), generator=self._generator) if grad is None else grad
        self.parameter.grad = self._twice(half)
        self.optimizer.step(1.0, [new_ratio])
        return halves(self.parameter.detach() - before, self.axis)

    @property
    def distance(self) -> float:
        """|old - new| / |old|; exactly zero for halves that are equal bit for bit."""
        old, new = halves(self.parameter, self.axis)
        return relative(new, old)


@KINDS
@AXES
def test_twins_with_equal_state_never_part(config, axis):
    twins = Twins(config, axis, state="equal")
    for _ in range(100):
        twins.step()
    assert twins.distance == 0.0

    # With its own state, the new one leaves at once; so it does with its own learning rate, but more slowly.
    unlocked, faster = Twins(config, axis, state="new"), Twins(config, axis, state="equal")
    unlocked.step()
    faster.step()
    assert faster.distance == 0.0, "the rates are equal still"
    faster.step(new_ratio=1.01)
    assert unlocked.distance > 1e-3
    assert 0 < faster.distance < unlocked.distance / 10


@pytest.mark.parametrize("new_ratio", [1.0, 1.3])
def test_first_adamw_update_of_a_new_entry(new_ratio):
    config = ADAMW.model_copy(update={"weight_decay": 0.0})
    _, new = Twins(config, 1, state="new", step=10_000).step(new_ratio)
    # (1 - b1) g / sqrt((1 - b2) g^2), the counter being far past bias correction.
    size = 0.1 / math.sqrt(0.05)
    assert size == pytest.approx(0.447, abs=3e-4)
    torch.testing.assert_close(new.abs(), torch.full(SHAPE, size * new_ratio * LR), rtol=1e-4, atol=0)
    # Negative control: a counter that starts anew makes it a whole step.
    _, fresh = Twins(config, 1, state="new", step=0).step(new_ratio)
    torch.testing.assert_close(fresh.abs(), torch.full(SHAPE, new_ratio * LR), rtol=1e-4, atol=0)


@KINDS
def test_decay_goes_by_the_rate_of_the_entry(config):
    twins, lr = Twins(config, 1, state="new"), config.muon.lr if config.kind == "muon" else config.lr
    expected = halves(twins.parameter.clone(), 1)[1]
    start = expected.clone()
    for step in range(10):
        ratio = 1.3 - step / 20
        twins.step(ratio, grad=torch.zeros(SHAPE))
        expected = expected * (1 - ratio * lr * DECAY)
    old, new = halves(twins.parameter, 1)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)
    # Negative controls: the old entries' rate gives another value; under AdamW they move along their state, too, while
    # a matrix without a gradient has no update under Muon.
    of_old_rate = start * (1 - lr * DECAY) ** 10
    assert relative(of_old_rate, expected) > 5e-4
    assert (relative(old, of_old_rate) > 1e-2) is (config.kind == "adamw")


@AXES
def test_orthogonalised_twins_share_the_norm(axis):
    half = torch.randn(half_shape(axis), generator=torch.Generator().manual_seed(1))
    both = newton_schulz(torch.cat([half, half], dim=axis)[None], 5, torch.float32)[0]
    old, new = halves(both, axis)
    alone = newton_schulz(half[None], 5, torch.float32)[0]
    assert torch.equal(old, new)
    assert float(old.norm() / alone.norm()) == pytest.approx(math.sqrt(0.5), rel=1e-4)
    # Negative control: with one half empty the other is as if alone.
    lone, empty = halves(newton_schulz(torch.cat([half, 0 * half], dim=axis)[None], 5, torch.float32)[0], axis)
    assert float(lone.norm() / alone.norm()) == pytest.approx(1, rel=1e-4)
    assert not empty.any()


@AXES
def test_new_momentum_catches_up(axis):
    config = MUON.model_copy(update={"weight_decay": 0.0})
    twins = Twins(config, axis, state="new")
    # As large as momentum of random gradients is in the long run: 1 / sqrt(1 - 0.95^2) of theirs.
    (momentum,) = (halves(entry.data, axis)[0] for entry in twins.optimizer.named_state())
    momentum.copy_(torch.randn(half_shape(axis), generator=torch.Generator().manual_seed(2)) / math.sqrt(1 - 0.95**2))
    ratios = []
    for _ in range(60):
        old, new = twins.step()
        ratios.append(float(new.norm() / old.norm()))
    assert twins.distance > 1e-3
    assert ratios[0] < 0.9
    assert ratios[-1] == pytest.approx(1, abs=0.02)
