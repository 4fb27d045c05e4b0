"""AdamW, and the rules that are Adam with a twist: NAdamW, Cautious AdamW, MARS, Adam-mini; Lion and the plain sign.

Conventions of all, as in arXiv 2509.02046: g is the clipped gradient, step t counts from 1, ^ is bias correction,
eps stands outside the root, decay is decoupled, uses the old weights and the current learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from pretrain.config.optim import OptimConfig
from pretrain.optim.matrices import matrix_numels, matrix_sums, spread_matrices
from pretrain.optim.rules import DirectionRule, Rule, Slot, batches, states
from pretrain.optim.states import row_axes
from pretrain.optim.tensor_parallel import TensorParallel


class AdamW(Rule):
    """AdamW as torch.optim.AdamW has it: decoupled decay on the old weights, bias correction, eps outside the root."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, lr_ratios: Sequence[float], step: int
    ) -> None:
        """One fused pass over all tensors that share a learning rate and decay; tensors with several rates one by one.

        Bias correction counts the steps of the run for new entries, too: zero moments make their first update
        (1 - b1) / sqrt(1 - b2) of a usual one, 0.447 for (0.9, 0.95).
        """
        alike: dict[tuple[float, float], list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
        mixed = []
        for slot, grad in zip(slots, grads, strict=True):
            rates = slot.rates(lr_ratios)
            if len(rates) == 1:
                alike[next(iter(rates)), slot.route.weight_decay].append((slot, grad))
            else:
                mixed.append((slot, grad))
        for (lr, weight_decay), batch in alike.items():
            members, their_grads = [slot for slot, _ in batch], [grad for _, grad in batch]
            masters = [slot.master for slot in members]
            self._step(members, their_grads, masters, lr=lr, weight_decay=weight_decay, step=step)
        for slot, direction in self.directions([s for s, _ in mixed], [g for _, g in mixed], step=step):
            slot.apply(direction, lr_ratios)

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """mhat / (sqrt(vhat) + eps) of every slot, as a logical box that the next one overwrites."""
        if not slots:
            return
        # One memory for the updates of all: fresh pages cost more than the arithmetic (measured on a CPU).
        scratch = torch.empty_like(max((slot.master for slot in slots), key=torch.numel)).view(-1)
        for slot, grad in zip(slots, grads, strict=True):
            # A step of -1 from zero is the update itself; and one pass over memory moves the moments, too.
            update = scratch[: grad.numel()].view_as(slot.master).zero_()
            self._step([slot], [grad], [update], lr=-1.0, weight_decay=0.0, step=step)
            yield slot, slot.shard.view(update)

    def _step(
        self,
        slots: Sequence[Slot],
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
            states(slots, "exp_avg"),
            states(slots, "exp_avg_sq"),
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


class Mars(AdamW):
    """MARS in its approximate form (arXiv 2411.10438): AdamW on

    c = g + gamma b1 / (1 - b1) (g - previous g),

    where the previous gradient is that of the step before on its own batch, raw, and c is clipped in the place of g, by
    its global norm. Before the first step, and for entries that a growth brings in, the previous gradient is zero.
    """

    corrects = True

    def __init__(self, config: OptimConfig) -> None:
        super().__init__(config)
        self._weight = config.mars.gamma * config.beta1 / (1 - config.beta1)

    def corrected(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int) -> list[torch.Tensor]:
        """c of every gradient; remembers the gradients."""
        previous = states(slots, "previous_grad")
        result = torch._foreach_mul(list(grads), 1 + self._weight)
        torch._foreach_add_(result, previous, alpha=-self._weight)
        torch._foreach_copy_(previous, list(grads))
        return list(result)


class NAdamW(DirectionRule):
    """NAdamW with optax's Nesterov form:

    u = [b1 m_t / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)] / (sqrt(vhat) + eps)

    torch.optim.NAdam is the same for `momentum_decay` so large that its schedule of b1 is over at once, 1e6.
    """

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """The Nesterov step of every slot."""
        b1 = self._config.beta1
        for members, their_grads in batches(slots, grads):
            roots = _move_moments(members, their_grads, self._config, step)
            tops = torch._foreach_mul(states(members, "exp_avg"), b1 / (1 - b1 ** (step + 1)))
            torch._foreach_add_(tops, their_grads, alpha=(1 - b1) / (1 - b1**step))
            torch._foreach_div_(tops, roots)
            yield from _as_boxes(members, tops)


class Cautious(DirectionRule):
    """Cautious AdamW (arXiv 2411.16085): of AdamW's u only entries that agree with the gradient's sign, scaled up:

    u * mask / (mean(mask) + 1e-8), mask = [u g > 0]

    The mean is over each matrix of the unsharded tensor (each expert apart; gate, up, queries, keys and values, too),
    so that it depends on no layout. The study took it over all layers at once, which stacked layers make of the rule;
    the rule's authors take it per tensor.
    """

    def __init__(self, config: OptimConfig, parallel: TensorParallel) -> None:
        self._config, self._parallel = config, parallel

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """The masked AdamW step of every slot."""
        for members, their_grads in batches(slots, grads):
            roots = _move_moments(members, their_grads, self._config, step)
            tops = torch._foreach_div(states(members, "exp_avg"), roots)
            torch._foreach_mul_(tops, 1 / (1 - self._config.beta1**step))
            masks = [(top * grad > 0).to(top.dtype) for top, grad in zip(tops, their_grads, strict=True)]
            torch._foreach_mul_(tops, masks)
            counts = [matrix_sums(s.shard.logical, s.shard.view(mask)) for s, mask in zip(members, masks, strict=True)]
            self._parallel.sum_(members, counts)
            for (slot, box), count in zip(_as_boxes(members, tops), counts, strict=True):
                logical = slot.shard.logical
                share = (count / matrix_numels(logical, box)).float()
                yield slot, box.div_(spread_matrices(logical, share + 1e-8, box))


class AdamMini(DirectionRule):
    """Adam-mini (arXiv 2406.16793): Adam whose second moment is one number for many weights, the mean of g^2:

    of a whole head for queries and keys, of an output row for every other matrix, of a token's row in embedding and
    output layer; norm gains have plain Adam.
    """

    def __init__(self, config: OptimConfig, parallel: TensorParallel) -> None:
        self._config, self._parallel = config, parallel

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """mhat over the root of the mean square of every slot."""
        b1, b2 = self._config.beta1, self._config.beta2
        for members, their_grads in batches(slots, grads):
            torch._foreach_lerp_(states(members, "exp_avg"), their_grads, 1 - b1)
            means = self._mean_squares(members, their_grads)
            for slot, mean in zip(members, means, strict=True):
                second = slot.state["exp_avg_sq"].lerp_(mean, 1 - b2)
                root = (second / (1 - b2**step)).sqrt_().add_(self._config.eps)
                box = slot.shard.view(slot.state["exp_avg"]) / _spread(slot, root)
                yield slot, box.mul_(1 / (1 - b1**step))

    def _mean_squares(self, slots: Sequence[Slot], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The mean of g^2 over the unsharded weights that share a second moment, per slot in the shape of that."""
        sums = []
        for slot, grad in zip(slots, grads, strict=True):
            logical = slot.shard.logical
            kept = row_axes(logical)
            summed = [i for i, axis in enumerate(logical.axes) if axis not in kept]
            squares = slot.shard.view(grad).square()
            sums.append(squares.sum(summed) if summed else squares)
        self._parallel.sum_(slots, sums, over=lambda logical, axis: axis not in row_axes(logical))
        for slot, total in zip(slots, sums, strict=True):
            logical = slot.shard.logical
            kept = row_axes(logical)
            for axis, size in zip(logical.axes, logical.shape, strict=True):
                if axis not in kept:
                    total.div_(size)
            if "qkv_slot" in kept:
                # Queries and keys, all but the last slot, share one number over the channels of a head.
                of_heads = total[:, :-1]
                of_heads.copy_(of_heads.mean(-1, keepdim=True).expand_as(of_heads))
        return sums


class Lion(DirectionRule):
    """Lion (arXiv 2302.06675): u = sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """The sign of every slot."""
        for members, their_grads in batches(slots, grads):
            averages = states(members, "exp_avg")
            signs = torch._foreach_lerp(averages, their_grads, 1 - self._config.beta1)
            torch._foreach_sign_(signs)
            torch._foreach_lerp_(averages, their_grads, 1 - self._config.beta2)
            yield from _as_boxes(members, signs)


class Signum(DirectionRule):
    """The sign of the gradients' average, m = b1 m + (1 - b1) g: Scion's rule for what is no hidden matrix."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config

    def directions(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, step: int
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        """The sign of every slot."""
        for members, their_grads in batches(slots, grads):
            averages = states(members, "momentum")
            torch._foreach_lerp_(averages, their_grads, 1 - self._config.beta1)
            signs = [average.sign() for average in averages]
            yield from _as_boxes(members, signs)


def _move_moments(
    slots: Sequence[Slot], grads: Sequence[torch.Tensor], config: OptimConfig, step: int
) -> tuple[torch.Tensor, ...]:
    """Move both of Adam's moments; returns sqrt(vhat) + eps."""
    second = states(slots, "exp_avg_sq")
    torch._foreach_lerp_(states(slots, "exp_avg"), list(grads), 1 - config.beta1)
    torch._foreach_mul_(second, config.beta2)
    torch._foreach_addcmul_(second, list(grads), list(grads), 1 - config.beta2)
    roots = torch._foreach_div(second, 1 - config.beta2**step)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, config.eps)
    return roots


def _as_boxes(slots: Sequence[Slot], updates: Sequence[torch.Tensor]) -> Iterator[tuple[Slot, torch.Tensor]]:
    for slot, update in zip(slots, updates, strict=True):
        yield slot, slot.shard.view(update)


def _spread(slot: Slot, rows: torch.Tensor) -> torch.Tensor:
    """Numbers per row with the axes that the rows run over put back, to be broadcast over the box."""
    kept = row_axes(slot.shard.logical)
    shape = [size if axis in kept else 1 for axis, size in zip(slot.shard.logical.axes, slot.shard.shape, strict=True)]
    return rows.view(shape)
