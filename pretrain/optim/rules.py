"""What an update rule is, and AdamW.

A rule updates fp32 masters from fp32 gradients; it knows nothing of ownership, clipping or bf16. To add one:
  1. write a class with the members of `Rule`, here or in a file of its own, with a slow reference in its test;
  2. enter it in `sharded.make_rules` and give it a name in `routing.RuleName`;
  3. let `routing.route` send tensors to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pretrain.config.schema import OptimConfig
from pretrain.model.shards import Shard
from pretrain.optim.ages import Block
from pretrain.optim.routing import Route


@dataclass(frozen=True)
class Slot:
    """A shard this rank owns, with what its update needs. All tensors are fp32 and have the parameter's shape."""

    shard: Shard
    route: Route
    master: torch.Tensor
    """The weights; the parameter itself when that is fp32."""
    state: dict[str, torch.Tensor]
    """What the rule remembers, by name, e.g. `exp_avg`."""
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
            torch._foreach_mul_(mine, 1 - lr * self.route.weight_decay)
            torch._foreach_add_(mine, [update[part] for part in parts], alpha=-lr)


class Rule(Protocol):
    """How masters move."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Tensors a rule keeps per parameter; they start at zero."""

    def flops(self, shard: Shard) -> int:
        """Floating point operations of one update of a shard; 0 for a rule that only streams through memory."""

    def update(self, slots: list[Slot], grads: list[torch.Tensor], *, lr_ratios: Sequence[float], step: int) -> None:
        """Move the masters of `slots`. `lr_ratios`: learning rate over the peak, by age. `step` counts from 1."""


class AdamW:
    """AdamW as torch.optim.AdamW has it: decoupled decay on the old weights, bias correction, eps outside the root."""

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def flops(self, shard: Shard) -> int:
        """Nothing to speak of: an update is bound by memory."""
        return 0

    def update(self, slots: list[Slot], grads: list[torch.Tensor], *, lr_ratios: Sequence[float], step: int) -> None:
        """One fused pass over all tensors that share a learning rate and decay; tensors with several rates one by one.

        Bias correction counts the steps of the run for new entries, too: zero moments make their first update
        (1 - b1) / sqrt(1 - b2) of a usual one, 0.447 for (0.9, 0.95).
        """
        batches: dict[tuple[float, float], list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
        mixed = []
        for slot, grad in zip(slots, grads, strict=True):
            rates = slot.rates(lr_ratios)
            if len(rates) == 1:
                batches[next(iter(rates)), slot.route.weight_decay].append((slot, grad))
            else:
                mixed.append((slot, grad))
        for (lr, weight_decay), batch in batches.items():
            members, their_grads = [slot for slot, _ in batch], [grad for _, grad in batch]
            masters = [slot.master for slot in members]
            self._step(members, their_grads, masters, lr=lr, weight_decay=weight_decay, step=step)
        if mixed:
            self._step_mixed(mixed, lr_ratios, step)

    def _step_mixed(self, members: list[tuple[Slot, torch.Tensor]], lr_ratios: Sequence[float], step: int) -> None:
        """Tensors, with their gradients, that have entries of several learning rates."""
        # One memory for the updates of all: fresh pages cost more than the arithmetic (measured on a CPU).
        scratch = torch.empty_like(max((slot.master for slot, _ in members), key=torch.numel)).view(-1)
        for slot, grad in members:
            # A step of -1 from zero is the update itself; and one pass over memory moves the moments, too.
            update = scratch[: grad.numel()].view_as(slot.master).zero_()
            self._step([slot], [grad], [update], lr=-1.0, weight_decay=0.0, step=step)
            slot.apply(slot.shard.view(update), lr_ratios)

    def _step(
        self,
        slots: list[Slot],
        grads: list[torch.Tensor],
        params: list[torch.Tensor],
        *,
        lr: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """`adamw_` on `params` with the moments of `slots`."""
        adamw_(
            params,
            grads,
            [slot.state["exp_avg"] for slot in slots],
            [slot.state["exp_avg_sq"] for slot in slots],
            lr=lr,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            eps=self._config.eps,
            weight_decay=weight_decay,
            step=step,
        )


def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW update of many fp32 tensors, in place:

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    One pass over memory where a chain of foreach operations makes about ten (measured on one core: 5 times faster).
    """
    step_tensor = torch.tensor(float(step), device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step_tensor] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
