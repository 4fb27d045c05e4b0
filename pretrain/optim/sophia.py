"""Sophia-H (arXiv 2305.14342): momentum over an estimate of the Hessian's diagonal, clipped entry by entry.

    u = clip(mhat / max(gamma h, eps), -1, 1)

m is bias-corrected, h is not, as in arXiv 2509.02046. h starts at zero, and where it is zero u is the sign of m. h is
an average of estimates, one before every `sophia.every_steps`-th update, on the batch of that update.

**An estimate** is Hutchinson's, z (H z) with random z, and H z a central difference of gradients, (g(w + d) - g(w - d))
/ 2 with d = e z: two more passes over the batch. They are passes like any other, so that it works on every layout and
with every kernel, which second derivatives would not. z depends on seed, tensor and update alone; its numbers are drawn
on the host, for the shards a rank owns. Clipping of gradients does not touch h.

**Size of the perturbation.** e is STEP times the root mean square of the weights, of each matrix apart: gains of norms
are 50 times as large as weights of matrices, and a perturbation far below a weight is lost when it is rounded to bf16.
An estimate is exact in the mean for a quadratic whatever e is, since the signs of two entries of d are independent.

**Rounding.** d is what was applied: half the difference of the weights as the model had them, in bf16 if that is their
precision. With it the estimate is d (g(w + d) - g(w - d)) / 2 over the mean of d^2, of each matrix. In bf16, an entry
whose neighbours lie q apart has a d^2 that is larger by about q^2 / 24 in the mean, and its h with it: 4 % if q = e,
where |w| is 2 to 4 times the root mean square, and 17 % for twice that.

**Experts.** The gradient jumps where a token changes experts. The passes have to keep the choice of experts fixed
(`parallel.probe`), or jumps are all that they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pretrain.config.optim import OptimConfig
from pretrain.model.initialise import draw_normal
from pretrain.optim.matrices import matrix_numels, matrix_sums, spread_matrices
from pretrain.optim.rules import DirectionRule, Slot, batches, states
from pretrain.optim.tensor_parallel import TensorParallel

# Perturbation over the root mean square of a matrix's weights. On small models, dense and with experts, the mean of 48
# estimates was off by this much (median over tensors; against fp32 at 2^-12, same z): fp32 0.0004 at 2^-10, 0.003 at
# 2^-8, 0.02 at 2^-6, all of it curvature of higher order; bf16 0.5 at 2^-8, 0.13 at 2^-6, 0.1 at 2^-5, where most is
# rounding of activations, which averages out, but 0.07 is not.
STEP = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-6}
# Weights count as no smaller than this: a tenth or less of initial weights, so that one that starts at zero can move.
SMALLEST_RMS = 1e-4

Gradients = Callable[[], list[torch.Tensor] | None]
"""Publishes the masters as they are and passes over the batch; returns the gradients of owned shards in fp32, to be
copied if kept, or None on all ranks if any is not finite. Collective."""


@dataclass(frozen=True)
class Curvature:
    """What came of an estimate; the same on all ranks."""

    skipped: bool
    """Whether a gradient was not finite, so that h stayed as it was."""
    clipped_share: float
    """Share of the model's weights whose last update was clipped; 0 before the first update."""


class Sophia(DirectionRule):
    """The rule above."""

    def __init__(self, config: OptimConfig, parallel: TensorParallel) -> None:
        self._config, self._parallel = config, parallel

    def is_due(self, steps: int) -> bool:
        """Whether an estimate comes before the next update, after `steps` updates."""
        return steps % self._config.sophia.every_steps == 0

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """The clipped ratio of every slot."""
        for members, their_grads in batches(slots, grads):
            torch._foreach_lerp_(states(members, "exp_avg"), their_grads, 1 - self._config.beta1)
            for slot, ratio in zip(members, self._ratios(members, step), strict=True):
                yield slot, slot.shard.view(ratio.clamp_(-1.0, 1.0))

    def clipped(self, slots: Sequence[Slot], *, step: int) -> int:
        """Entries of slots that update `step`, the last one, has clipped."""
        averages = states(slots, "exp_avg")
        ratios = (ratio for members, _ in batches(slots, averages) for ratio in self._ratios(members, step))
        return sum(int((ratio.abs() > 1).sum()) for ratio in ratios)

    def _ratios(self, slots: Sequence[Slot], step: int) -> list[torch.Tensor]:
        """mhat / max(gamma h, eps), not clipped."""
        correction = 1 - self._config.beta1**step
        bottoms = torch._foreach_mul(states(slots, "hessian"), correction * self._config.sophia.gamma)
        torch._foreach_clamp_min_(bottoms, correction * self._config.eps)
        # In the same memory: fresh pages cost more than the arithmetic (measured on a CPU).
        averages = states(slots, "exp_avg")
        return [torch.div(top, bottom, out=bottom) for top, bottom in zip(averages, bottoms, strict=True)]

    def estimate(self, slots: Sequence[Slot], gradients: Gradients, *, seed: int, step: int) -> bool:
        """Move h towards an estimate at the present weights, before update `step`; returns whether it was finite.

        Collective. The masters are as before afterwards, bit for bit; they are not published again. Takes three
        copies of the weights of `slots` and one of their gradients in fp32 meanwhile.
        """
        kept = [slot.master.clone() for slot in slots]
        probed = _probe(slots, self._noise(slots, seed, step), gradients)
        torch._foreach_copy_([slot.master for slot in slots], kept)
        if probed:
            self._average(slots, *probed)
        return probed is not None

    def _noise(self, slots: Sequence[Slot], seed: int, step: int) -> list[torch.Tensor]:
        """e z of every slot, in its master's shape."""
        boxes = [slot.shard.view(slot.master) for slot in slots]
        result = []
        for slot, box, mean in zip(slots, boxes, self._mean_squares(slots, boxes), strict=True):
            logical = slot.shard.logical
            size = STEP[slot.shard.tensor.dtype] * mean.sqrt().clamp(min=SMALLEST_RMS).float()
            z = draw_normal(seed, f"curvature {step}/{logical.key}", logical.shape, slot.shard.offset, slot.shard.shape)
            noise = z.to(box.device).mul_(spread_matrices(logical, size, box))
            result.append(noise.view(slot.master.shape))
        return result

    def _average(self, slots: Sequence[Slot], moves: Sequence[torch.Tensor], changes: Sequence[torch.Tensor]) -> None:
        """Take an estimate into h. moves, changes: half the differences of weights and gradients, in their shape."""
        boxes = [slot.shard.view(move) for slot, move in zip(slots, moves, strict=True)]
        means = self._mean_squares(slots, boxes)
        for slot, box, change, mean in zip(slots, boxes, changes, means, strict=True):
            # Never zero: a matrix none of whose weights moved has an estimate of zero.
            scale = 1 / mean.float().clamp(min=torch.finfo(torch.float32).tiny)
            estimate = slot.shard.view(change).mul_(box).mul_(spread_matrices(slot.shard.logical, scale, box))
            slot.shard.view(slot.state["hessian"]).lerp_(estimate, 1 - self._config.beta2)

    def _mean_squares(self, slots: Sequence[Slot], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of every unsharded matrix that has a part in a box; fp64 [number of matrices] per slot. Collective."""
        sums = [matrix_sums(slot.shard.logical, box.square()) for slot, box in zip(slots, boxes, strict=True)]
        self._parallel.sum_(slots, sums)
        return [
            total / matrix_numels(slot.shard.logical, box) for slot, box, total in zip(slots, boxes, sums, strict=True)
        ]


def _probe(
    slots: Sequence[Slot], noise: list[torch.Tensor], gradients: Gradients
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Half the differences of weights and of gradients between masters + noise and masters - noise, in that order.

    Leaves the masters at masters - noise, but for rounding. None if a gradient is not finite.
    """
    masters = [slot.master for slot in slots]
    torch._foreach_add_(masters, noise)
    changes = gradients()
    if changes is None:
        return None
    changes = [gradient.clone() for gradient in changes]
    moves = [slot.shard.tensor.detach().to(torch.float32, copy=True) for slot in slots]
    torch._foreach_sub_(masters, noise, alpha=2.0)
    behind = gradients()
    if behind is None:
        return None
    torch._foreach_sub_(moves, [slot.shard.tensor.detach().float() for slot in slots])
    torch._foreach_sub_(changes, behind)
    torch._foreach_mul_([*moves, *changes], 0.5)
    return moves, changes
