"""The optimizer on one process."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.errors import CheckpointError
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.routing import route
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key, state_key
from tests.optim.build import KINDS, MOE, Layout, boxes, config_of, make_groups, make_shards, set_grads

ADAMW = OptimConfig(lr=1e-2)
MUON = OptimConfig(kind="muon", lr=1e-2, muon=MuonConfig(lr=2e-2))


def build(config: OptimConfig, dtype: torch.dtype = torch.float32):
    shards = make_shards(MOE, Layout(), dtype=dtype)
    return shards, ShardedOptimizer(shards, config, make_groups(Layout()))


def run(shards, optimizer, steps: range) -> None:
    for step in steps:
        set_grads(shards, str(step))
        optimizer.step(1.0 - step / 20)


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_run_same_bits(config, dtype):
    first, second = build(config, dtype), build(config, dtype)
    for shards, optimizer in (first, second):
        run(shards, optimizer, range(4))
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a.tensor, b.tensor), a.key
    run(*second, range(4, 5))
    assert not torch.equal(first[0][0].tensor, second[0][0].tensor)


def test_only_trainable_tensors_move():
    shards, optimizer = build(ADAMW)
    before = boxes(shards)
    run(shards, optimizer, range(1))
    still = {key for key, value in boxes(shards).items() if torch.equal(value, before[key])}
    assert still == {"decoder.layers.1.mlp.router.expert_bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_all_a_zero_gradient_does(kind):
    config = config_of(kind, weight_decay=0.3)
    shards, optimizer = build(config)
    before = boxes(shards)
    for shard in shards:
        shard.tensor.main_grad = torch.zeros_like(shard.tensor)
    result = optimizer.step(0.5)
    assert result.grad_norm == 0.0
    assert not result.skipped
    for shard in shards:
        if not shard.logical.trainable:
            continue
        keeps_norm = kind in ("muonh", "adamh") and shard.logical.kind in ("matrix", "router", "output")
        decays = shard.logical.kind not in ("embedding", "norm") and not keeps_norm
        expected = before[shard.key] * (1 - 0.5 * route(shard.logical, config).lr * 0.3 * decays)
        torch.testing.assert_close(shard.view().detach(), expected, rtol=2e-7, atol=0, msg=shard.key)
        assert decays != torch.equal(expected, before[shard.key])


# What an expert without tokens does along what is left of its momentum: nothing, or what the rule makes of it.
STILL = ("muon", "scion", "muonh", "adamh", "cautious")


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_without_tokens(kind):
    """It never had any, only some, and again none: finite at all times, and only decay without momentum."""
    shards, optimizer = build(config_of(kind, weight_decay=0.1))
    shard = next(s for s in shards if s.key.endswith("experts.linear_fc1.weight"))
    chosen = route(shard.logical, config_of(kind, weight_decay=0.1))
    idle, decay = 2, 1 - chosen.lr * chosen.weight_decay
    moved = []
    for step in range(12):
        before = shard.view()[idle].detach().clone()
        set_grads(shards, str(step))
        if step < 3 or step > 8:
            shard.view(shard.tensor.main_grad)[idle] = 0
        optimizer.step(1.0)
        assert all(bool(s.tensor.isfinite().all()) for s in shards)
        assert all(bool(s.data.isfinite().all()) for s in optimizer.named_state())
        after = shard.view()[idle].detach()
        moved.append(float((after - before * decay).norm() / before.norm()))
    assert max(moved[:3]) < 1e-6
    assert min(moved[5:9]) > 1e-4
    assert (max(moved[9:]) < 1e-6) == (kind in STILL)
    assert (min(moved[9:]) > 1e-4) == (kind not in STILL)


def test_zero_ratio_changes_nothing_but_state():
    shards, optimizer = build(MUON)
    before = boxes(shards)
    set_grads(shards, "0")
    optimizer.step(0.0)
    assert all(torch.equal(value, before[key]) for key, value in boxes(shards).items())
    assert all(state.data.any() for state in optimizer.named_state())


def test_bf16_parameters_are_rounded_masters():
    shards, optimizer = build(MUON, torch.bfloat16)
    exact, exact_optimizer = build(MUON)
    for shard in exact:  # the same start
        bf16 = next(s for s in shards if s.key == shard.key)
        shard.tensor.data.copy_(bf16.tensor)
    run(shards, optimizer, range(8))
    run(exact, exact_optimizer, range(8))
    masters = {s.key: s.data for s in optimizer.named_state() if s.key.startswith("optimizer.master.")}
    for shard, reference in zip(shards, exact, strict=True):
        if shard.logical.trainable:
            master = masters[f"optimizer.master.{shard.key}"]
            assert torch.equal(master, reference.view()), shard.key
            assert torch.equal(shard.view(), master.bfloat16())
            assert not torch.equal(shard.view().float(), master), "the master holds more than the parameter"
    assert not any("master" in s.key for s in exact_optimizer.named_state())


def test_gradients_may_lie_in_grad():
    with_main, without = build(ADAMW), build(ADAMW)
    run(*with_main, range(1))
    shards, optimizer = without
    set_grads(shards, "0")
    for shard in shards:
        if shard.logical.trainable:
            shard.tensor.grad, shard.tensor.main_grad = shard.tensor.main_grad, None
    optimizer.step(1.0)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(with_main[0], shards, strict=True))
    shards[3].tensor.grad = None
    with pytest.raises(RuntimeError, match=shards[3].key):
        optimizer.step(1.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_gradient_changes_nothing(bad):
    shards, optimizer = build(MUON)
    run(shards, optimizer, range(2))
    weights = boxes(shards)
    state = {s.key: s.data.clone() for s in optimizer.named_state()}
    set_grads(shards, "2")
    shards[-1].tensor.main_grad.view(-1)[7] = bad
    result = optimizer.step(1.0)
    assert result.skipped
    assert not result.clipped
    assert not math.isfinite(result.grad_norm)
    assert optimizer.state_dict()["step"] == 2
    assert all(torch.equal(value, weights[key]) for key, value in boxes(shards).items())
    assert all(torch.equal(s.data, state[s.key]) for s in optimizer.named_state())


def test_norm_is_over_all_trainable_gradients():
    shards, optimizer = build(ADAMW)
    set_grads(shards, "0")
    grads = [s.tensor.main_grad.double() for s in shards if s.logical.trainable]
    expected = float(torch.nn.utils.get_total_norm(grads))
    result = optimizer.step(1.0)
    assert result.grad_norm == pytest.approx(expected, rel=2e-7)
    assert result.clipped


def test_named_state_is_located_and_complete():
    shards, optimizer = build(MUON, torch.bfloat16)
    state = {s.key: s for s in optimizer.named_state()}
    for shard in shards:
        if not shard.logical.trainable:
            assert not any(key.endswith(shard.key) for key in state)
            continue
        names = ("momentum",) if shard.logical.kind == "matrix" else ("exp_avg", "exp_avg_sq")
        for name in ("master", *names):
            entry = state.pop(f"optimizer.{name}.{shard.key}")
            assert entry.global_shape == shard.logical.shape
            assert entry.data.dtype == torch.float32
            assert entry.replica_id == (0, 0, 0)
    assert not state
    numel = {kind: sum(s.tensor.numel() for s in shards if (s.logical.kind == "matrix") == kind) for kind in (0, 1)}
    bias = sum(s.tensor.numel() for s in shards if not s.logical.trainable)
    assert optimizer.state_bytes() == 4 * (3 * (numel[0] - bias) + 2 * numel[1])


# Of a square hidden matrix in square blocks, as the table in the README has it: bytes per weight, masters aside.
STATE_BYTES = {
    **{"adamw": 8, "nadamw": 8, "cautious": 8, "sophia": 8, "mars": 12, "lion": 4, "adam_mini": 4 + 4 / 64},
    **{"muon": 4, "scion": 4, "soap": 24, "kron": 12, "muonh": 4 + 4 / 4096, "adamh": 8 + 4 / 4096},
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_state(kind):
    matrix = LogicalTensor("m", ("ffn", "hidden"), (64, 64), "matrix", {}, fan_in=("hidden",))
    for dtype, masters in ((torch.float32, 0), (torch.bfloat16, 4)):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        config = config_of(kind, routes={})
        optimizer = ShardedOptimizer(
            [Shard(matrix, (0, 0), (64, 64), weight, (0, 0, 0))], config, make_groups(Layout())
        )
        assert optimizer.state_bytes() == weight.numel() * (STATE_BYTES[kind] + masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_state_is_all_a_run_goes_on_with(dtype):
    straight, straight_optimizer = build(MUON, dtype)
    run(straight, straight_optimizer, range(6))

    shards, optimizer = build(MUON, dtype)
    run(shards, optimizer, range(3))
    moved = {entry.key: entry for entry in optimizer.whole_state()}
    weights = {key for key in moved if split_state_key(key)[0] is None}
    assert weights == {shard.key for shard in shards if shard.logical.trainable}
    named = {entry.key: entry for entry in optimizer.named_state()}
    assert set(moved) - weights == {key for key in named if split_state_key(key)[0] != "master"}
    for key, entry in moved.items():
        assert entry.data.dtype == torch.float32, key
        twin = named.get(key) or named.get(state_key("master", key))
        if twin:  # weights of fp32 runs are no state
            assert (entry.global_shape, entry.global_offset) == (twin.global_shape, twin.global_offset)
            assert entry.replica_id == twin.replica_id == (0, 0, 0)
            assert torch.equal(entry.data, twin.data)

    outcomes = {}
    for forgotten in ("", "optimizer.momentum."):
        other, other_optimizer = build(MUON, dtype)
        for shard in other:
            shard.tensor.data.zero_()
        for target in other_optimizer.whole_state():
            if not forgotten or not target.key.startswith(forgotten):
                target.data.copy_(moved[target.key].data)
        other_optimizer.load_state_dict(optimizer.state_dict())
        other_optimizer.load_finished()
        run(other, other_optimizer, range(3, 6))
        outcomes[forgotten] = boxes(other)
    expected = {key: value for key, value in boxes(straight).items() if key in weights}
    assert all(torch.equal(value, outcomes[""][key]) for key, value in expected.items())
    # Negative control: a state left out shows.
    assert not all(torch.equal(value, outcomes["optimizer.momentum."][key]) for key, value in expected.items())


def test_state_keys():
    key = "decoder.layers.3.mlp.experts.linear_fc1.weight"
    assert state_key("exp_avg_sq", key) == f"optimizer.exp_avg_sq.{key}"
    assert split_state_key(state_key("exp_avg_sq", key)) == ("exp_avg_sq", key)
    assert split_state_key(key) == (None, key)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("adamw", torch.float32), ("muonh", torch.float32)]
)
def test_resume_is_as_if_never_stopped(kind, dtype):
    config = config_of(kind)
    straight, straight_optimizer = build(config, dtype)
    run(straight, straight_optimizer, range(6))

    shards, optimizer = build(config, dtype)
    run(shards, optimizer, range(3))
    resumed, resumed_optimizer = build(config, dtype)
    saved = {s.key: s.data.clone() for s in optimizer.named_state()}
    for target in resumed_optimizer.named_state():
        target.data.copy_(saved[target.key])
    if dtype == torch.float32:  # masters are the weights, which are saved as such
        for old, new in zip(shards, resumed, strict=True):
            new.tensor.data.copy_(old.tensor)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed_optimizer.load_finished()
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(shards, resumed, strict=True))
    run(resumed, resumed_optimizer, range(3, 6))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(straight, resumed, strict=True))

    # Negative control: without the moments, the run goes elsewhere.
    forgetful, forgetful_optimizer = build(config, dtype)
    for old, new in zip(shards, forgetful, strict=True):
        new.tensor.data.copy_(old.tensor)
    run(forgetful, forgetful_optimizer, range(3, 6))
    assert not torch.equal(forgetful[0].tensor, straight[0].tensor)


def test_state_of_another_optimizer_is_refused():
    _, optimizer = build(ADAMW)
    assert optimizer.state_dict() == {"kind": "adamw", "step": 0}
    with pytest.raises(CheckpointError, match=r'^optim\.kind = "adamw": .*"muon"'):
        optimizer.load_state_dict({"kind": "muon", "step": 3})


def test_a_box_listed_twice_is_refused():
    shards = make_shards(MOE, Layout())
    with pytest.raises(AssertionError, match="twice"):
        ShardedOptimizer([*shards, shards[0]], ADAMW, make_groups(Layout()))
