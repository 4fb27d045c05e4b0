# ruff: noqa: ANN001, ANN201 - the arguments of Triton kernels have no Python types
"""Backward pass of the score-weighted SwiGLU, row by row: all of it that is no product.

It could be the end of the product that comes before it (dA' = dy fc2), and was. There it took longer than here with
dA' written and read once more: a block of that product has to wait for its part of h, and nothing else runs meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.triton_experts.products import whole
from pretrain_kernels.triton_support import Launch

WIDEST = 1024  # columns at a time: 8 values per thread and operand at 4 warps, one 16-byte load


@triton.jit
def dswiglu_kernel(rows, h, score, dh, score_gradient, F, BLOCK: tl.constexpr):
    """With a = silu(gate) up: dh from `rows` = dA' [R, F], which becomes score a; score_gradient = <dA', a>, fp32.

    h and dh are [R, 2F] (gate, then up). A program does one row.
    """
    F = whole(F, rows)
    row = tl.program_id(0).to(tl.int64)
    rows += row * F
    h += row * (2 * F)
    dh += row * (2 * F)
    weight = tl.load(score + row)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        needed = column < F
        d_active = tl.load(rows + column, mask=needed, other=0.0).to(tl.float32)
        gate = tl.load(h + column, mask=needed, other=0.0).to(tl.float32)
        up = tl.load(h + F + column, mask=needed, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += d_active * silu * up
        d_active *= weight
        d_gate = d_active * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(dh + column, d_gate.to(dh.dtype.element_ty), mask=needed)
        tl.store(dh + F + column, (d_active * silu).to(dh.dtype.element_ty), mask=needed)
        tl.store(rows + column, (silu * up * weight).to(rows.dtype.element_ty), mask=needed)
    tl.store(score_gradient + row, tl.sum(total))


def dswiglu_launch(rows: Tensor, h: Tensor, score: Tensor, dh: Tensor, score_gradient: Tensor) -> Launch:
    """See `dswiglu_kernel`; `rows` is overwritten."""
    count, width = rows.shape
    return Launch(
        kernel=dswiglu_kernel,
        grid=(count,),
        arguments={
            "rows": rows, "h": h, "score": score, "dh": dh, "score_gradient": score_gradient, "F": width,
            "BLOCK": min(WIDEST, triton.next_power_of_2(width)),
        },
    )  # fmt: skip
