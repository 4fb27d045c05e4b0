"""Blocks of the matrices inside a logical tensor: what SOAP and Kron precondition, each on its own.

A block lies within one matrix of the stack (one head, one expert, gate or up) and within one tensor-parallel part, so
that a shard has whole blocks, no rank needs another's, and no layout changes an update. Blocks are handled in batches
[N, rows, columns], numbered in the order in which `states.block_axes` puts the blocks of a state.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch

from pretrain.model.shards import Shard
from pretrain.optim.rules import BATCH_NUMEL, DirectionRule, Slot
from pretrain.optim.states import BLOCKS, block_axes, block_shape


class Blocks:
    """The blocks of a shard, with sides up to `largest`."""

    def __init__(self, shard: Shard, largest: int) -> None:
        self._shard = shard
        logical = shard.logical
        self._sides = dict(zip(block_axes(logical), block_shape(logical, largest), strict=True))
        self.rows, self.columns = self._sides.values()
        # Extents of the box with the two block axes split in (block, place in the block).
        self._split: dict[str, int] = {}
        for axis, start, size in zip(logical.axes, shard.offset, shard.shape, strict=True):
            side = self._sides.get(axis, 1)
            assert start % side == size % side == 0, f"{shard.key}: {axis} is cut inside a block of {side}"
            self._split |= {axis + BLOCKS: size // side, axis: side} if axis in self._sides else {axis: size}
        stack = [axis for axis in logical.axes if axis not in self._sides]
        self._grid = [*stack, *(axis + BLOCKS for axis in self._sides)]
        self._order = [list(self._split).index(axis) for axis in (*self._grid, *self._sides)]

    @property
    def count(self) -> int:
        """Number of blocks in the shard."""
        return math.prod(self._split[axis] for axis in self._grid)

    @cached_property
    def numbers(self) -> list[int]:
        """The number of every block among all blocks of the unsharded tensor."""
        logical = self._shard.logical
        places = dict(zip(logical.axes, zip(self._shard.offset, logical.shape, strict=True), strict=True))
        numbers = torch.zeros(1, dtype=torch.int64)
        for name in self._grid:
            axis = name.removesuffix(BLOCKS)
            side = self._sides.get(axis, 1)
            start, whole = (value // side for value in places[axis])
            here = torch.arange(start, start + self._split[name])
            numbers = (numbers.unsqueeze(1) * whole + here).flatten()
        return [int(number) for number in numbers]

    def cut(self, box: torch.Tensor) -> torch.Tensor:
        """The blocks of the logical box; may share its memory."""
        split = box.view(list(self._split.values()))
        return split.permute(self._order).reshape(-1, self.rows, self.columns)

    def join(self, blocks: torch.Tensor) -> torch.Tensor:
        """The box whose `cut` is `blocks`."""
        sizes = list(self._split.values())
        split = blocks.view([sizes[i] for i in self._order])
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return split.permute(back).reshape(self._shard.shape)

    def batches(self) -> Iterator[slice]:
        """The blocks in groups of about BATCH_NUMEL entries."""
        size = max(1, BATCH_NUMEL // (self.rows * self.columns))
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))


class BlockRule(DirectionRule):
    """A rule that treats every block as a tensor of its own.

    Its states have the axes (stack..., blocks, blocks, row, column), but for `exp_avg`, which is like the weight.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._known: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Blocks] = {}

    @abstractmethod
    def block_directions(
        self, grads: torch.Tensor, state: Mapping[str, torch.Tensor], *, key: str, numbers: Sequence[int], step: int
    ) -> torch.Tensor:
        """Directions of a batch of blocks [N, rows, columns], of the tensor `key`; moves `state` in place.

        state: by name, all as [N, ., .]. numbers: of the blocks in the unsharded tensor. step: from 1.
        """

    @abstractmethod
    def block_flops(self, rows: int, columns: int) -> float:
        """Floating point operations of one update of a block, averaged over steps."""

    def flops(self, shard: Shard) -> int:
        """Operations of one update of all blocks of a shard."""
        blocks = self._blocks_of(shard)
        return int(blocks.count * self.block_flops(blocks.rows, blocks.columns))

    def _blocks_of(self, shard: Shard) -> Blocks:
        """The blocks of a shard; they and their numbers are found once, not every step."""
        box = (shard.key, shard.offset, shard.shape)
        if box not in self._known:
            self._known[box] = Blocks(shard, self._largest)
        return self._known[box]

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Directions of all slots, a batch of blocks at a time."""
        for slot, grad in zip(slots, grads, strict=True):
            blocks = self._blocks_of(slot.shard)
            average = slot.shard.view(slot.state["exp_avg"])
            state = {name: value.view(-1, *value.shape[-2:]) for name, value in slot.state.items() if name != "exp_avg"}
            state["exp_avg"] = blocks.cut(average)
            cut = blocks.cut(slot.shard.view(grad))
            found = torch.empty_like(cut)
            for part in blocks.batches():
                mine = {name: value[part] for name, value in state.items()}
                found[part] = self.block_directions(
                    cut[part], mine, key=slot.shard.key, numbers=blocks.numbers[part], step=step
                )
            average.copy_(blocks.join(state["exp_avg"]))
            yield slot, blocks.join(found)


def have_gradient(grads: torch.Tensor) -> torch.Tensor:
    """Which blocks of a batch [N, rows, columns] have any gradient: bool [N]."""
    return (grads != 0).flatten(1).any(1)
