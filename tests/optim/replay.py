"""Replay: one sequence of random gradients, whatever the weights are, through optimizers of ours and of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pretrain.config.optim import OptimConfig
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.sharded import ShardedOptimizer
from tests.optim.build import Layout, full_value, make_groups

SHAPES = [(32, 32), (24, 48), (48, 24)]
STEPS = 60
LR, DECAY = 1e-3, 0.1


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def plain_matrix(i: int) -> LogicalTensor:
    """A hidden matrix [out, in] of the i-th of SHAPES."""
    return LogicalTensor(f"m{i}", ("ffn", "hidden"), SHAPES[i], "matrix", {}, fan_in=("hidden",))


MATRICES = [plain_matrix(i) for i in range(len(SHAPES))]


def start(tensors: Sequence[LogicalTensor] = MATRICES) -> list[torch.Tensor]:
    """Weights before the first step."""
    return [full_value(tensor, "init", 0.1) for tensor in tensors]


def gradients(tensors: Sequence[LogicalTensor] = MATRICES, *, steps: int = STEPS, size: float = 1.0):
    """The gradients of every step."""
    return [[full_value(tensor, f"grad {step}", size) for tensor in tensors] for step in range(steps)]


def torch_replay(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    tensors: Sequence[LogicalTensor] = MATRICES,
    *,
    steps: int = STEPS,
    size: float = 1.0,
) -> list[torch.Tensor]:
    """Weights after the gradient sequence under a torch optimizer."""
    params = [torch.nn.Parameter(p) for p in start(tensors)]
    optimizer = make(params)
    for grads in gradients(tensors, steps=steps, size=size):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params]


def whole_shards(tensors: Sequence[LogicalTensor]) -> list[Shard]:
    """Unsharded parameters of the shape of their logical tensors."""
    return [
        Shard(tensor, (0,) * len(tensor.shape), tensor.shape, torch.nn.Parameter(value), (0, 0, 0))
        for tensor, value in zip(tensors, start(tensors), strict=True)
    ]


def our_run(
    config: OptimConfig, tensors: Sequence[LogicalTensor] = MATRICES, *, steps: int = STEPS, size: float = 1.0
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, states by key) after the gradient sequence under an optimizer of ours."""
    shards = whole_shards(tensors)
    optimizer = ShardedOptimizer(shards, config, make_groups(Layout()))
    for grads in gradients(tensors, steps=steps, size=size):
        for shard, grad in zip(shards, grads, strict=True):
            shard.tensor.grad = grad.clone()
        optimizer.step(1.0)
    return [shard.tensor.detach() for shard in shards], {s.key: s.data for s in optimizer.named_state()}


def our_replay(config: OptimConfig, tensors: Sequence[LogicalTensor] = MATRICES, **keys) -> list[torch.Tensor]:
    """The weights of `our_run`."""
    return our_run(config, tensors, **keys)[0]
