# ruff: noqa: ANN001, ANN201 - the arguments of Triton kernels have no Python types
"""Sum of each token's rows, in the order of its choices: the layer's output, and the gradient of its input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.triton_experts.products import whole
from pretrain_kernels.triton_support import Launch

WIDEST = 2048  # columns of a program: 16 values per thread and row at 4 warps, two 16-byte loads in bf16


@triton.jit
def combine_kernel(rows, position, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over k of rows[position[t, k]], summed in fp32."""
    D = whole(D, out)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    needed = column < D
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position + token * K + k).to(tl.int64)
        total += tl.load(rows + row * D + column, mask=needed, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=needed)


def combine_launch(rows: Tensor, position: Tensor, out: Tensor) -> Launch:
    """out [T, D] = sum over the K rows of `rows` [R, D] that `position` [T, K] names."""
    tokens, width = out.shape
    block = min(WIDEST, triton.next_power_of_2(width))
    return Launch(
        kernel=combine_kernel,
        grid=(tokens, triton.cdiv(width, block)),
        arguments={
            "rows": rows, "position": position, "out": out, "D": width, "K": position.shape[1], "BLOCK": block,
        },
    )  # fmt: skip
