"""The expert layer on grouped rows in plain torch: one autograd function over two ways to multiply.

Written out by hand, and not left to autograd, for what it saves: only x and the pre-activations are kept, and experts
that do not train cost no weight gradient. Letters: E experts, R rows, D model width, F expert width, H = 2F.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


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
) -> torch.Tensor:
    """See `pretrain_kernels.swiglu_experts` with `Grouped`."""
    return _Experts.apply(x, fc1, fc2, scores, rows_per_expert, trainable, products, accumulate_main_grad)


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
    ) -> torch.Tensor:
        x = x.contiguous()
        h = products.rows(x, fc1.transpose(1, 2), rows_per_expert)
        ctx.save_for_backward(x, h, fc1, fc2, scores, rows_per_expert, trainable)
        ctx.products, ctx.accumulate_main_grad = products, accumulate_main_grad
        gate, up = h.chunk(2, dim=-1)
        return products.rows(_weighted(F.silu(gate) * up, scores), fc2.transpose(1, 2), rows_per_expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, fc1, fc2, scores, rows_per_expert, trainable = ctx.saved_tensors
        products = ctx.products
        wants_x, wants_fc1, wants_fc2, wants_scores = ctx.needs_input_grad[:4]
        dy = grads[0].contiguous()  # a sum's gradient has no memory of its own, which grouped_mm refuses
        gate, up = h.chunk(2, dim=-1)
        silu = F.silu(gate)
        active = silu * up
        dx = dfc1 = dfc2 = dscores = None
        if wants_fc2:
            weighted = _weighted(active, scores)
            dfc2 = products.weight_gradient(dy, weighted, rows_per_expert, trainable)
            dfc2 = hand_over(fc2, dfc2, accumulate_main_grad=ctx.accumulate_main_grad)
        if wants_x or wants_fc1 or wants_scores:
            dweighted = products.rows(dy, fc2, rows_per_expert)
            if wants_scores:
                dscores = torch.linalg.vecdot(dweighted.to(scores.dtype), active.to(scores.dtype))
            dactive = _weighted(dweighted, scores)
            dh = torch.empty_like(h)
            dgate, dup = dh.chunk(2, dim=-1)
            torch.mul(dactive, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dactive * up, gate, grad_input=dgate)
            if wants_x:
                dx = products.rows(dh, fc1, rows_per_expert)
            if wants_fc1:
                dfc1 = products.weight_gradient(dh, x, rows_per_expert, trainable)
                dfc1 = hand_over(fc1, dfc1, accumulate_main_grad=ctx.accumulate_main_grad)
        return dx, dfc1, dfc2, dscores, None, None, None, None


def _weighted(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Rows times their scores, multiplied in the scores' precision."""
    return (rows * scores.unsqueeze(-1)).to(rows.dtype)


def hand_over(weight: torch.Tensor, gradient: torch.Tensor, *, accumulate_main_grad: bool) -> torch.Tensor | None:
    """What backward returns for `weight`: the gradient, or a stand-in once it is in `weight.main_grad`.

    See `accumulate_main_grad` of `pretrain_kernels.swiglu_experts`.
    """
    if not accumulate_main_grad:
        return gradient
    weight.main_grad.add_(gradient)  # type: ignore[attr-defined]
    return taken_over(weight)


def taken_over(weight: torch.Tensor) -> torch.Tensor | None:
    """Tell megatron-core's DDP that `weight.main_grad` has this gradient; return what its hook wants to find."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # It adds the gradient all the same where this mark asks for zeros.
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight, requires_grad=False)
    return torch.empty_like(weight, requires_grad=False)
