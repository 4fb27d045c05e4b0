"""Ages: which growth of the model brought an entry of a tensor in, for learning rates per entry.

Age 0 was there from the start of the run, age n came with the n-th growth. Growth widens axes, so that the age of an
entry is the largest of one number per axis index: small vectors describe any tensor, and the entries of one age are a
few rectangular blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pretrain.model.logical import LogicalTensor

Ages = Callable[[LogicalTensor], Sequence[np.ndarray]]
"""Logical tensor -> one vector of whole numbers per axis, as long as the axis; an entry's age is the largest of its
indices'. A layer that is new as a whole says so on its first axis."""


@dataclass(frozen=True)
class Block:
    """Entries of one age."""

    age: int
    where: tuple[slice, ...]
    """Their place in a shard's box, per logical axis."""


def blocks(vectors: Sequence[np.ndarray], offset: Sequence[int], shape: Sequence[int]) -> list[Block]:
    """The box at `offset` of extent `shape`, cut into blocks of one age each that cover every entry once.

    vectors: what `Ages` gives for the tensor.
    """
    local = [vector[start : start + size] for vector, start, size in zip(vectors, offset, shape, strict=True)]
    assert [len(vector) for vector in local] == list(shape), f"ages of {[len(v) for v in vectors]} for {offset} {shape}"
    return [Block(age, where) for age, where in _cut(local, 0)]


def _cut(vectors: Sequence[np.ndarray], at_least: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Blocks of the product of the axes, where something outside of them makes every entry `at_least` so old."""
    if not vectors:
        yield at_least, ()
        return
    # Differences that the other axes always outdo are none: a new layer is one block, however its axes grew before.
    floor = max(at_least, *(int(vector.min()) for vector in vectors))
    for age, run in _runs(np.maximum(vectors[0], floor)):
        for result, rest in _cut(vectors[1:], age):
            yield result, (run, *rest)


def _runs(vector: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Longest stretches of one value."""
    ends = [0, *(np.flatnonzero(np.diff(vector)) + 1).tolist(), len(vector)]
    for start, stop in pairwise(ends):
        yield int(vector[start]), slice(start, stop)
