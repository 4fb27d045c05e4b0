"""Hyperball: steps on the sphere of a matrix's initial norm (arXiv 2606.16899).

    p' = p - lr R u / |u|;   p = R p' / |p'|,   R = |p| at the first step

per matrix of the unsharded tensor: queries, keys, values, gate, up and every expert apart, never one norm for a stack
of them. u is the direction of another rule: Muon's (muonh) or AdamW's (adamh). There is no decay, which a fixed norm
stands in for, and lr is the angle of a step. R is taken anew after a growth, and for experts that change hands. A
matrix of zeros stays zero. One without a gradient (an expert without tokens) stays where it is: u would keep its full
length while momentum fades.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.model.shards import Shard
from pretrain.optim.adam import AdamW
from pretrain.optim.matrices import matrix_sums, spread_matrices
from pretrain.optim.muon import Muon
from pretrain.optim.rules import Rule, Slot, in_batches
from pretrain.optim.tensor_parallel import TensorParallel


class Hyperball(Rule):
    """Moves matrices along the directions of `inner` without changing their norms."""

    def __init__(self, inner: AdamW | Muon, parallel: TensorParallel) -> None:
        self._inner, self._parallel = inner, parallel

    def flops(self, shard: Shard) -> int:
        """Those of the inner rule."""
        return self._inner.flops(shard)

    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, lr_ratios: Sequence[float], step: int
    ) -> None:
        """Sums over each matrix: of p when it has no radius yet, the gradient, u and p'; collective where a tensor is
        split."""
        self._set_radii([slot for slot in slots if not bool(slot.state["radius"].all())])
        boxes = [slot.shard.view(grad) for slot, grad in zip(slots, grads, strict=True)]
        sizes = dict(zip(map(id, slots), self._norms(slots, boxes), strict=True))
        directions = self._inner.directions(slots, grads, step=step)
        # Several at a time, so that their norms are summed over ranks at once; copies, as the rule may reuse memory.
        for batch in in_batches((slot, direction.clone()) for slot, direction in directions):
            self._move(batch, [sizes[id(slot)] > 0 for slot, _ in batch], lr_ratios)

    def _set_radii(self, slots: Sequence[Slot]) -> None:
        """Of the matrices that have none: others of the same tensor may be older."""
        norms = self._norms(slots, [slot.shard.view(slot.master) for slot in slots])
        for slot, norm in zip(slots, norms, strict=True):
            radius = slot.state["radius"]
            radius.copy_(torch.where(radius == 0, norm.view_as(radius).to(radius.dtype), radius))

    def _move(
        self, batch: Sequence[tuple[Slot, torch.Tensor]], moving: Sequence[torch.Tensor], lr_ratios: Sequence[float]
    ) -> None:
        """`moving`: which matrices of each slot have a gradient."""
        slots = [slot for slot, _ in batch]
        lengths = self._norms(slots, [direction for _, direction in batch])
        weights = [slot.shard.view(slot.master) for slot in slots]
        for (slot, direction), length, moves, weight in zip(batch, lengths, moving, weights, strict=True):
            for lr, parts in slot.rates(lr_ratios).items():
                for part in parts:
                    direction[part].mul_(-lr)
            factor = _ratio(slot.state["radius"].view(-1), length) * moves
            weight.addcmul_(direction, spread_matrices(slot.shard.logical, factor, direction))
        for slot, norm, weight in zip(slots, self._norms(slots, weights), weights, strict=True):
            factor = _ratio(slot.state["radius"].view(-1), norm)
            weight.mul_(spread_matrices(slot.shard.logical, factor, weight))

    def _norms(self, slots: Sequence[Slot], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Frobenius norms of the unsharded matrices, fp64 [number of matrices] per slot."""
        squares = [matrix_sums(slot.shard.logical, box.square()) for slot, box in zip(slots, boxes, strict=True)]
        self._parallel.sum_(slots, squares)
        return [square.sqrt() for square in squares]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Their quotient in fp32, 0 where the denominator is."""
    quotient = numerator.double() / denominator
    return torch.where(denominator > 0, quotient, torch.zeros_like(quotient)).float()
