"""Muon and Scion: momentum, orthogonalised per hidden matrix; and the Newton-Schulz step of a tensor that is split.

    Muon:   B = mu B + g;             w = g + mu B (Nesterov) or B
    Scion:  B = mu B + (1 - mu) g;    w = B
    theta = theta - lr wd theta - lr scale(out, in) NS(w)

The matrices are those of the logical, unsharded tensor: queries, keys, values, gate, up and every expert apart. A
matrix that tensor parallelism splits is put together on one of the ranks that hold its parts, so that the update does
not depend on the layout. A matrix whose gradient is zero, as that of an expert without tokens, gets no update that
step: orthogonalised, what is left of its momentum would be a step of full size along stale noise. Its momentum fades by
mu; decay applies at all times.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_size
from torch.distributed import ProcessGroup

from pretrain.config.optim import MuonConfig, ScionConfig
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard
from pretrain.optim.exchange import map_whole
from pretrain.optim.matrices import join_matrices, matrix_sums, split_matrices, spread_matrices
from pretrain.optim.rules import DirectionRule, Slot, states
from pretrain.optim.tensor_parallel import TensorParallel
from pretrain_kernels.newton_schulz import newton_schulz, newton_schulz_flops


def muon_scale(mode: str, out_features: int, in_features: int) -> float:
    """Factor on the orthogonalised update of an unsharded [out, in] matrix.

    moonshot: 0.2 sqrt(max(out, in)), an update RMS of about 0.2 as AdamW's (Moonlight, arXiv 2502.16982, eq. 4).
    keller_jordan: sqrt(max(1, out / in)) (https://kellerjordan.github.io/posts/muon/), also the study's for Scion.
    spectral: sqrt(out / in), spectral norm to spectral norm over RMS vectors (Scion, arXiv 2502.07529).
    """
    if mode == "moonshot":
        return 0.2 * math.sqrt(max(out_features, in_features))
    if mode == "spectral":
        return math.sqrt(out_features / in_features)
    assert mode == "keller_jordan", mode
    return math.sqrt(max(1.0, out_features / in_features))


def orthogonalise(logical: LogicalTensor, box: torch.Tensor, config: MuonConfig | ScionConfig) -> torch.Tensor:
    """The scaled update of every matrix in `box`, which is whole but for its experts."""
    updates = []
    for batch in split_matrices(logical, box):
        update = newton_schulz(
            batch,
            config.newton_schulz_steps,
            getattr(torch, config.newton_schulz_dtype),
            coefficients=config.newton_schulz_coefficients,
            eps=config.newton_schulz_eps,
        )
        updates.append(update.mul_(muon_scale(config.scale, batch.shape[-2], batch.shape[-1])))
    return join_matrices(logical, updates, box)


_Member = tuple[Slot, torch.Tensor, torch.Tensor]
"""A slot, its gradient, and which of its matrices have a gradient at all."""


class Orthogonal(DirectionRule):
    """Orthogonalised momentum."""

    def __init__(self, config: MuonConfig | ScionConfig, groups: ProcessGroupCollection) -> None:
        self._orthogonal = config
        self._parallel = TensorParallel(groups)

    def flops(self, shard: Shard) -> int:
        """Newton-Schulz on the matrices of the shard, over the ranks that share the work."""
        shape, ranks = list(shard.shape), 1
        axis = self._parallel.axis(shard)
        if axis is not None:
            ranks = get_pg_size(self._parallel.group(shard))
            shape[axis] *= ranks
        batches = split_matrices(shard.logical, torch.empty(shape, device="meta"))
        steps = self._orthogonal.newton_schulz_steps
        return sum(newton_schulz_flops((b.shape[0], b.shape[1], b.shape[2]), steps) for b in batches) // ranks

    @abstractmethod
    def _moved(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> None:
        """Move the momenta by this step's gradients."""

    @abstractmethod
    def _direction(self, momentum: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """What is orthogonalised; the momentum has this step's gradient in it already."""

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Scaled orthogonalised directions; a tensor that is split is done whole on one of its ranks."""
        self._moved(slots, grads)
        # A part without a gradient still moves if the matrix has one elsewhere.
        entries = [matrix_sums(s.shard.logical, s.shard.view(grad) != 0) for s, grad in zip(slots, grads, strict=True)]
        self._parallel.sum_(slots, entries)
        split: list[_Member] = []
        for slot, grad, count in zip(slots, grads, entries, strict=True):
            if self._parallel.axis(slot.shard) is None:
                yield slot, orthogonalise(slot.shard.logical, self._box(slot, grad, count > 0), self._orthogonal)
            else:
                split.append((slot, grad, count > 0))
        # Equal sizes side by side, so that a round's ranks have equal work; stable, hence the same on all of them.
        split.sort(key=lambda member: -member[1].numel())
        group = self._parallel.group(split[0][0].shard) if split else None
        for start in range(0, len(split), get_pg_size(group)):
            yield from self._round(split[start : start + get_pg_size(group)], group)

    def _round(self, members: Sequence[_Member], group: ProcessGroup | None) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Updates of as many split tensors as the group has ranks: each rank does the matrices of one."""
        shards = [slot.shard for slot, *_ in members]
        axes = [axis for shard in shards if (axis := self._parallel.axis(shard)) is not None]
        parts = map_whole(
            [self._box(*member) for member in members],
            axes,
            lambda i, box: orthogonalise(shards[i].logical, box, self._orthogonal),
            group,
        )
        for (slot, *_), part in zip(members, parts, strict=True):
            yield slot, part

    def _box(self, slot: Slot, grad: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
        """What is orthogonalised, as a logical box: zero for matrices that don't move."""
        logical = slot.shard.logical
        box = slot.shard.view(self._direction(slot.state["momentum"], grad))
        return box * spread_matrices(logical, moves, box)


class Muon(Orthogonal):
    """Muon on hidden matrices."""

    def __init__(self, config: MuonConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups)
        self._config = config

    def _moved(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> None:
        momenta = states(slots, "momentum")
        torch._foreach_mul_(momenta, self._config.momentum)
        torch._foreach_add_(momenta, list(grads))

    def _direction(self, momentum: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return torch.add(grad, momentum, alpha=self._config.momentum) if self._config.nesterov else momentum


class Scion(Orthogonal):
    """Scion on hidden matrices (arXiv 2502.07529), unconstrained, with decoupled decay, as arXiv 2509.02046 ran it."""

    def __init__(self, config: ScionConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups)
        self._config = config

    def _moved(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> None:
        torch._foreach_lerp_(states(slots, "momentum"), list(grads), 1 - self._config.momentum)

    def _direction(self, momentum: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return momentum
