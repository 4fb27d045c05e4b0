"""Growth as axis maps: for every index of every axis of a grown tensor, the index of the old one it comes from.

A growth is one map per axis, and everything else follows from the maps: the value of each new entry and where in the
old tensor it lies (hence which rank has it), which entries are new, what becomes of their optimizer state, and how old
each entry is. Maps are vectors, one per axis; nothing here is as large as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.config.growth import WIDTH_AXES, ExpertGrowth, GrowthConfig, WidthGrowth
from pretrain.config.schema import ModelConfig
from pretrain.config.stages import fan_in_scale, is_copied, layer_sources, wider_size
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.states import BLOCKS

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Extent = tuple[int, ...]

# Where fills of several axes meet, the later kind wins: noise is for copies, and what starts at zero starts at zero.
FILL_ORDER = ("lower", "uniform", "noise", "random", "zero")

# Axes that no growth touches.
FIXED_AXES = ("vocab", "qkv_slot", "head_dim", "head_of_group", "gate_up")
_WIDTH_OF_AXIS = {axis: name for name, (axis, _) in WIDTH_AXES.items()}


@dataclass(frozen=True)
class AxisMap:
    """Where the indices of one axis come from."""

    source: Indices
    """[new size] index in the old axis."""
    is_new: Mask
    """[new size] whether the index is a copy; every source has one index that is not."""

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """The map of an axis that stays."""
        return cls(np.arange(size), np.zeros(size, dtype=bool))

    @classmethod
    def of(cls, source: Sequence[int] | Indices) -> AxisMap:
        """The first occurrence of each source is the old one."""
        array = np.asarray(source, dtype=np.int64)
        is_new = np.ones(len(array), dtype=bool)
        is_new[np.unique(array, return_index=True)[1]] = False
        return cls(array, is_new)

    def in_blocks(self, size: int) -> AxisMap | None:
        """The map of an axis whose indices are blocks of `size` of these; None unless blocks stay as they are."""
        if len(self.source) % size:
            return None
        source, is_new = self.source.reshape(-1, size), self.is_new.reshape(-1, size)
        first = source[:, :1]
        whole = (source == first + np.arange(size)).all() and not (first % size).any()
        of_one_age = (is_new == is_new[:, :1]).all()
        return AxisMap(first[:, 0] // size, is_new[:, 0]) if whole and of_one_age else None

    def runs(self, start: int, stop: int, *, old_only: bool = False) -> list[tuple[int, int, int]]:
        """(target, source, length) of the stretches within [start, stop) where both advance by one."""
        index = np.arange(start, stop)
        if old_only:
            index = index[~self.is_new[start:stop]]
        source = self.source[index]
        breaks = np.flatnonzero((np.diff(index) != 1) | (np.diff(source) != 1)) + 1
        parts = zip(np.split(index, breaks), np.split(source, breaks), strict=True)
        return [(int(i[0]), int(s[0]), len(i)) for i, s in parts if len(i)]

    def sources(self, start: int, stop: int, *, old_only: bool = False) -> list[tuple[int, int]]:
        """The source indices that [start, stop) needs, as (start, length) of their stretches."""
        part = self.source[start:stop]
        needed = np.unique(part[~self.is_new[start:stop]] if old_only else part)
        stretches = np.split(needed, np.flatnonzero(np.diff(needed) != 1) + 1)
        return [(int(s[0]), len(s)) for s in stretches if len(s)]


@dataclass(frozen=True)
class Fill:
    """Entries of a grown tensor that are no plain copies."""

    kind: Literal["zero", "random", "noise", "uniform", "lower"]
    """zero; normal with the tensor's own standard deviation; normal noise on top; uniform noise on top; a selection
    bias below the reach of any score."""
    where: Mapping[str, Mask]
    """Axis -> indices; an axis not named is meant in full."""
    amount: float = 1.0
    """Share of the standard deviation (random, noise), or bound (uniform)."""
    name: str = ""
    """Tells the random draws of one tensor apart."""


@dataclass(frozen=True)
class TensorMap:
    """How one logical tensor of the grown model comes from one of the old model."""

    target: LogicalTensor
    source: LogicalTensor
    is_new_layer: bool
    """Whether the tensor belongs to a layer that is a copy as a whole."""
    axes: tuple[AxisMap, ...]
    factors: tuple[NDArray[np.float32] | None, ...]
    """Per axis, factor on the entries of each index (fan-in axes that grew)."""
    fills: tuple[Fill, ...]

    def wanted(self, offset: Extent, shape: Extent, *, old_only: bool = False) -> list[tuple[Extent, Extent]]:
        """(offset, shape) of the boxes of the source that a box of the target needs; `old_only`: for its old part."""
        if old_only and self.is_new_layer:
            return []
        per_axis = [
            axis.sources(start, start + size, old_only=old_only)
            for axis, start, size in zip(self.axes, offset, shape, strict=True)
        ]
        return [(tuple(s for s, _ in box), tuple(n for _, n in box)) for box in product(*per_axis)]

    def place(
        self,
        box: torch.Tensor,
        offset: Extent,
        piece: torch.Tensor,
        piece_offset: Extent,
        *,
        old_only: bool = False,
        factor: float | None = None,
    ) -> None:
        """Copy a piece of the source to all its places in a box of the target, in place.

        Args:
            box: view of the target from `offset` on; fp32.
            piece: part of the source from `piece_offset` on.
            old_only: leave the new entries alone.
            factor: on all entries, instead of those of the weights (for optimizer state).
        """
        per_axis = []
        for axis, start, size, low, length in zip(self.axes, offset, box.shape, piece_offset, piece.shape, strict=True):
            clipped = (_clip(run, low, low + length) for run in axis.runs(start, start + size, old_only=old_only))
            per_axis.append([(t - start, s - low, n) for t, s, n in clipped if n > 0])
        for combination in product(*per_axis):
            into = box[tuple(slice(t, t + n) for t, _, n in combination)]
            values = piece[tuple(slice(s, s + n) for _, s, n in combination)]
            factors = self._factors_at(offset, combination) if factor is None else []
            if factor is not None and factor != 1.0:
                torch.mul(values.to(into.dtype), factor, out=into)
            elif factors:
                # One pass over the entries where there is one axis with factors, which is nearly always.
                torch.mul(values.to(into.dtype), factors[0].to(into.device), out=into)
                for more in factors[1:]:
                    into.mul_(more.to(into.device))
            else:
                into.copy_(values)

    def _factors_at(self, offset: Extent, runs: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """The factors on the part of a box that `runs` say, per axis that has any, to be broadcast."""
        return [
            torch.from_numpy(factors[start + t : start + t + n]).view([-1 if d == dim else 1 for d in range(len(runs))])
            for dim, (factors, start, (t, _, n)) in enumerate(zip(self.factors, offset, runs, strict=True))
            if factors is not None
        ]


def _clip(run: tuple[int, int, int], low: int, high: int) -> tuple[int, int, int]:
    """The part of a run whose sources lie in [low, high); its length may come out as 0 or less."""
    target, source, length = run
    skip = max(0, low - source)
    return target + skip, source + skip, min(source + length, high) - (source + skip)


@dataclass(frozen=True)
class GrowthPoint:
    """One growth of a run with the models on both sides of it."""

    number: int
    """Counted from 1."""
    config: GrowthConfig
    before: ModelConfig
    after: ModelConfig
    copies: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """MoE layer of the old model -> number of copies of each expert, where they are chosen by utility."""

    @cached_property
    def old_tensors(self) -> dict[str, LogicalTensor]:
        """Tensors of the old model by key."""
        return {tensor.key: tensor for tensor in logical_tensors(self.before)}

    @cached_property
    def layers(self) -> AxisMap:
        """Where the layers come from."""
        depth, n = self.config.depth, self.before.num_layers
        return AxisMap.of(layer_sources(n, depth)) if depth else AxisMap.identity(n)

    @cached_property
    def _known_maps(self) -> dict[str, TensorMap]:
        return {}

    def tensor_map(self, target: LogicalTensor) -> TensorMap:
        """How a tensor of the new model comes from the old one. Raises ValueError for an axis it does not know."""
        if target.key not in self._known_maps:
            self._known_maps[target.key] = self._make_map(target)
        return self._known_maps[target.key]

    def state_map(self, weights: TensorMap, source: LogicalTensor, target: LogicalTensor) -> TensorMap | None:
        """How an optimizer state of `weights` comes from the old one; None where its blocks are others than before."""
        maps = dict(zip(weights.source.axes, zip(weights.axes, weights.source.shape, strict=True), strict=True))
        axes = []
        for axis, old_size, new_size in zip(target.axes, source.shape, target.shape, strict=True):
            weight_map, weight_size = maps.get(axis.removesuffix(BLOCKS), (AxisMap.identity(old_size), old_size))
            found = weight_map.in_blocks(weight_size // old_size)
            if found is None or len(found.source) != new_size:
                return None
            axes.append(found)
        return TensorMap(target, source, weights.is_new_layer, tuple(axes), (None,) * len(axes), ())

    def _make_map(self, target: LogicalTensor) -> TensorMap:
        key, is_new_layer = target.key, False
        if target.layer is not None:
            source_layer = int(self.layers.source[target.layer])
            key = key.replace(f".{target.layer}.", f".{source_layer}.", 1)
            is_new_layer = bool(self.layers.is_new[target.layer])
        source = self.old_tensors[key]
        axes = tuple(self._axis_map(source, axis) for axis in source.axes)
        factors = tuple(self._factors(source, axis) for axis in source.axes)
        fills = tuple(self._fills(target, dict(zip(source.axes, axes, strict=True)), is_new_layer=is_new_layer))
        return TensorMap(target, source, is_new_layer, axes, factors, fills)

    def _axis_map(self, source: LogicalTensor, axis: str) -> AxisMap:
        size = source.shape[source.axes.index(axis)]
        if axis == "expert":
            experts = self.config.experts
            chosen = None if source.layer is None else self.copies.get(source.layer)
            return expert_map(size, experts, chosen) if experts else AxisMap.identity(size)
        width = self._width(axis)
        if width:
            return width_map(size, width)
        if axis not in FIXED_AXES and axis not in _WIDTH_OF_AXIS:
            raise ValueError(f"{source.key}: axis {axis!r} is unknown to growth; give it a map or list it as fixed")
        return AxisMap.identity(size)

    def _width(self, axis: str) -> WidthGrowth | None:
        return self.config.widths.get(_WIDTH_OF_AXIS.get(axis, ""))

    def _factors(self, source: LogicalTensor, axis: str) -> NDArray[np.float32] | None:
        width = self._width(axis)
        if width is None or axis not in source.fan_in:
            return None
        size = source.shape[source.axes.index(axis)]
        if width.split is not None:
            return np.where(width_map(size, width).is_new, width.split, 1 - width.split).astype(np.float32)
        wider = wider_size(size, width)
        return np.full(wider, fan_in_scale(size, wider, copied=is_copied(width)), dtype=np.float32)

    def _fills(self, target: LogicalTensor, axes: Mapping[str, AxisMap], *, is_new_layer: bool) -> list[Fill]:
        fills: list[Fill] = []
        for axis, axis_map in axes.items():
            width = self._width(axis)
            if width and target.kind != "norm":
                fills += _width_fills(target, axis, axis_map, width)
        experts = self.config.experts
        if experts and "expert" in axes:
            fills += _expert_fills(target, axes["expert"], experts)
        if is_new_layer and self._starts_as_identity(target):
            fills.append(Fill("zero", {}))
        return sorted(fills, key=lambda fill: FILL_ORDER.index(fill.kind))

    def _starts_as_identity(self, target: LogicalTensor) -> bool:
        depth = self.config.depth
        return depth is not None and depth.identity and target.writes_stream

    def scale(self, source: LogicalTensor) -> float:
        """Factor on the standard deviation of a tensor's entries, that of the RMS rule."""
        grown = [(axis, self._width(axis)) for axis in source.fan_in]
        sizes = dict(zip(source.axes, source.shape, strict=True))
        return math.prod(
            fan_in_scale(sizes[axis], wider_size(sizes[axis], width), copied=is_copied(width))
            for axis, width in grown
            if width
        )


def width_map(size: int, width: WidthGrowth) -> AxisMap:
    """[old | copies], the copies beginning with index 0 again."""
    return AxisMap.of(np.arange(wider_size(size, width)) % size)


def expert_map(size: int, experts: ExpertGrowth, copies: Sequence[int] | None = None) -> AxisMap:
    """The copies after all experts, or each after its source; `copies` of each expert, default factor - 1."""
    counts = np.full(size, experts.factor - 1) if copies is None else np.asarray(copies)
    assert counts.sum() == size * (experts.factor - 1), "the copies do not add up"
    old = np.arange(size)
    if experts.order == "interleave":
        return AxisMap.of(np.repeat(old, counts + 1))
    if copies is None:
        return AxisMap.of(np.tile(old, experts.factor))  # all originals again and again, so that groups repeat
    return AxisMap.of(np.concatenate([old, np.repeat(old, counts)]))


def share_copies(scores: Sequence[float], factor: int, max_copies: int) -> list[int]:
    """Number of copies of each expert: the highest scores get `max_copies`, until there are factor times the experts
    (greedy allocation of Expert Upcycling, arXiv 2604.19835). Equal scores go by number."""
    left = (factor - 1) * len(scores)
    copies = [0] * len(scores)
    for expert in sorted(range(len(scores)), key=lambda e: (-scores[e], e)):
        copies[expert] = min(max_copies, left)
        left -= copies[expert]
    assert left == 0, "max_copies is too small"
    return copies


def _width_fills(target: LogicalTensor, axis: str, axis_map: AxisMap, width: WidthGrowth) -> list[Fill]:
    is_fan_in = axis in target.fan_in
    kind = width.fan_in if is_fan_in else width.fan_out
    if kind == "copy":
        return [Fill("noise", {axis: axis_map.is_new}, width.noise, axis)] if width.noise else []
    where = {axis: axis_map.is_new}
    if kind == "zero" and not is_fan_in:
        where |= _last_slot_only(target)
    return [Fill(kind, where, name=axis)]


def _last_slot_only(target: LogicalTensor) -> dict[str, Mask]:
    """Of gate and up the latter, of queries, key and value the last: were all zero, none would ever get a gradient."""
    fused = [axis for axis in ("gate_up", "qkv_slot") if axis in target.axes]
    sizes = {axis: target.shape[target.axes.index(axis)] for axis in fused}
    return {axis: np.arange(size) == size - 1 for axis, size in sizes.items()}


def _expert_fills(target: LogicalTensor, axis_map: AxisMap, experts: ExpertGrowth) -> list[Fill]:
    new = {"expert": axis_map.is_new}
    if target.kind != "router_bias":
        return [Fill("noise", new, experts.noise, "expert")] if experts.noise else []
    if experts.exact_start:
        return [Fill("lower", new)]
    return [Fill("uniform", new, experts.bias_noise, "expert")] if experts.bias_noise else []


def ages(history: Sequence[GrowthPoint]) -> Callable[[LogicalTensor], list[Indices]]:
    """Which growth brought in which index of a tensor of the last model: 0 the start of the run, n the n-th growth.

    One vector per axis; the age of an entry is the largest along its axes. A layer that is new as a whole says so on
    its first axis.
    """

    def of(tensor: LogicalTensor, done: int = len(history)) -> list[Indices]:
        if done == 0:
            return [np.zeros(size, dtype=np.int64) for size in tensor.shape]
        tensor_map = history[done - 1].tensor_map(tensor)
        before = of(tensor_map.source, done - 1)
        vectors = [
            np.where(axis.is_new, done, old[axis.source]) for axis, old in zip(tensor_map.axes, before, strict=True)
        ]
        if tensor_map.is_new_layer:
            vectors[0] = np.full_like(vectors[0], done)
        return vectors

    return of
