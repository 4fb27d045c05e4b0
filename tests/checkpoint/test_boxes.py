"""Coverage and intersection of boxes against counting entry by entry."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pretrain.checkpoint.boxes import Box, tiling_problem


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    offset = tuple(rng.randrange(size) for size in shape)
    return Box(offset, tuple(rng.randint(1, size - start) for size, start in zip(shape, offset, strict=True)))


def split(rng: random.Random, box: Box, depth: int) -> list[Box]:
    """A random exact tiling of `box` that is no grid."""
    axes = [axis for axis, size in enumerate(box.shape) if size > 1]
    if depth == 0 or not axes:
        return [box]
    axis = rng.choice(axes)
    at = rng.randrange(1, box.shape[axis])
    low, high = list(box.shape), list(box.shape)
    low[axis], high[axis] = at, box.shape[axis] - at
    offset = list(box.offset)
    offset[axis] += at
    parts = [Box(box.offset, tuple(low)), Box(tuple(offset), tuple(high))]
    return [piece for half in parts for piece in split(rng, half, depth - 1)]


def count(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[box.slices_in(Box((0,) * len(shape), shape))] += 1
    return counts


@pytest.mark.parametrize("seed", range(60))
def test_tiling_agrees_with_counting(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
    boxes = split(rng, Box((0,) * len(shape), shape), depth=4)
    rng.shuffle(boxes)
    assert tiling_problem(shape, boxes) is None
    # Damage it: a box lost, or doubled, or another one put in its place.
    for damaged in (boxes[1:], [*boxes, boxes[0]], [random_box(rng, shape), *boxes[1:]]):
        exact = bool((count(shape, damaged) == 1).all())
        assert (tiling_problem(shape, damaged) is None) == exact


def test_problems_are_named():
    assert "gap" in tiling_problem((4,), [Box((0,), (3,))])
    assert "gap" in tiling_problem((4,), [])
    assert "overlap" in tiling_problem((4,), [Box((0,), (3,)), Box((2,), (2,))])
    for outside in (Box((2,), (3,)), Box((0,), (0,)), Box((-1,), (2,)), Box((0, 0), (4, 1))):
        assert "no part of" in tiling_problem((4,), [outside])


def test_scalar():
    assert tiling_problem((), [Box((), ())]) is None
    assert "overlap" in tiling_problem((), [Box((), ())] * 2)
    assert "gap" in tiling_problem((), [])


@pytest.mark.parametrize("seed", range(30))
def test_intersection_agrees_with_counting(seed):
    rng = random.Random(seed)
    shape = (4, 5, 3)
    a, b = random_box(rng, shape), random_box(rng, shape)
    common = a.intersect(b)
    expected = count(shape, [a, b]) == 2
    assert common == b.intersect(a)
    assert (common is not None) == bool(expected.any())
    if common:
        assert np.array_equal(count(shape, [common]) == 1, expected)
        # The same entries, seen from inside either box.
        values = np.arange(60).reshape(shape)
        full = Box((0, 0, 0), shape)
        inside = [values[box.slices_in(full)][common.slices_in(box)] for box in (a, b)]
        assert np.array_equal(*inside)
        assert np.array_equal(inside[0], values[common.slices_in(full)])
