"""The expert layer on grouped rows in plain torch: one autograd function over two ways to multiply.

Written out by hand, and not left to autograd, for what it saves: only x and the pre-activations are kept, and experts
that do not train cost no weight gradient. Letters: E experts, R rows, D model width, F expert width, H = 2F.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Parts = Sequence[tuple[int, torch.Tensor]]
"""Parameters that are views of consecutive experts of a weight: (the number of its first expert, the parameter)."""


class Products(ABC):
    """The products of rows with their experts' weights."""

    @abstractmethod
    def rows(self, x: torch.Tensor, weight: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        """Rows [R, I] times the matrix [I, O] of their expert, weight [E, I, O] -> [R, O]."""

    @abstractmethod
    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, rows_per_expert: torch.Tensor, trainable: torch.Tensor | None
    ) -> torch.Tensor:
        """dy^T x over each expert's rows: dy [R, O], x [R, I] -> [E, O, I], zeros for experts that do not train."""


class _Loop(Products):
    """One expert after the other. Takes everything; makes the host wait for the counts."""

    def rows(self, x: torch.Tensor, weight: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[2])
        counts = rows_per_expert.tolist()
        for rows, matrix, result in zip(x.split(counts), weight, out.split(counts), strict=True):
            torch.mm(rows, matrix, out=result)
        return out

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, rows_per_expert: torch.Tensor, trainable: torch.Tensor | None
    ) -> torch.Tensor:
        counts = rows_per_expert.tolist()
        trains = [True] * len(counts) if trainable is None else trainable.tolist()
        out = x.new_empty(len(counts), dy.shape[1], x.shape[1])
        for dy_rows, x_rows, result, train in zip(dy.split(counts), x.split(counts), out, trains, strict=True):
            if train:
                torch.mm(dy_rows.T, x_rows, out=result)
            else:
                result.zero_()
        return out


class _GroupedMM(Products):
    """torch's grouped_mm: one call for all experts; does not wait where it has a kernel for the GPU."""

    def rows(self, x: torch.Tensor, weight: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weight, offs=_ends(rows_per_expert, x.device))

    def weight_gradient(
        self, dy: torch.Tensor, x: torch.Tensor, rows_per_expert: torch.Tensor, trainable: torch.Tensor | None
    ) -> torch.Tensor:
        rows_per_expert = rows_per_expert.to(x.device)
        if trainable is not None:
            # Rows past the last end are not read: those of experts that do not train go there, and their groups are
            # empty. The sort keeps the order of the others.
            trainable = trainable.to(x.device)
            trains = trainable.repeat_interleave(rows_per_expert, output_size=x.shape[0])
            order = (~trains).to(torch.uint8).argsort(stable=True)
            dy, x, rows_per_expert = dy[order], x[order], rows_per_expert * trainable
        return F.grouped_mm(dy.T, x, offs=_ends(rows_per_expert, x.device))


# Pre-activations per block of the activation: on a CPU so many that a block stays in the cache (measured from 32 to 256
# thousand: 45 % less time in bf16 and 20 % in fp32 than all rows at once), elsewhere as many as bound the memory.
BLOCK = {"cpu": 1 << 18, "gpu": 1 << 26}

LOOP = _Loop()
GROUPED_MM = _GroupedMM()


def _ends(rows_per_expert: torch.Tensor, device: torch.device) -> torch.Tensor:
    return rows_per_expert.to(device).cumsum(0).to(torch.int32)


def grouped_experts(
    x: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    rows_per_expert: torch.Tensor,
    scores: torch.Tensor,
    *,
    trainable: torch.Tensor | None,
    products: Products,
    accumulate_main_grad: bool,
    parts: tuple[Parts, Parts] | None,
) -> torch.Tensor:
    """See `pretrain_kernels.swiglu_experts` with `Grouped`."""
    both = parts or (None, None)
    return _Experts.apply(x, fc1, fc2, scores, rows_per_expert, trainable, products, accumulate_main_grad, both)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        fc1: torch.Tensor,
        fc2: torch.Tensor,
        scores: torch.Tensor,
        rows_per_expert: torch.Tensor,
        trainable: torch.Tensor | None,
        products: Products,
        accumulate_main_grad: bool,
        parts: tuple[Parts | None, Parts | None],
    ) -> torch.Tensor:
        x = x.contiguous()
        h = products.rows(x, fc1.transpose(1, 2), rows_per_expert)
        ctx.save_for_backward(x, h, fc1, fc2, scores, rows_per_expert, trainable)
        ctx.products, ctx.accumulate_main_grad, ctx.parts = products, accumulate_main_grad, parts
        return products.rows(_swiglu(h, scores), fc2.transpose(1, 2), rows_per_expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, fc1, fc2, scores, rows_per_expert, trainable = ctx.saved_tensors
        products = ctx.products
        wants_x, wants_fc1, wants_fc2, wants_scores = ctx.needs_input_grad[:4]
        dy = grads[0].contiguous()  # a sum's gradient has no memory of its own, which grouped_mm refuses
        active = dx = dfc1 = dfc2 = dscores = None
        if wants_x or wants_fc1 or wants_scores:
            dh, active, dscores = _swiglu_backward(products.rows(dy, fc2, rows_per_expert), h, scores)
            if wants_x:
                dx = products.rows(dh, fc1, rows_per_expert)
            if wants_fc1:
                dfc1 = products.weight_gradient(dh, x, rows_per_expert, trainable)
                dfc1 = hand_over(fc1, dfc1, accumulate_main_grad=ctx.accumulate_main_grad, parts=ctx.parts[0])
        if wants_fc2:
            active = _swiglu(h, scores) if active is None else active
            dfc2 = products.weight_gradient(dy, active, rows_per_expert, trainable)
            dfc2 = hand_over(fc2, dfc2, accumulate_main_grad=ctx.accumulate_main_grad, parts=ctx.parts[1])
        return dx, dfc1, dfc2, dscores, None, None, None, None, None


def _swiglu(h: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """score silu(gate) up of pre-activations h [R, 2F], gate and up, and scores [R] -> [R, F]."""
    out = h.new_empty(h.shape[0], h.shape[1] // 2)
    for pre, score, result in zip(*_blocks(h, scores, out), strict=True):
        gate, up = _widened(pre, scores).chunk(2, dim=-1)
        result.copy_(F.silu(gate).mul_(up).mul_(score.unsqueeze(-1)))
    return out


def _swiglu_backward(
    dy: torch.Tensor, h: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dh [R, 2F], what `_swiglu` gave [R, F], gradient of the scores [R]) from the gradient dy [R, F] of `_swiglu`."""
    dh, out, dscores = torch.empty_like(h), torch.empty_like(dy), torch.empty_like(scores)
    for pre, score, d, dpre, result, dscore in zip(*_blocks(h, scores, dy, dh, out, dscores), strict=True):
        gate, up = _widened(pre, scores).chunk(2, dim=-1)
        silu, wide, weight = F.silu(gate), _widened(d, scores), score.unsqueeze(-1)
        active = silu * up
        dscore.copy_(torch.linalg.vecdot(wide, active))
        result.copy_(active.mul_(weight))
        dactive = wide * weight
        dgate, dup = dpre.chunk(2, dim=-1)
        dup.copy_(silu.mul_(dactive))
        dgate.copy_(torch.ops.aten.silu_backward(dactive.mul_(up), gate))
    return dh, out, dscores


def _blocks(h: torch.Tensor, *others: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Tensors of R rows, cut into blocks of rows that are worked on one after the other."""
    rows = max(1, BLOCK["cpu" if h.device.type == "cpu" else "gpu"] // h.shape[1])
    return [tensor.split(rows) for tensor in (h, *others)]


def _widened(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`rows` in the data type of the arithmetic between the products: at least fp32, and the scores'."""
    return rows.to(torch.promote_types(torch.promote_types(rows.dtype, scores.dtype), torch.float32))


def hand_over(
    weight: torch.Tensor, gradient: torch.Tensor, *, accumulate_main_grad: bool, parts: Parts | None
) -> torch.Tensor | None:
    """What backward returns for `weight`: the gradient, or a stand-in once it is in the `main_grad` of its parts (None:
    of `weight`).

    See `accumulate_main_grad` of `pretrain_kernels.swiglu_experts`.
    """
    if not accumulate_main_grad:
        return gradient
    for first, part in parts or [(0, weight)]:
        part.main_grad.add_(gradient[first : first + len(part)])  # type: ignore[attr-defined]
    return taken_over(weight)


def taken_over(weight: torch.Tensor) -> torch.Tensor | None:
    """Tell megatron-core's DDP that `weight.main_grad` has this gradient; return what its hook wants to find.

    The hook must not add `.grad` again, so `grad_added_to_main_grad` is set to True where the weight has that
    attribute, and `.grad` gets a tensor of undefined content, which the hook needs with overlapped reduction and drops.
    Weights without that attribute get None.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # It adds the gradient all the same where this mark asks for zeros.
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight, requires_grad=False)
    return torch.empty_like(weight, requires_grad=False)
