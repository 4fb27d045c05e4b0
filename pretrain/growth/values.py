"""Values of new entries that are no copies: noise, fresh random weights, zeros.

They depend on the logical tensor, the seed and the growth alone, never on the layout, down to the last bit: normal
numbers are drawn per block of the logical tensor, and the figures that scale them are added up in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.growth.maps import Extent, Fill, GrowthPoint, TensorMap
from pretrain.model.initialise import draw_normal
from pretrain.model.logical import LogicalTensor

# Entries are measured in steps of the largest magnitude over so much. Squares then take 32 bits, and int64 holds the
# sum of 2**31 of them; a standard deviation comes out within about 1e-5.
STEPS = 1 << 16

# Entries that are drawn at a time: 64 MiB in fp32.
CHUNK = 1 << 24

# Entries that are measured at a time: their steps stay in a core's cache. Sums of their squares in fp64 are exact in
# any order: 2**19 of up to 2**32 are below 2**53.
MEASURED_CHUNK = 1 << 19

# Adds up, or takes the maximum of, a tensor over all ranks.
Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A part of an old tensor; over all ranks, the parts of a tensor cover it once."""

    tensor: LogicalTensor
    offset: Extent
    values: torch.Tensor
    """The box from `offset` on."""


@dataclass(frozen=True)
class Figures:
    """What the values of an old tensor are like: one entry per expert of an expert's weight, else one."""

    std: torch.Tensor
    spread: torch.Tensor
    """Largest minus smallest value."""


def measure(
    needed: Sequence[LogicalTensor],
    parts: Callable[[], Iterable[Part]],
    *,
    add: Reduce = lambda tensor: tensor,
    largest: Reduce = lambda tensor: tensor,
    device: torch.device | None = None,
) -> dict[str, Figures]:
    """Figures of the given old tensors. Collective when `add` and `largest` are; all ranks need the same tensors.

    `parts` is walked twice; tensors that are not needed are passed over.
    """
    counts = [_groups(tensor) for tensor in needed]
    starts = {tensor.key: int(sum(counts[:i])) for i, tensor in enumerate(needed)}
    # Rows: the largest value, and the largest negative.
    extremes = torch.full((2, sum(counts)), -math.inf, dtype=torch.float64, device=device)
    sums = torch.zeros(3, sum(counts), dtype=torch.int64, device=device)
    for rows, where in _rows(parts(), starts):
        extremes[0, where] = torch.maximum(extremes[0, where], rows.amax(dim=1).double())
        extremes[1, where] = torch.maximum(extremes[1, where], -rows.amin(dim=1).double())
    extremes = largest(extremes)
    magnitude = extremes.max(dim=0).values
    unit = torch.where(magnitude > 0, magnitude / STEPS, 1.0)
    for rows, where in _rows(parts(), starts):
        steps = rows.double().div_(unit[where].unsqueeze(1)).round_()
        sums[0, where] += steps.shape[1]
        sums[1, where] += steps.sum(dim=1).long()
        sums[2, where] += torch.linalg.vecdot(steps, steps).long()
    count, total, squares = add(sums).double().cpu()
    unit, (high, low) = unit.cpu(), extremes.cpu()
    # In whole steps up to here, hence the same bits on every layout.
    variance = (squares / count - (total / count).square()).clamp(min=0)
    std, spread = unit * variance.sqrt(), high + low
    return {
        tensor.key: Figures(std[start : start + n], spread[start : start + n])
        for tensor, n, start in zip(needed, counts, starts.values(), strict=True)
    }


def needs_figures(tensor_map: TensorMap) -> bool:
    """Whether the values of some new entries depend on those of the whole old tensor."""
    return any(fill.kind in ("random", "noise", "lower") for fill in tensor_map.fills)


def apply_fills(
    growth: GrowthPoint,
    tensor_map: TensorMap,
    box: torch.Tensor,
    offset: Extent,
    *,
    figures: Mapping[str, Figures],
    seed: int,
) -> None:
    """Put the values of new entries that are no plain copies into a box of the grown tensor, after its copies."""
    for fill in tensor_map.fills:
        indices = [
            np.flatnonzero(fill.where[axis][start : start + size]) if axis in fill.where else np.arange(size)
            for axis, start, size in zip(tensor_map.target.axes, offset, box.shape, strict=True)
        ]
        entries = math.prod(map(len, indices))
        for first in np.array_split(indices[0], -(-entries // CHUNK)) if entries else []:
            if len(first):
                _fill(growth, tensor_map, fill, box, offset, [first, *indices[1:]], figures=figures, seed=seed)


def _fill(
    growth: GrowthPoint,
    tensor_map: TensorMap,
    fill: Fill,
    box: torch.Tensor,
    offset: Extent,
    indices: Sequence[np.ndarray],
    *,
    figures: Mapping[str, Figures],
    seed: int,
) -> None:
    # A view of what the indices span, and the indices in there.
    low = [int(index[0]) for index in indices]
    extent = tuple(int(index[-1]) + 1 - first for index, first in zip(indices, low, strict=True))
    part = box[tuple(slice(first, first + n) for first, n in zip(low, extent, strict=True))]
    start = tuple(o + first for o, first in zip(offset, low, strict=True))
    inner = tuple(
        torch.from_numpy(index - first).view([-1 if d == dim else 1 for d in range(box.dim())])
        for dim, (index, first) in enumerate(zip(indices, low, strict=True))
    )
    gapless = all(len(index) == n for index, n in zip(indices, extent, strict=True))
    place = ... if gapless else tuple(index.to(box.device) for index in inner)
    if fill.kind == "zero":
        part[place] = 0.0
        return
    source, target = tensor_map.source, tensor_map.target
    if fill.kind == "lower":
        # A score lies between 0 and 1: a copy never beats the least biased of the old experts.
        part[place] -= 1.0 + float(figures[source.key].spread.max())
        return
    tag = f"growth {growth.number}/{fill.kind} {fill.name}/{target.key}"
    normal = draw_normal(seed, tag, target.shape, start, extent)[... if gapless else inner]
    if fill.kind == "uniform":
        # The distribution function of a normal number is uniform; erf is its map to [-1, 1].
        part[place] += (torch.erf(normal / math.sqrt(2)) * fill.amount).to(part.device)
        return
    std = _std(growth, tensor_map, start, inner, figures[source.key])
    values = normal.mul_((std * (fill.amount * growth.scale(source))).float()).to(part.device)
    if fill.kind == "random":
        part[place] = values
    elif gapless:
        part.add_(values)
    else:
        part[place] += values


def _std(
    growth: GrowthPoint, tensor_map: TensorMap, start: Extent, inner: Sequence[torch.Tensor], figures: Figures
) -> torch.Tensor:
    """Standard deviation of the source of each entry that `inner` selects, to be broadcast."""
    if len(figures.std) == 1:
        return figures.std
    dim = tensor_map.target.axes.index("expert")
    experts = inner[dim] + start[dim]
    return figures.std[torch.from_numpy(tensor_map.axes[dim].source)[experts]]


def _groups(tensor: LogicalTensor) -> int:
    """Parts of a tensor that are measured apart: each expert's weight is a tensor of its own."""
    return tensor.shape[tensor.axes.index("expert")] if tensor.is_expert else 1


def _rows(parts: Iterable[Part], starts: Mapping[str, int]) -> Iterator[tuple[torch.Tensor, slice]]:
    """The values of the needed tensors as rows of one group each, a chunk at a time, and where the groups stand."""
    for part in parts:
        start = starts.get(part.tensor.key)
        if start is None or not part.values.numel():
            continue
        first = part.offset[0] if part.tensor.is_expert else 0
        rows = part.values.reshape(part.values.shape[0] if part.tensor.is_expert else 1, -1)
        for chunk in rows.split(max(1, MEASURED_CHUNK // len(rows)), dim=1):
            yield chunk, slice(start + first, start + first + len(rows))
