"""The grown model in the place of the old one, in a running job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.schema import Config
from pretrain.config.stages import BUFFER_BYTES
from pretrain.growth.maps import GrowthPoint, ages
from pretrain.growth.pull import Traffic
from pretrain.growth.transplant import transplant
from pretrain.model.shards import Shard
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Mesh


@dataclass
class Grown:
    """The grown model on this rank."""

    engine: Engine
    optimizer: ShardedOptimizer
    traffic: Traffic


def moving_tensors(shards: Sequence[Shard], optimizer: ShardedOptimizer) -> list[ShardedTensor]:
    """What goes from a model to the one it grows into: fp32 weights and their state, and selection biases."""
    return optimizer.whole_state() + [shard.sharded() for shard in shards if not shard.trainable]


def grow_model(
    history: Sequence[GrowthPoint],
    old: list[ShardedTensor],
    stage: Config,
    mesh: Mesh,
    *,
    optimizer_state: Mapping[str, Any],
    ranks: Ranks,
    buffer_bytes: int = BUFFER_BYTES,
) -> Grown:
    """Build the model and optimizer of `stage` on `mesh`, filled by the last growth of `history`. Collective.

    Args:
        old: the old model's `moving_tensors`, on whatever layout. The list is emptied, so that their memory can serve
            the new gradients; the caller should hold nothing else of the old model.
        optimizer_state: `state_dict()` of the old optimizer.
    """
    point = history[-1]
    made: list[tuple[ShardedOptimizer, Traffic]] = []

    def fill(shards: list[Shard]) -> None:
        optimizer = ShardedOptimizer(shards, stage.optim, mesh.groups, ages=ages(history))
        traffic = transplant(
            point,
            old,
            moving_tensors(shards, optimizer),
            optim=stage.optim,
            seed=stage.run.seed,
            device=mesh.device,
            ranks=ranks,
            buffer_bytes=buffer_bytes,
        )
        old.clear()
        keeps_count = point.config.optimizer_state != "reset"
        optimizer.load_state_dict({**optimizer_state} if keeps_count else {**optimizer_state, "step": 0})
        optimizer.load_finished()
        made.append((optimizer, traffic))

    engine = build_engine(stage, mesh, fill=fill)
    ((optimizer, traffic),) = made
    return Grown(engine, optimizer, traffic)
