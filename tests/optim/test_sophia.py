"""Sophia: its rule by replay, its estimate of the Hessian on functions that have a known one, and in real runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch

from pretrain.config.optim import OptimConfig, SophiaConfig
from pretrain.config.schema import Config
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim import sophia
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel import probe
from pretrain.parallel.probe import probe_passes
from pretrain.parallel.routing_stats import aux_losses, expert_load, reset_routing_stats, selection_bias
from tests.helpers.distributed import run_ranks
from tests.helpers.growing_runs import checkpoint, forget_after, tensor_bytes
from tests.helpers.growth import TINY, Model, mesh_of_one, new_model
from tests.helpers.layouts import Box, assemble, engine_of, microbatches, single_process
from tests.helpers.runs import events, make_corpus, rows, tiny_config
from tests.optim.build import Layout, make_groups
from tests.parallel.cases import configuration

GAMMA, LR, DECAY, EPS = 0.0125, 1e-3, 0.1, 1e-7


def config(**keys: Any) -> OptimConfig:
    keys = {"lr": LR, "weight_decay": DECAY, "clip_grad": 0.0, "eps": EPS, "beta2": 0.0} | keys
    return OptimConfig.model_validate({"kind": "sophia", "sophia": {"gamma": GAMMA, "every_steps": 1}} | keys)


def one_matrix(values: torch.Tensor, optim: OptimConfig) -> tuple[Shard, ShardedOptimizer]:
    """The optimizer of a matrix [D, F], or of a stack of them [E, D, F]."""
    shape = tuple(values.shape)
    logical = LogicalTensor("m", ("expert", "hidden", "expert_ffn")[-len(shape) :], shape, "matrix", {})
    shard = Shard(logical, (0,) * len(shape), shape, torch.nn.Parameter(values.clone()), (0, 0, 0))
    return shard, ShardedOptimizer([shard], optim, make_groups(Layout()))


def state_of(optimizer: ShardedOptimizer, name: str) -> torch.Tensor:
    (found,) = (entry.data for entry in optimizer.named_state() if entry.key.startswith(f"optimizer.{name}."))
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the rule, given h ---


def replayed(optim: OptimConfig, *, steps: int = 40) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Weights after a fixed sequence of gradients and of h, which also has zeros and negative entries."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 8, generator=generator) for _ in range(steps)]
    hessians = [(40 * torch.randn(6, 8, generator=generator)).relu_().sub_(20) for _ in range(steps)]
    shard, optimizer = one_matrix(torch.ones(6, 8), optim)
    for grad, hessian in zip(grads, hessians, strict=True):
        shard.tensor.grad = grad.clone()
        state_of(optimizer, "hessian").copy_(hessian)
        optimizer.step(1.0)
    return shard.tensor.detach(), grads, hessians


def slow(grads: list[torch.Tensor], hessians: list[torch.Tensor], *, limit: float = 1.0) -> torch.Tensor:
    """Entry by entry in Python's floats."""
    p = torch.ones(6, 8, dtype=torch.float64)
    for i, j in [(i, j) for i in range(6) for j in range(8)]:
        m, w = 0.0, 1.0
        for t, (grad, hessian) in enumerate(zip(grads, hessians, strict=True), start=1):
            m = 0.9 * m + 0.1 * float(grad[i, j])
            u = m / (1 - 0.9**t) / max(GAMMA * float(hessian[i, j]), EPS)
            w = w - LR * DECAY * w - LR * min(max(u, -limit), limit)
        p[i, j] = w
    return p


def test_the_rule_is_the_slow_reference() -> None:
    ours, grads, hessians = replayed(config(beta1=0.9))
    assert relative(ours, slow(grads, hessians)) < 1e-6
    # Negative control: the clip matters, and some entries are not clipped.
    assert relative(ours, slow(grads, hessians, limit=1.5)) > 1e-3
    assert relative(ours, slow(grads, hessians, limit=0.5)) > 1e-3


def test_the_rule_is_that_of_pytorch_optimizer() -> None:
    # Theirs has no bias correction, hence beta1 = 0; gamma is in its learning rate and clip.
    ours, grads, hessians = replayed(config(beta1=0.0))
    theirs = torch.nn.Parameter(torch.ones(6, 8))
    oracle = pytorch_optimizer.SophiaH(
        [theirs], lr=LR / GAMMA, betas=(0.0, 0.0), weight_decay=DECAY * GAMMA, p=GAMMA, eps=EPS / GAMMA
    )
    for grad, hessian in zip(grads, hessians, strict=True):
        theirs.grad = grad.clone()
        oracle.step(hessian=[hessian.clone()])
    assert relative(ours, theirs.detach()) < 1e-6


def test_without_curvature_it_is_the_sign() -> None:
    shard, optimizer = one_matrix(torch.zeros(2, 3), config(weight_decay=0.0))
    shard.tensor.grad = torch.tensor([[1.0, -1e-3, 0.0], [1e-6, -1.0, 2.0]])
    optimizer.step(1.0)
    torch.testing.assert_close(shard.tensor.detach(), -LR * shard.tensor.grad.sign())


# --- the estimate, on a quadratic ---

ENTRIES = 48
UPDATES, COPIES = 50, 40
"""2,000 probes: a stack of equal functions, each with its own draws."""


def quadratic() -> torch.Tensor:
    """A Hessian with a diagonal of 1 to 4 and other entries of either sign."""
    generator = torch.Generator().manual_seed(3)
    coupled = 0.1 * torch.randn(ENTRIES, ENTRIES, generator=generator, dtype=torch.float64)
    return torch.diag(torch.linspace(1, 4, ENTRIES, dtype=torch.float64)) + (coupled + coupled.T).fill_diagonal_(0.0)


def mean_estimate(dtype: torch.dtype) -> torch.Tensor:
    """Mean of 2,000 estimates for w H w / 2, as the optimizer makes them of the entries of a [6, 8] matrix."""
    hessian = quadratic()
    start = torch.randn(COPIES, 6, 8, generator=torch.Generator().manual_seed(4))
    shard, optimizer = one_matrix(start.to(dtype), config())

    def backward() -> None:
        weights = shard.tensor.detach().double().view(COPIES, ENTRIES)
        shard.tensor.main_grad = (weights @ hessian).float().view(COPIES, 6, 8)

    total = torch.zeros(ENTRIES, dtype=torch.float64)
    for _ in range(UPDATES):
        assert optimizer.wants_curvature
        optimizer.estimate_curvature(backward, seed=5)
        total += state_of(optimizer, "hessian").view(COPIES, ENTRIES).mean(dim=0)
        optimizer.step(0.0)
    return total / UPDATES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_of_a_quadratic_average_to_its_diagonal(dtype: torch.dtype) -> None:
    # One probe's z^2 has a standard deviation of sqrt(2): 3.2 % after 2,000.
    assert relative(mean_estimate(dtype), quadratic().diagonal()) < 0.05


@pytest.mark.parametrize("broken", ["all of one sign", "the same every time"])
def test_broken_draws_are_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sophia.draw_normal
    same = broken == "the same every time"
    monkeypatch.setattr(
        sophia,
        "draw_normal",
        lambda seed, key, *args: draw(seed, "", *args) if same else draw(seed, key, *args).abs(),
    )
    assert relative(mean_estimate(torch.float32), quadratic().diagonal()) > 0.1


def test_what_bf16_applied_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # A perturbation below the spacing of bf16 numbers: many weights do not move at all, others by a whole spacing.
    monkeypatch.setattr(sophia, "STEP", {torch.bfloat16: 2.0**-9})
    exact = torch.full((6, 8), 3.0)
    values = torch.linspace(-1, 1, ENTRIES).view(6, 8).bfloat16()
    shard, optimizer = one_matrix(values, config())
    seen: list[torch.Tensor] = []

    def backward() -> None:
        seen.append(shard.tensor.detach().double())
        shard.tensor.main_grad = exact * shard.tensor.detach().float()

    optimizer.estimate_curvature(backward, seed=5)
    move = (seen[0] - seen[1]) / 2
    assert float((move == 0).double().mean()) > 0.3
    estimate = state_of(optimizer, "hessian").double()
    torch.testing.assert_close(estimate, 3.0 * move.square() / move.square().mean(), rtol=1e-5, atol=1e-6)
    assert float(estimate.mean()) == pytest.approx(3.0, rel=1e-5)


def test_weights_are_bit_equal_afterwards_and_bad_gradients_change_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # The smallest entries are lost when something of the perturbation's size is added and taken away.
        values = torch.logspace(-9, 0, ENTRIES).view(6, 8).to(dtype)
        shard, optimizer = one_matrix(values, config())
        shard.tensor.main_grad = torch.ones(6, 8)
        optimizer.step(1.0)
        before = {entry.key: entry.data.clone() for entry in optimizer.whole_state()}
        parameter = shard.tensor.detach().clone()
        seen: list[torch.Tensor] = []

        def backward(bad: float = 0.0, shard: Shard = shard, seen: list[torch.Tensor] = seen) -> None:
            seen.append(shard.tensor.detach().clone())
            shard.tensor.main_grad = shard.tensor.detach().float() + (bad if len(seen) % 2 == 0 else 0.0)

        def moved(optimizer: ShardedOptimizer = optimizer, before: dict[str, torch.Tensor] = before) -> set[str]:
            return {e.key for e in optimizer.whole_state() if not torch.equal(e.data, before[e.key])}

        assert optimizer.estimate_curvature(lambda: backward(math.nan), seed=1).skipped
        assert moved() == set()
        # Negative control: adding a perturbation and taking it away again would not do.
        noise = (seen[0] - seen[1]) / 2
        assert not torch.equal(parameter + noise - noise, parameter)
        assert not optimizer.estimate_curvature(backward, seed=1).skipped
        assert moved() == {"optimizer.hessian.m"}
        assert torch.equal(shard.tensor, parameter)
        assert len(seen) == 4
        assert not any(torch.equal(weights, parameter) for weights in seen)


def test_clipped_share_is_that_of_the_last_update() -> None:
    shard, optimizer = one_matrix(torch.ones(2, 3), config(beta1=0.9))

    def backward() -> None:
        shard.tensor.grad = torch.zeros(2, 3)

    assert optimizer.estimate_curvature(backward, seed=1).clipped_share == 0.0
    state_of(optimizer, "hessian").copy_(torch.tensor([[200.0, 200.0, 0.0], [40.0, -1.0, 200.0]]))
    shard.tensor.grad = torch.tensor([[1.0, -2.4, 0.0], [-1.0, 1e-3, -2.6]])  # gamma h: 2.5, 2.5, eps; 0.5, eps, 2.5
    optimizer.step(1.0)
    assert optimizer.estimate_curvature(backward, seed=1).clipped_share == 0.5


# --- real models ---


def estimate_once(model: Model) -> dict[str, torch.Tensor]:
    """h of every weight after one estimate."""
    with probe_passes(model.engine, list(microbatches(model.config, model.engine.mesh, 5))) as backward:
        model.optimizer.estimate_curvature(backward, seed=1)
    return {key: value.clone() for key, value in model.tensors.items() if ".hessian." in key}


def test_experts_are_chosen_once_and_routers_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {
        "optim.kind": "sophia",
        "optim.beta2": 0.0,
        "model.init_std": 0.05,
        "batch.micro_batch_size": 4,
        "parallel.recompute": "full",
    }

    def estimate(step: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(sophia, "STEP", {torch.float32: step})
        return estimate_once(new_model(mesh, TINY, keys))

    def change(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.tensor([relative(a[key], b[key]) for key in a]).median())

    with mesh_of_one() as mesh:
        # Where the gradient is smooth, half the perturbation finds the same curvature.
        assert change(estimate(2.0**-9), estimate(2.0**-10)) < 0.01
        # Negative control: where experts are chosen anew.
        with monkeypatch.context() as patch:
            patch.setattr(probe._Choices, "begin_again", lambda self: None)
            assert change(estimate(2.0**-9), estimate(2.0**-10)) > 0.1

        keys["model.router.aux_loss"] = 1e-2
        model, twin = (new_model(mesh, TINY, keys) for _ in range(2))
        engine = model.engine
        batch = list(microbatches(model.config, mesh, 5))
        biases = selection_bias(engine, model.config.model)
        estimate_once(model)
        assert torch.equal(selection_bias(engine, model.config.model), biases)
        assert int(expert_load(engine, model.config.model).sum()) == 0
        seen = []
        for one in (model, twin):
            reset_routing_stats(one.engine)
            loss = float(one.engine.forward_backward(iter(batch)))
            load, losses = expert_load(one.engine, one.config.model), aux_losses(one.engine, one.config.model)
            seen.append((loss, load.tolist(), losses, selection_bias(one.engine, one.config.model).tolist()))
            assert int(load.sum()) > 0
        assert seen[0] == seen[1]
        assert all(torch.equal(model.gradients[key], twin.gradients[key]) for key in twin.gradients)


def train_with_estimates(configs: dict[str, Config], seed: int = 1) -> dict[str, tuple[list[Box], list[float]]]:
    """h as boxes and the clipped shares of a short training run on each layout."""
    found = {}
    for name, one in configs.items():
        with engine_of(one) as engine:
            optimizer = ShardedOptimizer(engine.shards, one.optim, engine.mesh.groups)
            shares = []
            for step in range(3):
                batch = list(microbatches(one, engine.mesh, step))
                if optimizer.wants_curvature:
                    with probe_passes(engine, batch) as backward:
                        shares.append(optimizer.estimate_curvature(backward, seed=seed).clipped_share)
                reset_routing_stats(engine)
                engine.forward_backward(iter(batch))
                optimizer.step(1.0)
            state = {entry.key: entry for entry in optimizer.named_state() if ".hessian." in entry.key}
            mine = [
                Box(key.removeprefix("optimizer.hessian."), entry.global_offset, entry.data.clone())
                for key, entry in state.items()
            ]
            found[name] = (mine, shares)
    return found


def test_layouts_find_the_same_curvature() -> None:
    optim = {"kind": "sophia", "lr": 1e-4, "eps": 1e-3, "sophia": SophiaConfig(every_steps=2), "beta2": 0.5}
    names = ["EP2", "ETP2", "PP2 interleaved"]
    single = {"single": configuration("single", "sigmoid", optim=optim)}
    with single_process():
        alone, other = (train_with_estimates(single, seed)["single"] for seed in (1, 2))
    model = single["single"].model
    whole = assemble(model, [alone[0]])
    assert len(alone[1]) == 2
    assert 0 < alone[1][1] < 1
    ranks = run_ranks(train_with_estimates, 2, {name: configuration(name, "sigmoid", optim=optim) for name in names})
    for name in names:
        # A part of h that tensor parallelism or a tied table copies is on several ranks, bit for bit the same.
        found = assemble(model, [rank[name][0] for rank in ranks])
        assert found.keys() == whole.keys()
        errors = {key: relative(value, whole[key]) for key, value in found.items()}
        # Gradients differ in the last bits, and a difference of theirs over 2^-10 of a weight by a thousand times that.
        assert max(errors.values()) < 2e-2, (name, errors)
        assert all(rank[name][1] == pytest.approx(alone[1], abs=2e-3) for rank in ranks)
    # Negative control: other draws.
    assert min(relative(value, whole[key]) for key, value in assemble(model, [other[0]]).items()) > 0.1


def train_all(configs: list[Config]) -> None:
    from pretrain.train import train

    for one in configs:
        train(one)


def test_a_run_estimates_resumes_and_reads_what_others_read(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    optim = {"kind": "sophia", "sophia": {"every_steps": 2}}
    whole = tiny_config(corpus, tmp_path / "whole", optim=optim)
    plain = tiny_config(corpus, tmp_path / "plain", optim={"kind": "lion"})
    run_ranks(train_all, 1, [whole, plain])
    resumed = tiny_config(corpus, tmp_path / "resumed", optim=optim)
    forget_after(whole.run.directory, resumed.run.directory, "step_00000003")
    run_ranks(train_all, 1, [resumed])

    seen = events(whole.run.directory, "curvature")
    assert [event["step"] for event in seen] == [0, 2, 4]
    assert [event["skipped"] for event in seen] == [False] * 3
    assert seen[0]["clipped_share"] == 0.0
    assert all(0 < event["clipped_share"] < 1 for event in seen[1:])
    assert events(resumed.run.directory, "curvature")[-1]["clipped_share"] == seen[-1]["clipped_share"]

    def losses(one: Config) -> list[float]:
        return [row["loss"] for row in rows(one.run.directory, "train")]

    assert losses(resumed) == losses(whole)
    assert tensor_bytes(checkpoint(resumed, "6")) == tensor_bytes(checkpoint(whole, "6"))
    assert tensor_bytes(checkpoint(resumed, "3")) != tensor_bytes(checkpoint(whole, "6"))
    # The first step's row is that of a run whose optimizer looks at its own gradient only.
    first, other = (rows(one.run.directory, "train")[0] for one in (whole, plain))
    assert all(first[name] == other[name] for name in ("tokens", "loss", "grad_norm", "aux_losses", "moe"))
    assert losses(whole)[1] != losses(plain)[1]
