"""What an update rule is.

A rule updates fp32 masters from fp32 gradients; it knows nothing of ownership, clipping or bf16. To add one:
  1. name it in `config.optim` (Kind or RuleName) with its keys, and say in `routing` which tensors get it;
  2. say in `states._states` what it keeps for a weight;
  3. write a class here, or in a file of its own, with a slow reference in its test, and enter it in `registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pretrain.model.shards import Shard
from pretrain.optim.ages import Block
from pretrain.optim.routing import Route

# Entries of the weights that share temporary memory of a rule: enough to hide the launch of a batched operation, little
# beside a model. A guess.
BATCH_NUMEL = 1 << 24
# The same on a CPU, which has no launch to hide and whose caches hold a few million numbers at the most: with groups of
# this size NAdamW and Lion took 0.7 of the time (2.5 million weights, one core).
CPU_BATCH_NUMEL = 1 << 20


@dataclass(frozen=True)
class Slot:
    """A shard this rank owns, with what its update needs; fp32."""

    shard: Shard
    route: Route
    master: torch.Tensor
    """The weights in the parameter's shape; the parameter itself when that is fp32."""
    state: dict[str, torch.Tensor]
    """What the rule remembers, by name, e.g. `exp_avg`: in the parameter's shape where it has an entry for every
    weight, else as the box that `State.box` says."""
    blocks: tuple[Block, ...]
    """The box cut by age; one block of age 0 where nothing grew."""

    def rates(self, lr_ratios: Sequence[float]) -> dict[float, list[tuple[slice, ...]]]:
        """Learning rate -> the parts of the logical box that move with it; () is the whole box.

        lr_ratios: learning rate over the peak, by age.
        """
        found: dict[float, list[tuple[slice, ...]]] = defaultdict(list)
        for block in self.blocks:
            found[self.route.lr * lr_ratios[block.age]].append(block.where)
        return found if len(found) > 1 else {lr: [()] for lr in found}

    def apply(self, update: torch.Tensor, lr_ratios: Sequence[float]) -> None:
        """theta = theta - lr weight_decay theta - lr update, every entry with its own learning rate.

        update: a logical box.
        """
        weights = self.shard.view(self.master)
        for lr, parts in self.rates(lr_ratios).items():
            mine = [weights[part] for part in parts]
            if self.route.weight_decay:
                torch._foreach_mul_(mine, 1 - lr * self.route.weight_decay)
            torch._foreach_add_(mine, [update[part] for part in parts], alpha=-lr)


class Rule(ABC):
    """How masters move."""

    corrects = False
    """Whether `corrected` does anything."""

    def flops(self, shard: Shard) -> int:
        """Floating point operations of one update of a shard; 0 for a rule that only streams through memory."""
        return 0

    def corrected(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int) -> list[torch.Tensor]:
        """What stands for the gradients from here on, clipped like them; `step` counts from 1."""
        return list(grads)

    @abstractmethod
    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, lr_ratios: Sequence[float], step: int
    ) -> None:
        """Move the masters of `slots`. `lr_ratios`: learning rate over the peak, by age. `step` counts from 1.

        `slots` are either dense weights or experts. Collective over their tensor-parallel group, whose ranks own parts
        of the same tensors in the same order.
        """


class DirectionRule(Rule):
    """A rule that finds a direction u from gradients and state: theta = theta - lr weight_decay theta - lr u."""

    @abstractmethod
    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Every slot once, in any order, with its direction as a logical box. Lazy: few are in memory at once."""

    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, lr_ratios: Sequence[float], step: int
    ) -> None:
        """Apply `directions`."""
        for slot, direction in self.directions(slots, grads, step=step):
            slot.apply(direction, lr_ratios)


def batches(slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> Iterator[tuple[list[Slot], list[torch.Tensor]]]:
    """Slots and their gradients in groups of about BATCH_NUMEL entries, for operations on many tensors at once."""
    for group in in_batches(list(zip(slots, grads, strict=True))):
        yield [slot for slot, _ in group], [grad for _, grad in group]


def in_batches(members: Iterable[tuple[Slot, torch.Tensor]]) -> Iterator[list[tuple[Slot, torch.Tensor]]]:
    """Slots with a tensor each in groups of about BATCH_NUMEL entries (on a CPU CPU_BATCH_NUMEL), in order."""
    group: list[tuple[Slot, torch.Tensor]] = []
    size = 0
    for slot, tensor in members:
        group.append((slot, tensor))
        size += tensor.numel()
        if size >= (min(BATCH_NUMEL, CPU_BATCH_NUMEL) if tensor.device.type == "cpu" else BATCH_NUMEL):
            yield group
            group, size = [], 0
    if group:
        yield group


def states(slots: Sequence[Slot], name: str) -> list[torch.Tensor]:
    """One state of many slots."""
    return [slot.state[name] for slot in slots]
