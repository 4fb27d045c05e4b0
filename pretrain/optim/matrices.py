"""The matrices inside a logical tensor, and back: what Muon orthogonalises as wholes.

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
