"""The routed-expert SwiGLU MLP in Triton, as one autograd function.

R routed rows, T tokens, K experts of a token (R = T K), E experts, D model width, F expert width. With the score s_r
of row r, gate and up of x_r fc1[e]^T, the row's output is y_r = (s_r silu(gate) up) fc2[e]^T; a token's output is the
sum of its rows. Kept for backward: x, the pre-activations [R, 2F] and the routing, 2TD + 4RF bytes plus metadata in 16
bits. No atomics and no wait for the device: results repeat bit by bit, and both passes can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain_kernels.grouped import Parts, taken_over
from pretrain_kernels.triton_experts import steps
from pretrain_kernels.triton_experts.routing import Route, route_grouped, route_tokens
from pretrain_kernels.triton_experts.tiles import Tiles, choose_tiles
from pretrain_kernels.triton_support import Launch, interpreting

ROW_BYTES = 16  # tensor descriptors need rows, and the start of a tensor, at multiples of this


def swiglu_experts_triton(
    x: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *,
    scores: Tensor,
    experts: Tensor | None = None,
    rows_per_expert: Tensor | None = None,
    trainable: Tensor | None = None,
    accumulate_main_grad: bool = False,
    parts: tuple[Parts, Parts] | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Output of the experts: [T, D] for tokens, [R, D] for grouped rows, in x's dtype.

    x: [T, D] with `experts` [T, K] (each 0 .. E - 1: not checked, it is on the device) and `scores` [T, K]; or [R, D]
        grouped by expert, with `rows_per_expert` [E] that adds up to R (not checked either) and `scores` [R].
    fc1, fc2: [E, 2F, D] (gate rows, then up rows) and [E, D, F], in x's dtype: bf16 or fp16, fp32 in the interpreter
        alone. D and F are multiples of 8 (of 4 in fp32).
    trainable: bool [E]; the others get a zero weight gradient without computing it, and pass gradients on.
    accumulate_main_grad: add the weight gradients straight to `fc1.main_grad` and `fc2.main_grad` (contiguous, of the
        weight's shape, usually fp32). As in megatron-core's fused linears: where the parameter has
        `grad_added_to_main_grad`, it is set, and the gradient that autograd sees has undefined values (zeros with
        `zero_out_wgrad`), which the data parallel hook drops; elsewhere it is None. Nobody may read `.grad` then.
    parts: with accumulate_main_grad, for fc1 and for fc2 the parameters that are added to, where those are views of
        them; one launch each.
    tiles: block sizes; by default from the table.

    Gradients: x, fc1, fc2, scores; not twice differentiable. Raises ValueError where the Triton kernels do not apply.
    """
    _check(x, fc1, fc2, experts=experts, rows_per_expert=rows_per_expert)
    count, _, hidden = fc2.shape
    if tiles is None:
        major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
        capability = 10 * major + minor
        tiles = choose_tiles(rows=scores.numel(), experts=count, width=hidden, capability=capability)
    differentiable = any(tensor.requires_grad for tensor in (x, fc1, fc2, scores))
    keep = torch.is_grad_enabled() and differentiable
    with torch.cuda.device_of(x):
        return _SwigluExperts.apply(  # type: ignore[no-untyped-call]
            x, fc1, fc2, scores, experts, rows_per_expert, trainable, accumulate_main_grad, parts or (None, None),
            tiles, keep,
        )  # fmt: skip


class _SwigluExperts(torch.autograd.Function):
    """See `swiglu_experts_triton`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc1: Tensor, fc2: Tensor, scores: Tensor, experts: Tensor | None,
        rows_per_expert: Tensor | None, trainable: Tensor | None, accumulate: bool,
        parts: tuple[Parts | None, Parts | None], tiles: Tiles, keep: bool,
    ) -> Tensor:  # fmt: skip
        ctx.parts = parts
        ctx.accumulate, ctx.tiles, ctx.scores_dtype, ctx.x_shape = accumulate, tiles, scores.dtype, x.shape
        ctx.rows = scores.numel()
        if ctx.rows == 0:
            ctx.save_for_backward(scores, fc1, fc2)
            return torch.zeros_like(x)
        x = _aligned(x)
        if experts is not None:
            route = route_tokens(experts.contiguous(), scores.contiguous(), expert_count=fc1.shape[0], tile=tiles.rows)
        else:
            assert rows_per_expert is not None
            rows_per_expert = rows_per_expert.to(x.device, non_blocking=True).contiguous()
            route = route_grouped(rows_per_expert, scores.float().contiguous(), tile=tiles.rows)
        y, h = steps.forward(x, _aligned(fc1), _aligned(fc2), route, tiles=tiles, keep=keep, run=Launch.run)
        if keep:
            trainable = None if trainable is None else trainable.to(x.device, torch.uint8, non_blocking=True)
            kept_x = x if ctx.needs_input_grad[1] else None  # x is read again by the gradient of fc1 alone
            ctx.save_for_backward(kept_x, fc1, fc2, h, trainable, *route.tensors())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_fc1, needs_fc2, needs_scores = ctx.needs_input_grad[:4]
        if ctx.rows == 0:
            return _zero_gradients(ctx, dy)
        x, fc1, fc2, h, trainable, *metadata = ctx.saved_tensors
        route = Route(*metadata)
        dy, run, tiles = _aligned(dy), Launch.run, ctx.tiles
        with torch.cuda.device_of(dy):
            dh, scaled, by_row = steps.backward_rows(dy, _aligned(fc2), h, route, tiles=tiles, run=run)
            dx = steps.backward_input(dh, _aligned(fc1), route, tiles=tiles, run=run) if needs_x else None
            d_fc1 = d_fc2 = d_scores = None
            weights = {"route": route, "trainable": trainable, "accumulate": ctx.accumulate, "tiles": tiles}
            if needs_fc1:
                d_fc1 = _weight_gradient(fc1, dh, x, gathered="right", parts=ctx.parts[0], **weights)
            if needs_fc2:
                d_fc2 = _weight_gradient(fc2, dy, scaled, gathered="left", parts=ctx.parts[1], **weights)
            if needs_scores:
                d_scores = steps.score_gradient(by_row, route).to(ctx.scores_dtype)
        return dx, d_fc1, d_fc2, d_scores, None, None, None, None, None, None, None


def _weight_gradient(
    weight: Tensor, left: Tensor, right: Tensor, *, gathered: str, route: Route, trainable: Tensor | None,
    accumulate: bool, parts: Parts | None, tiles: Tiles,
) -> Tensor | None:  # fmt: skip
    """The gradient of `weight`, or what stands for it where it was added to the `main_grad` of its parts."""
    if not accumulate:
        out = weight.new_empty(weight.shape)
        steps.backward_weight(
            left, right, out, route, trainable=trainable, accumulate=False, gathered=gathered, tiles=tiles,
            run=Launch.run,
        )  # fmt: skip
        return out
    for first, part in parts or [(0, weight)]:
        out = part.main_grad  # type: ignore[attr-defined]
        assert out.is_contiguous(), "main_grad is contiguous"
        assert out.shape == part.shape, "main_grad has the weight's shape"
        steps.backward_weight(
            left, right, out, replace(route, offsets=route.offsets[first:]),
            trainable=None if parts else trainable, accumulate=True, gathered=gathered, tiles=tiles, run=Launch.run,
        )  # fmt: skip
    return taken_over(weight)


def _zero_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a call without rows."""
    scores, fc1, fc2 = ctx.saved_tensors
    gradients: list[Tensor | None] = [torch.zeros_like(dy)]
    for weight, needed in ((fc1, ctx.needs_input_grad[1]), (fc2, ctx.needs_input_grad[2])):
        if needed and ctx.accumulate:
            gradients.append(taken_over(weight))
        else:
            gradients.append(torch.zeros_like(weight) if needed else None)
    return (*gradients, torch.zeros_like(scores), *[None] * 7)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that a descriptor can read: contiguous, starting at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ROW_BYTES == 0 else tensor.clone()


def _check(x: Tensor, fc1: Tensor, fc2: Tensor, *, experts: Tensor | None, rows_per_expert: Tensor | None) -> None:
    """Raise ValueError for what these kernels cannot do."""
    if (experts is None) == (rows_per_expert is None):
        raise ValueError("give either experts (tokens) or rows_per_expert (grouped rows)")
    if not x.is_cuda and not interpreting():
        raise ValueError(f"x is on {x.device}: the Triton backend needs a CUDA device")
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if interpreting() else (torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or fc1.dtype != x.dtype or fc2.dtype != x.dtype:
        found = f"{x.dtype}, {fc1.dtype}, {fc2.dtype}"
        raise ValueError(f"x, fc1, fc2 are {found}: the Triton backend needs one 16-bit dtype")
    experts_count, width, hidden = fc2.shape
    if fc1.shape != (experts_count, 2 * hidden, width):
        raise ValueError(f"fc1 is {list(fc1.shape)}, fc2 {list(fc2.shape)}: they need to be [E, 2F, D] and [E, D, F]")
    for name, size in (("D", width), ("F", hidden)):
        if size * x.element_size() % ROW_BYTES:
            raise ValueError(f"{name} = {size} in {x.dtype}: the Triton backend needs rows of whole {ROW_BYTES} bytes")
