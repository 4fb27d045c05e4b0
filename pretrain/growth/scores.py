"""Utility of experts: how large their gradients are in the steps before a growth that copies the most useful ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pretrain.config.growth import UtilityConfig
from pretrain.config.schema import Config
from pretrain.config.stages import growth_step
from pretrain.model.shards import Shard

Scores = dict[str, list[float]]
"""MoE layer -> sum over steps of the squared gradient norm of each expert. JSON, part of a run's state."""


def utility_due(config: Config, done: int, step: int) -> UtilityConfig | None:
    """What the growth after the `done` first ones asks for, when `step` (from 1) is one of the steps it goes by."""
    if done == len(config.growth):
        return None
    growth = config.growth[done]
    utility = growth.experts.utility if growth.experts else None
    at = growth_step(config, growth)
    return utility if utility and at - utility.steps < step <= at else None


def add_scores(scores: Scores, shards: Sequence[Shard], num_experts: int) -> None:
    """Add the squared gradient norm of every expert's weights (Expert Upcycling's ||g||^2). Collective.

    Gradients that are not finite, for which the optimizer skips the step, are passed over.
    """
    layers = sorted(scores, key=int)
    norms = torch.zeros(len(layers), num_experts, dtype=torch.float64, device=shards[0].tensor.device)
    for shard in shards:
        if shard.logical.is_expert and shard.trainable and shard.replica_id == (0, 0, 0):
            gradient = shard.view(shard.tensor.main_grad).flatten(1)  # type: ignore[attr-defined]
            squares = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64).square()
            first = shard.offset[0]
            norms[layers.index(str(shard.logical.layer)), first : first + shard.shape[0]] += squares
    dist.all_reduce(norms)
    if not norms.isfinite().all():
        return
    for layer, row in zip(layers, norms.tolist(), strict=True):
        scores[layer] = [old + new for old, new in zip(scores[layer], row, strict=True)]


def no_scores(moe_layers: Sequence[int], num_experts: int) -> Scores:
    """Where adding begins."""
    return {str(layer): [0.0] * num_experts for layer in moe_layers}
