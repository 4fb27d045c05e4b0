"""What a round makes of the mean of the sites' weights: DiLoCo's outer optimizer, in host memory.

DiLoCo (arXiv 2311.08105, algorithm 1, line 14) takes the way from where the last round left the weights to their mean
over the sites for a negative gradient, and makes a step of SGD with Nesterov momentum along it. As torch.optim.SGD
writes it, with anchor a, mean m, velocity v, momentum mu:

    g = a - m,    v <- mu v + g,    a <- a - lr (g + mu v)

Learning rate 1 and momentum 0 give the mean itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.optim.rules import Slot
from pretrain.optim.sharded import located

OUTER_PREFIX = "outer."


class Nesterov:
    """Anchor and velocity of the weights that all sites train, of the slots this rank owns; fp32, on the host.

    They are the same at all sites, as what they are made of is.
    """

    def __init__(self, slots: Sequence[Slot], *, lr: float, momentum: float) -> None:
        """Begins at the masters of `slots`."""
        self._slots = slots
        self._lr, self._momentum = lr, momentum
        # A copy also where the master is on the host already.
        self.anchors = [slot.master.detach().to("cpu", copy=True) for slot in slots]
        self.velocities = [torch.zeros_like(anchor) for anchor in self.anchors]

    @torch.no_grad()
    def step(self, means: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Move by one round; returns the new weights."""
        if self.anchors:
            gradients = torch._foreach_sub(self.anchors, list(means))
            torch._foreach_mul_(self.velocities, self._momentum)
            torch._foreach_add_(self.velocities, gradients)
            torch._foreach_add_(gradients, self.velocities, alpha=self._momentum)
            torch._foreach_add_(self.anchors, gradients, alpha=-self._lr)
        return self.anchors

    def state(self) -> list[torch.Tensor]:
        """What a site that was away needs: anchors, then velocities."""
        return [*self.anchors, *self.velocities]

    @torch.no_grad()
    def take(self, state: Sequence[torch.Tensor]) -> None:
        """Take over another site's `state`."""
        if self.anchors:
            torch._foreach_copy_(self.state(), list(state))

    def begin_again(self) -> None:
        """Anchor at the masters as they are, at rest."""
        for slot, anchor, velocity in zip(self._slots, self.anchors, self.velocities, strict=True):
            anchor.copy_(slot.master)
            velocity.zero_()

    def named_state(self) -> list[ShardedTensor]:
        """The tensors for a checkpoint: `outer.<name>.<key of the weight>`."""
        named = {"anchor": self.anchors, "velocity": self.velocities}
        return [
            located(slot.shard, tensor, f"{OUTER_PREFIX}{name}.{slot.shard.key}")
            for name, tensors in named.items()
            for slot, tensor in zip(self._slots, tensors, strict=True)
        ]
