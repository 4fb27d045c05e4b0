"""Muon: momentum, orthogonalised per hidden matrix.

    B = mu B + g;  w = g + mu B (Nesterov) or B;  theta = theta - lr wd theta - lr scale(out, in) NS(w)

The matrices are those of the logical, unsharded tensor: queries, keys, values, gate, up and every expert apart. A
matrix that tensor parallelism splits is put together on one of the ranks that hold its parts, so that the update does
not depend on the layout. An expert without tokens has a zero gradient: its momentum fades by mu a step and it goes on
moving along it, at full size like every orthogonalised update, until the momentum is exactly zero or below Newton-
Schulz' eps; NS(0) = 0. Decay applies at all times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.distributed import ProcessGroup

from pretrain.config.schema import MuonConfig
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.exchange import map_whole
from pretrain.optim.matrices import join_matrices, split_matrices
from pretrain.optim.rules import Slot
from pretrain_kernels.newton_schulz import newton_schulz, newton_schulz_flops


def muon_scale(mode: str, out_features: int, in_features: int) -> float:
    """Factor on the orthogonalised update of an unsharded [out, in] matrix.

    moonshot: 0.2 sqrt(max(out, in)), an update RMS of about 0.2 as AdamW's (Moonlight, arXiv 2502.16982, eq. 4).
    keller_jordan: sqrt(max(1, out / in)) (https://kellerjordan.github.io/posts/muon/).
    """
    if mode == "moonshot":
        return 0.2 * math.sqrt(max(out_features, in_features))
    assert mode == "keller_jordan", mode
    return math.sqrt(max(1.0, out_features / in_features))


def orthogonalise(logical: LogicalTensor, box: torch.Tensor, config: MuonConfig) -> torch.Tensor:
    """The scaled update of every matrix in `box`, which is whole but for its experts."""
    updates = []
    for batch in split_matrices(logical, box):
        update = newton_schulz(batch, config.newton_schulz_steps, getattr(torch, config.newton_schulz_dtype))
        updates.append(update.mul_(muon_scale(config.scale, batch.shape[-2], batch.shape[-1])))
    return join_matrices(logical, updates, box)


class Muon:
    """The Muon rule; needs the tensor-parallel groups of dense weights and of experts."""

    state_names = ("momentum",)

    def __init__(self, config: MuonConfig, groups: ProcessGroupCollection) -> None:
        self._config = config
        self._groups = {False: groups.tp, True: groups.expt_tp}

    def flops(self, shard: Shard) -> int:
        """Newton-Schulz on the matrices of the shard, over the ranks that share the work."""
        shape, ranks = list(shard.shape), 1
        axis = self._split_axis(shard)
        if axis is not None:
            ranks = get_pg_size(self._groups[shard.logical.is_expert])
            shape[axis] *= ranks
        batches = split_matrices(shard.logical, torch.empty(shape, device="meta"))
        steps = self._config.newton_schulz_steps
        return sum(newton_schulz_flops((b.shape[0], b.shape[1], b.shape[2]), steps) for b in batches) // ranks

    def update(self, slots: list[Slot], grads: list[torch.Tensor], *, lr_ratios: Sequence[float], step: int) -> None:
        """One Muon update; collective over the tensor-parallel groups, whose ranks own parts of the same tensors."""
        momenta = [slot.state["momentum"] for slot in slots]
        torch._foreach_mul_(momenta, self._config.momentum)
        torch._foreach_add_(momenta, grads)
        for slot, update in self._updates(slots, grads):
            slot.apply(update, lr_ratios)

    def _updates(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Every slot with its scaled orthogonalised direction, as a logical box. Lazy: few are in memory at once."""
        split: dict[bool, list[tuple[Slot, torch.Tensor]]] = {False: [], True: []}
        for slot, grad in zip(slots, grads, strict=True):
            if self._split_axis(slot.shard) is None:
                yield slot, orthogonalise(slot.shard.logical, self._direction(slot, grad), self._config)
            else:
                split[slot.shard.logical.is_expert].append((slot, grad))
        for is_expert, members in split.items():
            # Equal sizes side by side, so that a round's ranks have equal work; stable, hence the same on all of them.
            members.sort(key=lambda member: -member[1].numel())
            group = self._groups[is_expert]
            for start in range(0, len(members), get_pg_size(group)):
                yield from self._round(members[start : start + get_pg_size(group)], group)

    def _round(
        self, members: Sequence[tuple[Slot, torch.Tensor]], group: ProcessGroup
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Updates of as many split tensors as the group has ranks: each rank does the matrices of one."""
        shards = [slot.shard for slot, _ in members]
        axes = [axis for shard in shards if (axis := self._split_axis(shard)) is not None]
        parts = map_whole(
            [self._direction(slot, grad) for slot, grad in members],
            axes,
            lambda i, box: orthogonalise(shards[i].logical, box, self._config),
            group,
        )
        for (slot, _), part in zip(members, parts, strict=True):
            yield slot, part

    def _direction(self, slot: Slot, grad: torch.Tensor) -> torch.Tensor:
        """What is orthogonalised, as a logical box; the momentum has this step's gradient in it already."""
        momentum = slot.state["momentum"]
        direction = torch.add(grad, momentum, alpha=self._config.momentum) if self._config.nesterov else momentum
        return slot.shard.view(direction)

    def _split_axis(self, shard: Shard) -> int | None:
        """The axis tensor parallelism splits, None if it is whole on this rank."""
        logical = shard.logical
        mesh_axis = "expert_tensor" if logical.is_expert else "tensor"
        for i, axis in enumerate(logical.axes):
            if logical.sharded.get(axis) == mesh_axis and shard.shape[i] < logical.shape[i]:
                group = self._groups[logical.is_expert]
                part = (shard.offset[i], shard.shape[i])
                share = logical.shape[i] // get_pg_size(group)
                assert part == (get_pg_rank(group) * share, share), f"{shard.key}: {part} is not this rank's part"
                return i
        return None
