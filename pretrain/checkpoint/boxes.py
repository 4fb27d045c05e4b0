"""Boxes: axis-aligned parts of a logical tensor, what a set of them covers, and whether it does so exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Box:
    """Entries `offset[i] <= index[i] < offset[i] + shape[i]` of a logical tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where there is none."""
        start = tuple(map(max, self.offset, other.offset))
        stop = tuple(map(min, self.stop, other.stop))
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def minus(self, other: Box) -> list[Box]:
        """What is left of it without `other`, as boxes that do not overlap."""
        common = self.intersect(other)
        if common is None:
            return [self]
        left, rest = [], self
        for axis, (start, stop) in enumerate(zip(common.offset, common.stop, strict=True)):
            sides = ((rest.offset[axis], start), (stop, rest.stop[axis]))
            left += [rest._cut(axis, first, end) for first, end in sides if first < end]
            rest = rest._cut(axis, start, stop)
        return left

    def _cut(self, axis: int, start: int, stop: int) -> Box:
        """The part with indices from `start` to before `stop` along an axis."""
        offset, shape = list(self.offset), list(self.shape)
        offset[axis], shape[axis] = start, stop - start
        return Box(tuple(offset), tuple(shape))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of the array that holds `outer`."""
        starts = [a - b for a, b in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))


def lies_in(box: Box, shape: Sequence[int]) -> bool:
    """Whether `box` is a non-empty part of a tensor of this shape."""
    if not len(box.offset) == len(box.shape) == len(shape):
        return False
    return all(o >= 0 and n > 0 and o + n <= size for o, n, size in zip(box.offset, box.shape, shape, strict=True))


def uncovered(box: Box, boxes: Iterable[Box]) -> list[Box]:
    """The parts of `box` that none of `boxes` has."""
    left = [box]
    for other in boxes:
        left = [part for piece in left for part in piece.minus(other)]
    return left


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box], *, partial: bool = False) -> str | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once (`partial`: at most once); None when they do."""
    for box in boxes:
        if not lies_in(box, shape):
            return f"box at {list(box.offset)} of shape {list(box.shape)} is no part of shape {list(shape)}"
    # Boxes inside the shape that are disjoint cover it exactly when their volumes add up.
    starts = np.array([box.offset for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    stops = np.array([box.stop for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    for i, box in enumerate(boxes):
        meets = ((starts[i + 1 :] < stops[i]) & (stops[i + 1 :] > starts[i])).all(axis=1)
        if meets.any():
            other = boxes[i + 1 + int(meets.argmax())]
            return f"boxes at {list(box.offset)} and {list(other.offset)} overlap"
    covered, total = sum(box.numel for box in boxes), math.prod(shape)
    return None if covered == total or partial else f"boxes cover {covered} of {total} entries (gap)"
