"""Update rules beyond AdamW and Muon by replay of one gradient sequence: other libraries, and slow fp64 references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch

from pretrain.config.optim import OptimConfig
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.matrices import split_matrices
from pretrain.optim.sharded import ShardedOptimizer
from tests.kernels.test_newton_schulz import reference as polar_reference
from tests.optim.build import MOE, Layout, make_groups
from tests.optim.replay import (
    DECAY,
    LR,
    MATRICES,
    SHAPES,
    STEPS,
    gradients,
    our_replay,
    our_run,
    relative,
    start,
    torch_replay,
    whole_shards,
)

B1, B2, EPS = 0.9, 0.95, 1e-10
# Of a reference in fp64: one fp32 rounding of the weights a step.
ROUNDING = STEPS * 2**-24


def config_of(kind: str, **keys: Any) -> OptimConfig:
    values = {"lr": LR, "weight_decay": DECAY, "beta1": B1, "beta2": B2, "eps": EPS, "clip_grad": 0.0} | keys
    unread = OptimConfig.model_validate({"kind": kind}).unread()[""]
    return OptimConfig.model_validate({"kind": kind} | {key: values[key] for key in values if key not in unread})


# Other libraries.


def nadam(momentum_decay: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: torch.optim.NAdam(
        params,
        lr=LR,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=DECAY,
        momentum_decay=momentum_decay,
        decoupled_weight_decay=True,
        foreach=False,
    )


def test_nadamw_is_torchs_without_its_momentum_schedule():
    ours, theirs, default = our_replay(config_of("nadamw")), torch_replay(nadam(1e6)), torch_replay(nadam(4e-3))
    moved = [mine - before for mine, before in zip(ours, start(), strict=True)]
    for mine, torchs, wrong, change in zip(ours, theirs, default, moved, strict=True):
        assert relative(mine, torchs) < 1e-6
        assert (mine - wrong).norm() > 0.01 * change.norm()


def test_lion_is_pytorch_optimizers():
    ours = our_replay(config_of("lion"))
    theirs, swapped = (
        torch_replay(lambda params, b=b: pytorch_optimizer.Lion(params, lr=LR, betas=b, weight_decay=DECAY))
        for b in ((B1, B2), (B2, B1))
    )
    for mine, other, wrong in zip(ours, theirs, swapped, strict=True):
        assert relative(mine, other) < 1e-6
        assert relative(mine, wrong) > 1e-3


def mars(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return pytorch_optimizer.MARS(params, lr=LR, betas=(B1, B2), gamma=0.05, eps=EPS, weight_decay=DECAY)


@pytest.mark.parametrize("tensor", MATRICES, ids=lambda tensor: str(tensor.shape))
def test_mars_is_pytorch_optimizers_which_clips_each_tensor(tensor):
    """One tensor alone: then the global norm is its own. With gradients so small that nothing is clipped, too."""
    for size, clip in ((1.0, 1.0), (0.01, 0.0)):
        (mine,) = our_replay(config_of("mars", mars={"gamma": 0.05}, clip_grad=clip), [tensor], size=size)
        (other,) = torch_replay(mars, [tensor], size=size)
        assert relative(mine, other) < 1e-6
    # Negative control: the gradient is not clipped before it is corrected, which is what clips (a step's size) here.
    (without,) = our_replay(config_of("mars", mars={"gamma": 0.0}, clip_grad=1.0), [tensor])
    (other,) = torch_replay(mars, [tensor])
    assert relative(without, other) > 1e-3


def test_mars_clips_all_tensors_by_one_norm():
    ours = our_replay(config_of("mars", mars={"gamma": 0.05}, clip_grad=1.0))
    for mine, exact, other in zip(ours, mars_reference(clip=1.0), torch_replay(mars), strict=True):
        assert relative(mine, exact) < ROUNDING
        assert relative(mine, other) > 2e-4  # each tensor clipped alone is another rule


def mars_reference(clip: float) -> list[torch.Tensor]:
    weights, previous = [p.double() for p in start()], [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    m, v = ([torch.zeros(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2))
    for t, grads in enumerate(gradients(), start=1):
        exact = [grad.double() for grad in grads]
        corrected = [g + 0.05 * B1 / (1 - B1) * (g - old) for g, old in zip(exact, previous, strict=True)]
        previous = exact
        norm = math.sqrt(sum(float(c.square().sum()) for c in corrected))
        for i, whole in enumerate(corrected):
            c = whole * min(1.0, clip / norm)
            m[i], v[i] = B1 * m[i] + (1 - B1) * c, B2 * v[i] + (1 - B2) * c**2
            u = m[i] / (1 - B1**t) / ((v[i] / (1 - B2**t)).sqrt() + EPS)
            weights[i] = weights[i] * (1 - LR * DECAY) - LR * u
    return weights


HEADS = LogicalTensor(
    "qkv", ("kv_group", "qkv_slot", "head_dim", "hidden"), (4, 3, 6, 24), "matrix", {}, None, ("hidden",)
)


def test_adam_mini_of_queries_and_keys_is_pytorch_optimizers():
    """It has the same blocks for these alone: elsewhere it takes one number for a whole tensor."""
    (mine,) = our_replay(config_of("adam_mini"), [HEADS])

    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for slot, name in enumerate(("q_proj", "k_proj")):
                layer = torch.nn.Linear(24, 24, bias=False)
                layer.weight.data = start([HEADS])[0][:, slot].reshape(24, 24)
                setattr(self, name, layer)

    model = Projections()
    theirs = pytorch_optimizer.AdamMini(
        model, lr=LR, betas=(B1, B2), weight_decay=DECAY, eps=EPS, num_embeds=24, num_heads=4
    )
    for (grad,) in gradients([HEADS]):
        model.q_proj.weight.grad, model.k_proj.weight.grad = (grad[:, slot].reshape(24, 24) for slot in (0, 1))
        theirs.step()
    for slot, layer in enumerate((model.q_proj, model.k_proj)):
        assert relative(mine[:, slot].reshape(24, 24), layer.weight) < 1e-6
    (other,) = our_replay(config_of("adamw"), [HEADS])
    assert relative(mine, other) > 1e-3


# Slow references.

Direction = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], int], torch.Tensor]
"""(weight, gradient, state, step) -> update, of one matrix in fp64; keeps its state in the dictionary."""


def reference(tensor: LogicalTensor, direction: Direction, *, steps: int = 60, lr: float = LR) -> list[torch.Tensor]:
    """The matrices of a tensor, each moved on its own, in the order of `split_matrices`."""

    def apart(value: torch.Tensor) -> list[torch.Tensor]:
        return [matrix for batch in split_matrices(tensor, value.double()) for matrix in batch]

    weights = apart(start([tensor])[0])
    memory: list[dict[str, torch.Tensor]] = [{} for _ in weights]
    for t, (grad,) in enumerate(gradients([tensor], steps=steps), start=1):
        for i, g in enumerate(apart(grad)):
            weights[i] = weights[i] * (1 - lr * DECAY) - lr * direction(weights[i], g, memory[i], t)
    return weights


def assert_is(
    tensor: LogicalTensor, config: OptimConfig, right: Direction, wrong: Direction, *, tolerance: float = ROUNDING
) -> None:
    (weights,) = our_replay(config, [tensor])
    mine = [matrix for batch in split_matrices(tensor, weights) for matrix in batch]
    for matrix, exact in zip(mine, reference(tensor, right), strict=True):
        assert relative(matrix, exact) < tolerance
    off = [relative(matrix, other) for matrix, other in zip(mine, reference(tensor, wrong), strict=True)]
    assert min(off) > 20 * tolerance, "another rule shows"


def moments(g: torch.Tensor, state: dict[str, torch.Tensor], t: int, squares: torch.Tensor | None = None):
    """(mhat, sqrt(vhat) + eps)"""
    squares = g * g if squares is None else squares
    state["m"] = B1 * state.get("m", 0) + (1 - B1) * g
    state["v"] = B2 * state.get("v", 0) + (1 - B2) * squares
    return state["m"] / (1 - B1**t), (state["v"] / (1 - B2**t)).sqrt() + EPS


def adam(weight, g, state, t):
    mean, root = moments(g, state, t)
    return mean / root


def cautious(weight, g, state, t):
    u = adam(weight, g, state, t)
    mask = (u * g > 0).double()
    return u * mask / (mask.mean() + 1e-8)


def masked(weight, g, state, t):
    u = adam(weight, g, state, t)
    return u * (u * g > 0)


EXPERTS = next(t for t in logical_tensors(MOE) if t.key.endswith("experts.linear_fc1.weight"))
QKV = next(t for t in logical_tensors(MOE) if t.key.endswith("0.self_attention.linear_qkv.weight"))
STACKED = pytest.mark.parametrize("tensor", [EXPERTS, QKV], ids=["experts", "qkv"])


@STACKED
def test_cautious_masks_and_scales_every_matrix(tensor):
    assert_is(tensor, config_of("cautious"), cautious, masked)


def scion(weight, g, state, t, *, steps=10):
    state["m"] = 0.95 * state.get("m", 0) + 0.05 * g
    return math.sqrt(max(1.0, g.shape[0] / g.shape[1])) * polar_reference(state["m"], steps)


@STACKED
def test_scion_orthogonalises_the_average_of_every_matrix(tensor):
    config = config_of("scion", scion={"lr": LR})
    # More steps make what is small in fp32 large: five agree to 5e-6.
    assert_is(tensor, config, scion, lambda *rule: scion(*rule, steps=5), tolerance=2e-5)


def test_signum_is_scions_rule_for_the_rest():
    def sign(average: float) -> Direction:
        def direction(weight, g, state, t):
            state["m"] = average * state.get("m", 0) + (1 - average) * g
            return state["m"].sign()

        return direction

    head = replace(MATRICES[0], kind="output")
    assert_is(head, config_of("scion"), sign(B1), sign(0.5))


# Adam-mini's blocks.


def mean_squares(tensor: LogicalTensor, g: torch.Tensor) -> torch.Tensor:
    """What Adam-mini averages of g^2, in the shape of g, said for each tensor by its name."""
    squares = g.double() ** 2
    name = tensor.key.split(".")[-2]
    if tensor.kind == "norm":
        return squares
    if name == "linear_qkv":  # [group, slot, channel, hidden]: a head of queries or of keys; a row of values
        heads = squares.mean((2, 3), keepdim=True).expand_as(squares).clone()
        heads[:, -1] = squares[:, -1].mean(-1, keepdim=True)
        return heads
    if name == "linear_proj":  # [hidden, group, head, channel]: a row per hidden channel
        return squares.mean((1, 2, 3), keepdim=True).expand_as(squares)
    return squares.mean(-1, keepdim=True).expand_as(squares)


def test_adam_mini_on_every_tensor_of_a_model():
    tensors = [tensor for tensor in logical_tensors(MOE) if tensor.trainable]
    steps = 12
    weights, states = our_run(config_of("adam_mini"), tensors, steps=steps)
    (sequence,) = [[*zip(*gradients(tensors, steps=steps), strict=True)]]
    for tensor, mine, before, grads in zip(tensors, weights, start(tensors), sequence, strict=True):
        decay = 0.0 if tensor.kind in ("norm", "embedding") else DECAY
        exact, plain = before.double(), before.double()
        state, plain_state = {}, {}
        for t, g in enumerate(grads, start=1):
            mean, root = moments(g.double(), state, t, mean_squares(tensor, g))
            exact = exact * (1 - LR * decay) - LR * mean / root
            plain = plain * (1 - LR * decay) - LR * adam(plain, g.double(), plain_state, t)
        assert relative(mine, exact) < 1e-6, tensor.key
        assert relative(mine, plain) > 1e-3 or tensor.kind == "norm", tensor.key
        assert tensor.kind == "norm" or states[f"optimizer.exp_avg_sq.{tensor.key}"].numel() <= tensor.numel / 16
    heads = states["optimizer.exp_avg_sq.decoder.layers.0.self_attention.linear_qkv.weight"]
    assert heads.shape == (4, 4, 6)
    assert (heads[:, :-1] == heads[:, :-1, :1]).all(), "one number a head of queries and keys"
    assert (heads[:, -1] != heads[:, -1, :1])[:, 1:].all(), "one a row of values"


def test_adam_mini_is_adamw_where_blocks_are_single_weights():
    rows = LogicalTensor("rows", ("ffn", "hidden"), (64, 1), "matrix", {}, None, ("hidden",))
    (mine,), (adamw,) = (our_replay(config_of(kind), [rows]) for kind in ("adam_mini", "adamw"))
    assert relative(mine, adamw) < 1e-6
    (wide,), (other,) = (our_replay(config_of(kind), [MATRICES[0]]) for kind in ("adam_mini", "adamw"))
    assert relative(wide, other) > 1e-3


# Hyperball.


def hyperball(inner: Direction) -> Direction:
    """The step as an update: p - lr u gives the new weight (no decay, which `DECAY` of the reference is undone for)."""

    def direction(weight, g, state, t):
        radius = state.setdefault("radius", weight.norm())
        u = inner(weight, g, state, t)
        moved = weight - LR * radius * u / u.norm()
        return (weight * (1 - LR * DECAY) - moved * radius / moved.norm()) / LR

    return direction


def nesterov(weight, g, state, t):
    state["m"] = 0.95 * state.get("m", 0) + g
    return polar_reference(g + 0.95 * state["m"])


HYPERBALL = pytest.mark.parametrize(("kind", "inner"), [("muonh", nesterov), ("adamh", adam)], ids=["muonh", "adamh"])


@STACKED
@HYPERBALL
def test_hyperball_is_the_reference(tensor, kind, inner):
    assert_is(tensor, config_of(kind, hyperball={"lr": LR}), hyperball(inner), inner)


@HYPERBALL
def test_hyperball_keeps_the_norm_of_every_matrix_for_a_thousand_steps(kind, inner):
    """And turns it by the learning rate a step."""
    small = MOE.model_copy(update={"hidden_size": 8, "expert_ffn_size": 4, "head_dim": 2, "num_experts": 2})
    tensors = [
        t
        for t in logical_tensors(small)
        if t.key.endswith(("1.mlp.experts.linear_fc1.weight", "1.self_attention.linear_qkv.weight"))
    ]
    shards = whole_shards(tensors)
    optimizer = ShardedOptimizer(shards, config_of(kind, hyperball={"lr": 0.02}), make_groups(Layout()))

    def matrices() -> list[torch.Tensor]:
        """In fp64, flat."""
        whole = ((s.logical, s.view().detach().double()) for s in shards)
        return [m.flatten() for logical, box in whole for batch in split_matrices(logical, box) for m in batch]

    first = matrices()
    generator = torch.Generator().manual_seed(1)
    angles: list[float] = []
    for _ in range(1000):
        before = matrices() if len(angles) < 100 else None
        for shard in shards:
            shard.tensor.grad = torch.randn(shard.shape, generator=generator)
        optimizer.step(1.0)
        if before:
            pairs = zip(before, matrices(), strict=True)
            angles += [float(torch.acos((a @ b) / (a.norm() * b.norm()))) for a, b in pairs]
    assert len(first) == 4 + 3
    for start_value, end in zip(first, matrices(), strict=True):
        assert float(end.norm() / start_value.norm()) == pytest.approx(1, abs=1e-6)
        assert relative(end, start_value) > 0.1
    # tan: what of u is along p does not turn it.
    assert sum(angles) / len(angles) == pytest.approx(0.02, rel=0.05)
    assert max(angles) <= math.asin(0.02) + 1e-6
    assert torch.stack([m.norm() for m in first[:4]]).std() > 1e-3, "a norm shared by experts would show"


@HYPERBALL
def test_hyperball_takes_the_norm_of_new_experts_beside_old_ones(kind, inner):
    """As after a handover of experts: those that are new to this rank come without state."""
    tensor = next(t for t in logical_tensors(MOE) if t.key.endswith("experts.linear_fc2.weight"))
    (shard,) = whole_shards([tensor])
    optimizer = ShardedOptimizer([shard], config_of(kind, hyperball={"lr": 0.02}), make_groups(Layout()))
    generator = torch.Generator().manual_seed(1)
    norms = [shard.view().detach().flatten(1).norm(dim=1)]
    for step in range(2):
        if step:
            (radius,) = [slot.state["radius"] for slot in optimizer.slots]
            radius.view(-1)[1] = 0
            shard.view(shard.tensor.data)[1] *= 2
            shard.view(optimizer.slots[0].master)[1].copy_(shard.view()[1])
        shard.tensor.grad = torch.randn(shard.shape, generator=generator)
        optimizer.step(1.0)
        norms.append(shard.view().detach().flatten(1).norm(dim=1))
    expected = norms[0].clone()
    assert torch.allclose(norms[1], expected, rtol=1e-5)
    expected[1] *= 2
    assert torch.allclose(norms[2], expected, rtol=1e-5)


def test_hyperball_entries_have_the_rate_of_their_age():
    """Each entry's step has its own rate; the norm that is restored is that of the whole matrix."""
    half = np.repeat([0, 1], SHAPES[0][0] // 2)
    (shard,) = whole_shards(MATRICES[:1])
    config = config_of("adamh", hyperball={"lr": 0.1})
    vectors = [half, np.zeros(SHAPES[0][1], dtype=np.int64)]
    optimizer = ShardedOptimizer([shard], config, make_groups(Layout()), ages=lambda tensor: vectors)
    before = shard.tensor.detach().double().clone()
    ((grad,),) = gradients(MATRICES[:1], steps=1)
    shard.tensor.grad = grad.clone()
    optimizer.step(0.5, [2.0])
    u = adam(before, grad.double(), {}, 1)

    def stepped(rates: torch.Tensor) -> torch.Tensor:
        moved = before - 0.1 * rates * before.norm() * u / u.norm()
        return moved * before.norm() / moved.norm()

    rates = torch.where(torch.from_numpy(half) == 1, 2.0, 0.5).double()[:, None]
    assert relative(shard.tensor, stepped(rates)) < 1e-6
    assert relative(shard.tensor, stepped(rates.flip(0))) > 1e-2
