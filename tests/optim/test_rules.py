"""Update rules by replay of one gradient sequence: against torch.optim and slow fp64 references."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.model.logical import LogicalTensor
from pretrain.optim.adam import adamw_
from pretrain.optim.matrices import split_matrices
from pretrain.optim.muon import muon_scale, orthogonalise
from pretrain.optim.sharded import ShardedOptimizer
from tests.kernels.test_newton_schulz import reference as polar_reference
from tests.optim.build import MOE, Layout, make_groups, make_shards, set_grads
from tests.optim.replay import DECAY, LR, SHAPES, STEPS, gradients, our_replay, relative, start, torch_replay


def adamw_replay(eps_inside: bool = False) -> list[torch.Tensor]:
    """AdamW in fp64, written from the formula; `eps_inside` puts eps under the root."""
    b1, b2, eps = 0.9, 0.95, 1e-3
    params = [p.double() for p in start()]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t, grads in enumerate(gradients(), start=1):
        for i, grad in enumerate(grads):
            g = grad.double()
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            mean, var = m[i] / (1 - b1**t), v[i] / (1 - b2**t)
            denominator = (var + eps).sqrt() if eps_inside else var.sqrt() + eps
            params[i] = params[i] - LR * DECAY * params[i] - LR * mean / denominator
    return params


def test_adamw_is_torch_and_the_reference():
    config = OptimConfig(lr=LR, weight_decay=DECAY, eps=1e-3, clip_grad=0)
    ours = our_replay(config)
    theirs = torch_replay(
        lambda params: torch.optim.AdamW(
            params, lr=LR, betas=(0.9, 0.95), eps=1e-3, weight_decay=DECAY, foreach=False, fused=False
        )
    )
    for mine, torchs, exact, wrong in zip(ours, theirs, adamw_replay(), adamw_replay(eps_inside=True), strict=True):
        assert relative(mine, torchs) < 1e-6
        assert relative(mine, exact) < STEPS * 2**-24  # one fp32 rounding of the weights a step
        assert relative(mine, wrong) > 1e-5


def test_adamw_bias_correction_counts_from_one():
    # With a constant gradient, the first update is lr * sign(g) whatever the betas are.
    p, g = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, -4.0])
    keys = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 0.0, "weight_decay": 0.0}
    adamw_([p], [g], [torch.zeros(4)], [torch.zeros(4)], step=1, **keys)
    torch.testing.assert_close(p, -0.1 * g.sign())
    later = torch.zeros(4)
    adamw_([later], [g], [torch.zeros(4)], [torch.zeros(4)], step=100, **keys)
    # A new entry under an old counter: (1 - b1) / sqrt(1 - b2) = 0.447 of it.
    torch.testing.assert_close(later, -0.0447 * g.sign(), rtol=1e-2, atol=0)


def muon_config(dtype: str, scale: str, **keys) -> OptimConfig:
    muon = MuonConfig(newton_schulz_dtype=dtype, scale=scale, **keys)
    return OptimConfig(kind="muon", lr=LR, weight_decay=DECAY, clip_grad=0, muon=muon)


MODES = [("moonshot", "match_rms_adamw"), ("keller_jordan", "original")]


@pytest.mark.parametrize(("ours_mode", "torch_mode"), MODES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_bf16_is_torch(ours_mode, torch_mode, nesterov):
    ours = our_replay(muon_config("bfloat16", ours_mode, nesterov=nesterov))
    theirs, other = (
        torch_replay(
            lambda params, n=n: torch.optim.Muon(
                params, lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=n, adjust_lr_fn=torch_mode
            )
        )
        for n in (nesterov, not nesterov)
    )
    for mine, torchs, wrong in zip(ours, theirs, other, strict=True):
        # Two ways to round to bf16 (ours scales to unit norm before, torch after): each 2e-4 off the fp64 reference.
        assert relative(mine, torchs) < 1e-3
        assert relative(mine, wrong) > 2e-3


def muon_reference(scale) -> list[torch.Tensor]:
    """Muon in fp64 with momentum as an average (same direction) and the polar factor by SVD."""
    mu = 0.95
    params = [p.double() for p in start()]
    average = [torch.zeros_like(p) for p in params]
    for grads in gradients():
        for i, grad in enumerate(grads):
            average[i] = mu * average[i] + (1 - mu) * grad.double()
            direction = (1 - mu) * grad.double() + mu * average[i]
            params[i] = params[i] * (1 - LR * DECAY) - LR * scale(*SHAPES[i]) * polar_reference(direction)
    return params


def test_muon_fp32_is_the_fp64_reference():
    moonshot = muon_reference(lambda out, in_: 0.2 * math.sqrt(max(out, in_)))
    keller = muon_reference(lambda out, in_: math.sqrt(max(1, out / in_)))
    for mine, exact, wrong in zip(our_replay(muon_config("float32", "moonshot")), moonshot, keller, strict=True):
        assert relative(mine, exact) < 5e-6
        assert relative(mine, wrong) > 1e-3
    for mine, exact in zip(our_replay(muon_config("float32", "keller_jordan")), keller, strict=True):
        assert relative(mine, exact) < 5e-6


def test_scales():
    # A square matrix of an unlucky draw has singular values too small to be lifted in five steps.
    generator = torch.Generator().manual_seed(0)
    for out, in_ in [(64, 64), (64, 256), (256, 64)]:
        assert muon_scale("moonshot", out, in_) == pytest.approx(0.2 * math.sqrt(max(out, in_)))
        logical = LogicalTensor("m", ("hidden", "ffn"), (out, in_), "matrix", {})
        update = orthogonalise(logical, torch.randn(out, in_, generator=generator), MuonConfig())
        # AdamW's update RMS; Keller Jordan's coefficients leave it up to 15 % off.
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)
    assert muon_scale("keller_jordan", 256, 64) == 2.0
    assert muon_scale("keller_jordan", 64, 256) == 1.0
    # lr_KJ = 0.2 sqrt(d) lr_Moonshot for a square matrix.
    assert muon_scale("moonshot", 1024, 1024) / muon_scale("keller_jordan", 1024, 1024) == pytest.approx(6.4)
    with pytest.raises(AssertionError):
        muon_scale("other", 2, 2)


def model_optimizer(config: OptimConfig, dtype: torch.dtype = torch.float32):
    shards = make_shards(MOE, Layout(), dtype=dtype)
    return shards, ShardedOptimizer(shards, config, make_groups(Layout()))


@pytest.mark.parametrize("suffix", ["linear_qkv.weight", "experts.linear_fc1.weight"])
def test_fused_tensors_are_separate_matrices(suffix):
    shards, optimizer = model_optimizer(muon_config("float32", "moonshot"))
    shard = next(s for s in shards if s.key.endswith(suffix))
    before = shard.view().detach().clone()
    set_grads(shards, "0")
    grad = shard.view(shard.tensor.main_grad).clone()
    optimizer.step(1.0)

    moved = split_matrices(shard.logical, (before * (1 - LR * DECAY) - shard.view().detach()) / LR)
    for update, direction in zip(moved, split_matrices(shard.logical, grad), strict=True):
        for one, g in zip(update, direction, strict=True):
            expected = 0.2 * math.sqrt(max(g.shape)) * polar_reference(g)
            assert relative(one, expected) < 1e-4  # the update is a difference of weights 1e2 times its size
    fused = polar_reference(grad.reshape(-1, grad.shape[-1]))
    for update, direction in zip(moved, split_matrices(shard.logical, fused.view(grad.shape)), strict=True):
        unit = update / update.norm()
        assert relative(unit, direction / direction.norm()) > 0.1, "one fused matrix is something else"


def test_expert_without_tokens():
    shards, optimizer = model_optimizer(muon_config("float32", "moonshot"))
    shard = next(s for s in shards if s.key.endswith("experts.linear_fc2.weight"))
    idle, before = 2, shard.view().detach().clone()
    set_grads(shards, "0")
    shard.tensor.main_grad[idle] = 0
    optimizer.step(1.0)
    # Never had a token: decay only. The others move.
    assert torch.equal(shard.view()[idle], before[idle] * (1 - LR * DECAY))
    assert relative(shard.view()[0], before[0] * (1 - LR * DECAY)) > 1e-3

    momentum = {s.key: s.data for s in optimizer.named_state()}[f"optimizer.momentum.{shard.key}"]
    set_grads(shards, "1")
    optimizer.step(1.0)
    kept, middle = momentum[idle].clone(), shard.view().detach().clone()
    set_grads(shards, "2")
    shard.tensor.main_grad[idle] = 0
    optimizer.step(1.0)
    # Had tokens before: momentum fades, and there is no step along it.
    torch.testing.assert_close(momentum[idle], 0.95 * kept)
    assert torch.equal(shard.view()[idle], middle[idle] * (1 - LR * DECAY))
    # Negative control: one entry of gradient, however small, and the step along the momentum has full size.
    middle = shard.view().detach().clone()
    set_grads(shards, "3")
    shard.tensor.main_grad[idle] = 0
    shard.tensor.main_grad[idle].view(-1)[0] = 1e-20
    optimizer.step(1.0)
    expected = LR * 0.2 * math.sqrt(32) * polar_reference(kept)
    assert relative(middle[idle] * (1 - LR * DECAY) - shard.view()[idle], expected) < 1e-4


@pytest.mark.parametrize("kind", ["muon", "scion", "muonh"])
def test_clipping_leaves_orthogonalised_directions_alone(kind):
    outcomes = {}
    for clip in (0.5, 0.25):
        shards, optimizer = model_optimizer(OptimConfig.model_validate({"kind": kind, "clip_grad": clip}))
        for step in range(3):
            set_grads(shards, str(step))
            assert optimizer.step(1.0).clipped
        outcomes[clip] = {s.key: s.tensor.detach().clone() for s in shards}
        outcomes[clip, "state"] = {s.key: s.data.clone() for s in optimizer.named_state()}
    for key, value in outcomes[0.5].items():
        if "linear_" in key:
            assert relative(outcomes[0.25][key], value) < 1e-6
    # The averages that the other rules divide by, and those that are orthogonalised, are of clipped gradients.
    for key, value in outcomes[0.5, "state"].items():
        if "radius" not in key:
            half = outcomes[0.25, "state"][key]
            assert relative(half * (4 if "exp_avg_sq" in key else 2), value) < 1e-3, key
            assert relative(half, value) > 0.4, key
