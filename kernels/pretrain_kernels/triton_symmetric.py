# ruff: noqa: ANN001, ANN201 - the arguments of Triton kernels have no Python types
"""Batched products whose result is symmetric: only the blocks on and above the diagonal are computed, and mirrored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pretrain_kernels.triton_experts.products import multiply_add, whole
from pretrain_kernels.triton_support import Launch, Tile, interpreting

# Square blocks. The small ones leave out more, and give a GPU enough programs, where matrices are small; on an H100
# that is not enough to be faster than torch's products (`newton_schulz.SYMMETRIC_FROM`).
SMALL = Tile(m=64, n=64, k=64, warps=4, stages=4)
LARGE = Tile(m=128, n=128, k=64, warps=8, stages=3)
LARGE_FROM = 768  # rows: 6 x 6 blocks, of which 21 are computed


@triton.jit
def symmetric_kernel(
    a, b, add, out, n, depth, alpha, beta,
    ADD: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = alpha a b^T + beta add: descriptors a, b [N, n, depth] read in [1, B, BK], pointers add, out [N, n, n]."""
    n = whole(n, out)
    across = tl.cdiv(n, B)
    matrix = tl.program_id(0) // (across * across)
    block = tl.program_id(0) % (across * across)
    first_row, first_column = block // across * B, block % across * B
    if first_column < first_row:  # the mirror image of another program's block
        return
    total = tl.zeros([B, B], tl.float32)
    for k in range(0, depth, BK):
        left = a.load([matrix, first_row, k]).reshape(B, BK)
        right = b.load([matrix, first_column, k]).reshape(B, BK)
        total = multiply_add(left, right.T, total, UPCAST)
    row = (first_row + tl.arange(0, B))[:, None]
    column = (first_column + tl.arange(0, B))[None, :]
    inside = (row < n) & (column < n)
    start = matrix.to(tl.int64) * n * n
    total *= alpha
    if ADD:
        total += beta * tl.load(add + start + row * n + column, mask=inside, other=0.0).to(tl.float32)
    value = total.to(out.dtype.element_ty)
    if first_row == first_column:
        value = tl.where(row <= column, value, value.T)
    else:
        tl.store(out + start + column.T * n + row.T, value.T, mask=inside.T)
    tl.store(out + start + row * n + column, value, mask=inside)


def symmetric_launch(a: Tensor, b: Tensor, add: Tensor | None, out: Tensor, *, alpha: float, beta: float) -> Launch:
    """The launch that writes `out`; all tensors contiguous."""
    count, n, depth = a.shape
    tile = LARGE if n >= LARGE_FROM else SMALL
    block = [1, tile.m, tile.k]
    arguments = {
        "a": TensorDescriptor.from_tensor(a, block),
        "b": TensorDescriptor.from_tensor(b, block),
        "add": out if add is None else add,
        "out": out,
        "n": n,
        "depth": depth,
        "alpha": alpha,
        "beta": beta,
        "ADD": add is not None,
        "B": tile.m,
        "BK": tile.k,
        "UPCAST": interpreting(),
    }
    grid = (count * triton.cdiv(n, tile.m) ** 2,)
    return Launch(kernel=symmetric_kernel, grid=grid, arguments=arguments, warps=tile.warps, stages=tile.stages)


def symmetric_product(
    a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """alpha a b^T + beta add of every matrix [n, k] in the stacks a and b, exactly symmetric. Sums are fp32.

    The caller vouches that the result is symmetric: a is b, or both are symmetric and commute; and add [N, n, n] is.
    Only the upper triangle of `add` is read. n and k elements must be multiples of 16 bytes.
    """
    count, n, _ = a.shape
    if not (a.shape == b.shape and (add is None or add.shape == (count, n, n))):
        raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}: must be two equal stacks [N, n, k], and add [N, n, n]")
    assert n * n < 1 << 31, "offsets within a matrix are int32"
    out = torch.empty(count, n, n, dtype=a.dtype, device=a.device)
    if out.numel():
        contiguous = None if add is None else add.contiguous()
        symmetric_launch(a.contiguous(), b.contiguous(), contiguous, out, alpha=alpha, beta=beta).run()
    return out
