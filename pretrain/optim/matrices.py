"""The matrices inside a logical tensor, and back: what Muon orthogonalises as wholes and Hyperball keeps the norm of.

A fused tensor is several matrices of one linear map each: queries (all heads together), keys and values; gate and up;
every expert on its own. They are found from the names of the axes, so that no layout is described twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pretrain.model.logical import LogicalTensor

# Each index of these axes is a matrix of its own. In a router, `expert` is the output axis.
STACKED_AXES = ("expert", "gate_up")


def split_matrices(logical: LogicalTensor, box: torch.Tensor) -> list[torch.Tensor]:
    """Batches [N, out, in] of equally shaped matrices, covering `box` once.

    `box` has the axes of `logical` and is whole along every axis except `expert`, of which it may have a part.
    """
    return [_fold(part, logical.axes, stacked) for part, stacked in _parts(logical, box)]


def join_matrices(logical: LogicalTensor, batches: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The box whose `split_matrices` are `batches`; `like` is any tensor with the shape of that box."""
    joined = torch.empty(like.shape, dtype=batches[0].dtype, device=batches[0].device)
    for (part, stacked), batch in zip(_parts(logical, joined), batches, strict=True):
        order = _order(logical.axes, stacked)
        part.permute(order).copy_(batch.view([part.shape[axis] for axis in order]))
    return joined


def matrix_sums(logical: LogicalTensor, box: torch.Tensor) -> torch.Tensor:
    """Sum of the entries of every matrix in a box, or of the part of it that the box has; fp64 [number of matrices], in
    the order of `split_matrices`."""
    sums = []
    for part, stacked in _parts(logical, box):
        summed = [i for i, axis in enumerate(logical.axes) if axis not in stacked]
        sums.append(part.sum(summed, dtype=torch.float64).view(-1))
    return torch.cat(sums)


def matrix_numels(logical: LogicalTensor, box: torch.Tensor) -> torch.Tensor:
    """Entries of every unsharded matrix that has a part in the box; fp64 [number of matrices]."""
    whole = torch.empty(logical.shape, device="meta")
    counts = []
    for (part, stacked), (unsharded, _) in zip(_parts(logical, box), _parts(logical, whole), strict=True):
        number = math.prod(size for axis, size in zip(logical.axes, part.shape, strict=True) if axis in stacked)
        of_all = math.prod(size for axis, size in zip(logical.axes, unsharded.shape, strict=True) if axis in stacked)
        counts.append(torch.full((number,), unsharded.numel() / of_all, dtype=torch.float64, device=box.device))
    return torch.cat(counts)


def spread_matrices(logical: LogicalTensor, values: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """One value for each matrix, in a shape that broadcasts over the box."""
    if "qkv_slot" in logical.axes:
        slot = logical.axes.index("qkv_slot")
        per_slot = torch.cat([values[:1].expand(box.shape[slot] - 2), values[1:]])
        return per_slot.view([-1 if i == slot else 1 for i in range(box.dim())])
    ((_, stacked),) = _parts(logical, box)
    return values.view([size if axis in stacked else 1 for axis, size in zip(logical.axes, box.shape, strict=True)])


def _parts(logical: LogicalTensor, box: torch.Tensor) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
    """Views of `box`, each with the axes along which matrices are stacked in it."""
    if "qkv_slot" in logical.axes:
        slot = logical.axes.index("qkv_slot")
        queries, keys_values = box.split([box.shape[slot] - 2, 2], dim=slot)
        return [(queries, ()), (keys_values, ("qkv_slot",))]
    if logical.kind == "router":
        return [(box, ())]
    return [(box, tuple(axis for axis in STACKED_AXES if axis in logical.axes))]


def _order(axes: Sequence[str], stacked: Sequence[str]) -> list[int]:
    """Permutation that puts the stacked axes first and leaves the rest in place."""
    return [axes.index(axis) for axis in stacked] + [i for i, axis in enumerate(axes) if axis not in stacked]


def _fold(part: torch.Tensor, axes: Sequence[str], stacked: Sequence[str]) -> torch.Tensor:
    """[N, out, in] of a part: `hidden` is one side of every matrix, all other axes are the other side."""
    order = _order(axes, stacked)
    count = math.prod(part.shape[axis] for axis in order[: len(stacked)])
    hidden = axes.index("hidden")
    D = part.shape[hidden]
    if order[len(stacked)] == hidden:
        return part.permute(order).reshape(count, D, -1)
    assert order[-1] == hidden, f"{tuple(axes)}: hidden is neither the output nor the input side"
    return part.permute(order).reshape(count, -1, D)
