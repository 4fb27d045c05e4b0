"""The same model with other experts in training: what a site does when experts change hands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.decentral import DecentralConfig
from pretrain.config.schema import Config
from pretrain.growth.pull import Wanted, pull
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.ages import Ages
from pretrain.optim.schedule import Rewarm
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Mesh


def ages_of_handovers(handovers: Sequence[Collection[int]]) -> Ages | None:
    """Which change of hands an expert has last been through, from 1; 0 for all else. None where nothing changed hands.

    handovers: the experts of each change.
    """
    if not any(handovers):
        return None

    def vectors(tensor: LogicalTensor) -> list[np.ndarray]:
        found = [np.zeros(size, dtype=np.int64) for size in tensor.shape]
        if tensor.is_expert:
            for age, experts in enumerate(handovers, start=1):
                found[tensor.axes.index("expert")][list(experts)] = age
        return found

    return vectors


def rewarms_of_handovers(config: DecentralConfig, handovers: Sequence[Mapping[str, Any]]) -> list[Rewarm | None]:
    """The learning-rate curves of what changed hands: from zero to what it was, where that is asked for.

    handovers: of `TrainState.decentral`.
    """
    steps = config.reown_rewarm_steps
    return [
        Rewarm(step=entry["step"], ratio=1.0, steps=steps, start=0.0, all_entries=False) if steps else None
        for entry in handovers
    ]


def absences(config: DecentralConfig, done: Mapping[str, Any], members: Collection[int]) -> dict[str, Any]:
    """`missed` and `dropped` of `TrainState.decentral` after a round of these members. done: before it."""
    absent = [site for site in range(config.sites) if site not in members]
    missed = {str(site): done["missed"].get(str(site), 0) + 1 for site in absent}
    limit = config.reown_after_rounds
    return {"missed": missed, "dropped": [site for site in absent if limit and missed[str(site)] >= limit]}


@dataclass
class Held:
    """A model as it was, without its gradients. Emptied when another one is filled from it."""

    weights: list[Shard]
    masters_and_states: list[ShardedTensor]
    trained: Collection[int] | None
    """Its experts in training; None: all."""
    optimizer_state: Mapping[str, Any]


def with_other_experts(
    config: Config, mesh: Mesh, old: Held, *, trained: Collection[int] | None, ages: Ages | None, ranks: Ranks
) -> tuple[Engine, ShardedOptimizer]:
    """Model and optimizer anew, on the same layout, with the experts `trained` (None: all) in training. Collective.

    Weights stay; what was trained and still is keeps its master and state; what is new to training starts with fresh
    ones. The caller should hold nothing else of the old model: its memory serves the new gradients.
    """
    made: list[ShardedOptimizer] = []
    kept = None if old.trained is None else frozenset(old.trained)

    def fill(shards: list[Shard]) -> None:
        by_place = {place: values for shard in old.weights for place, values in _parts(shard)}
        for shard in shards:
            for place, values in _parts(shard):
                values.copy_(by_place[place])
        optimizer = ShardedOptimizer(shards, config.optim, mesh.groups, ages=ages)
        expert_keys = {shard.key for shard in shards if shard.logical.is_expert}
        wanted = [
            box
            for tensor in optimizer.whole_state()
            for box in _still_trained(tensor, kept if split_state_key(tensor.key)[1] in expert_keys else None)
        ]
        pull(wanted, old.masters_and_states, device=mesh.device, ranks=ranks)
        old.weights.clear()
        old.masters_and_states.clear()
        optimizer.load_state_dict({**old.optimizer_state})
        optimizer.load_finished()
        made.append(optimizer)

    engine = build_engine(config, mesh, fill=fill, trained=trained)
    return engine, made[0]


def _parts(shard: Shard) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
    """Views of the weights by their place: expert by expert, all else in one."""
    values = shard.view().detach()
    if shard.logical.is_expert:
        yield from (((shard.key, shard.offset[0] + i), row) for i, row in enumerate(values.unbind()))
    else:
        yield (shard.key, 0), values


def _still_trained(tensor: ShardedTensor, kept: Collection[int] | None) -> Iterator[Wanted]:
    """The boxes of a new master or state that had been there before: all of it, or of the experts `kept`."""
    offset, shape = tuple(tensor.global_offset), tuple(tensor.local_shape)
    if kept is None:
        yield Wanted(tensor.key, offset, shape, _into(tensor.data, offset))
        return
    for i in range(shape[0]):
        if offset[0] + i in kept:
            start = (offset[0] + i, *offset[1:])
            yield Wanted(tensor.key, start, (1, *shape[1:]), _into(tensor.data[i : i + 1], start))


def _into(box: torch.Tensor, start: tuple[int, ...]) -> Callable[[tuple[int, ...], torch.Tensor], None]:
    """Puts pieces of a box in their places."""

    def place(offset: tuple[int, ...], piece: torch.Tensor) -> None:
        where = tuple(slice(o - s, o - s + n) for o, s, n in zip(offset, start, piece.shape, strict=True))
        box[where].copy_(piece)

    return place
