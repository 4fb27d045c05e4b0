"""What an update rule is, and AdamW.

A rule updates fp32 masters from fp32 gradients; it knows nothing of ownership, clipping or bf16. To add one:
  1. write a class with the members of `Rule`, here or in a file of its own, with a slow reference in its test;
  2. enter it in `sharded.make_rules` and give it a name in `routing.RuleName`;
  3. let `routing.route` send tensors to it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch

from pretrain.config.schema import OptimConfig
from pretrain.model.shards import Shard
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


class Rule(Protocol):
    """How masters move."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Tensors a rule keeps per parameter; they start at zero."""

    def flops(self, shard: Shard) -> int:
        """Floating point operations of one update of a shard; 0 for a rule that only streams through memory."""

    def update(self, slots: list[Slot], grads: list[torch.Tensor], *, lr_ratio: float, step: int) -> None:
        """Move the masters of `slots`. `step` counts updates from 1."""


class AdamW:
    """AdamW as torch.optim.AdamW has it: decoupled decay on the old weights, bias correction, eps outside the root."""

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def flops(self, shard: Shard) -> int:
        """Nothing to speak of: an update is bound by memory."""
        return 0

    def update(self, slots: list[Slot], grads: list[torch.Tensor], *, lr_ratio: float, step: int) -> None:
        """One fused pass over all tensors that share a learning rate and decay."""
        batches: dict[Route, list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
        for slot, grad in zip(slots, grads, strict=True):
            batches[slot.route].append((slot, grad))
        for route, batch in batches.items():
            adamw_(
                [slot.master for slot, _ in batch],
                [grad for _, grad in batch],
                [slot.state["exp_avg"] for slot, _ in batch],
                [slot.state["exp_avg_sq"] for slot, _ in batch],
                lr=route.lr * lr_ratio,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                eps=self._config.eps,
                weight_decay=route.weight_decay,
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
