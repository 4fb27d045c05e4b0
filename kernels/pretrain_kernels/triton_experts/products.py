# ruff: noqa: ANN001, ANN201, SIM102 - Triton's arguments have no Python types, its branches are compiled
"""The matrix kernels: up-projection with SwiGLU, row products (down-projection, dA', dX), and dW.

A program makes one block of the output, or several one after the other (`Tile.programs`). Rows are tiled expert by
expert (`Route.tile_expert`), so a block has one expert's weights. Contiguous operands are read by tensor descriptors
(bulk copies on Hopper, zero past the edges), and gathered ones by pointers, straight from the token's row. Sums are
fp32. A tile's rows past its expert's end belong to the next expert: they may be read (each output row depends on its
own input row alone) and are never written.
R rows, T tokens, D model width, F expert width; `h` is [R, 2F] (gate, then up).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_add(a, b, total, UPCAST: tl.constexpr):
    """total + a b. UPCAST for the interpreter, whose product of bf16 blocks is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def whole(width, pointer):
    """`width`, of rows of whole 16 bytes: the compiler looks for multiples of 16 elements alone.

    Without it, loads and stores at other widths would go one by one, with an address each: registers would spill.
    """
    UNIT: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    return width // UNIT * UNIT


@triton.jit
def tile_rows(tile, expert, tile_row, offsets, BM: tl.constexpr):
    """(first row, all BM rows, which of them are the expert's) of a row tile."""
    start = tl.load(tile_row + tile)
    row = start + tl.arange(0, BM)
    return start, row, row < tl.load(offsets + expert + 1)


@triton.jit
def token_pointers(rows, token, row, inside, width, BK: tl.constexpr):
    """Pointers to the first BK columns of the tokens that `row` belongs to: token[r] of `rows` [T, width]."""
    source = tl.load(token + row, mask=inside, other=0).to(tl.int64)
    return rows + source[:, None] * width + tl.arange(0, BK)[None, :]


@triton.jit
def load_rows(rows, pointers, start, k, width, GATHER: tl.constexpr, BK: tl.constexpr):
    """BK columns from k of a row tile: by `pointers` to its first columns if GATHER, else by the descriptor `rows`."""
    if GATHER:
        return tl.load(pointers + k, mask=(k + tl.arange(0, BK) < width)[None, :], other=0.0)
    else:
        return rows.load([start, k])


@triton.jit
def swizzle(index, down, across, GROUP: tl.constexpr):
    """(row, column) of a block when `GROUP` rows of blocks run through all columns together.

    Programs that run at the same time then share the weight blocks of a column, and the rows stay in the L2 cache.
    """
    group = index // (GROUP * across)
    within = index % (GROUP * across)
    size = min(down - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def halves(block, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns of an [M, N] block."""
    return block.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def up_kernel(
    x, token, fc1, h, a, score, tile_expert, tile_row, offsets, tile_count, D, F,
    GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h = x fc1^T (both halves; None: not kept), a = score silu(gate) up.

    x: pointer [T, D] if GATHER (row r reads token[r]), else descriptor [R, D]; fc1: descriptor [2E, F, D].
    """
    D, F = whole(D, a), whole(F, a)
    tiles, across = tl.load(tile_count), tl.cdiv(F, BN)
    for index in tl.range(tl.program_id(0), tiles * across, tl.num_programs(0), flatten=FLAT):
        tile, block = swizzle(index, tiles, across, GROUP)
        expert = tl.load(tile_expert + tile)
        start, row, inside = tile_rows(tile, expert, tile_row, offsets, BM)
        pointers = token_pointers(x, token, row, inside, D, BK) if GATHER else None
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in range(0, D, BK):
            rows = load_rows(x, pointers, start, k, D, GATHER, BK)
            gate_weight = fc1.load([2 * expert, block * BN, k]).reshape(BN, BK)
            up_weight = fc1.load([2 * expert + 1, block * BN, k]).reshape(BN, BK)
            gate = multiply_add(rows, gate_weight.T, gate, UPCAST)
            up = multiply_add(rows, up_weight.T, up, UPCAST)
        column = block * BN + tl.arange(0, BN)
        needed = inside[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None]
        if h is not None:
            tl.store(h + at * (2 * F) + column[None, :], gate.to(h.dtype.element_ty), mask=needed)
            tl.store(h + at * (2 * F) + F + column[None, :], up.to(h.dtype.element_ty), mask=needed)
        weight = tl.load(score + row, mask=inside, other=0.0)
        active = gate * tl.sigmoid(gate) * up * weight[:, None]
        tl.store(a + at * F + column[None, :], active.to(a.dtype.element_ty), mask=needed)


@triton.jit
def rows_kernel(
    left, token, weight, out, tile_expert, tile_row, offsets, tile_count, N, DEPTH,
    TRANSPOSED: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, FLAT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [R, N] = left [R, DEPTH] times each row's expert: weight [E, N, DEPTH] if TRANSPOSED, else [E, DEPTH, N].

    left: pointer [T, DEPTH] if GATHER (row r reads token[r]), else descriptor [R, DEPTH]; weight: descriptor.
    """
    N = whole(N, out)
    tiles, across = tl.load(tile_count), tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles * across, tl.num_programs(0), flatten=FLAT):
        tile, block = swizzle(index, tiles, across, GROUP)
        expert = tl.load(tile_expert + tile)
        start, row, inside = tile_rows(tile, expert, tile_row, offsets, BM)
        pointers = token_pointers(left, token, row, inside, DEPTH, BK) if GATHER else None
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, DEPTH, BK):
            rows = load_rows(left, pointers, start, k, DEPTH, GATHER, BK)
            if TRANSPOSED:
                columns = weight.load([expert, block * BN, k]).reshape(BN, BK).T
            else:
                columns = weight.load([expert, k, block * BN]).reshape(BK, BN)
            total = multiply_add(rows, columns, total, UPCAST)
        column = block * BN + tl.arange(0, BN)
        needed = inside[:, None] & (column < N)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask=needed)


@triton.jit
def operand(rows, token, row, inside, column, width, GATHER: tl.constexpr):
    """The block [row, column] of `rows` [*, width] by pointers, zero where `inside` is false or past the width."""
    if GATHER:
        row = tl.load(token + row, mask=inside, other=0)
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(rows + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(block, out, row, first, M, N, ADD: tl.constexpr, BN: tl.constexpr):
    """Write the columns from `first` of a block of out [M, N], or add to them."""
    column = first + tl.arange(0, BN)
    needed = (row < M)[:, None] & (column < N)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * N + column[None, :]
    if ADD:
        block += tl.load(pointers, mask=needed, other=0.0)
    tl.store(pointers, block.to(out.dtype.element_ty), mask=needed)


@triton.jit
def dw_kernel(
    left, left_rows, right, right_rows, token, out, offsets, trainable, M, N,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[e] [M, N] = left[rows of e]^T right[rows of e]; added to what `out` holds if ACCUMULATE.

    left, right: descriptors [R, M] and [R, N], or None if gathered; *_rows: the same by pointer ([T, .] if gathered).
    trainable: pointer [E] or None; an expert that does not train counts as one without rows, whose gradient is zero.
    """
    M, N = whole(M, left_rows), whole(N, right_rows)
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    expert = tl.program_id(0) // (down * across)
    block_m, block_n = swizzle(tl.program_id(0) % (down * across), down, across, GROUP)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if trainable is not None:
        end = tl.where(tl.load(trainable + expert) != 0, end, start)
    if ACCUMULATE:
        if start == end:
            return
    row = tl.arange(0, BK)
    column_m = block_m * BM + tl.arange(0, BM)
    column_n = block_n * BN + tl.arange(0, BN)
    everything = row >= 0
    total = tl.zeros([BM, BN], tl.float32)
    full = start + (end - start) // BK * BK
    for k in range(start, full, BK):
        if GATHER_LEFT:
            a = operand(left_rows, token, k + row, everything, column_m, M, True)
        else:
            a = left.load([k, block_m * BM])
        if GATHER_RIGHT:
            b = operand(right_rows, token, k + row, everything, column_n, N, True)
        else:
            b = right.load([k, block_n * BN])
        total = multiply_add(a.T, b, total, UPCAST)
    if full < end:  # The last rows: a descriptor would read on into the next expert's.
        inside = full + row < end
        a = operand(left_rows, token, full + row, inside, column_m, M, GATHER_LEFT)
        b = operand(right_rows, token, full + row, inside, column_n, N, GATHER_RIGHT)
        total = multiply_add(a.T, b, total, UPCAST)
    out += expert.to(tl.int64) * M * N
    if ACCUMULATE:
        left_half, right_half = halves(total, BM, BN)
        store_block(left_half, out, column_m, block_n * BN, M, N, True, BN // 2)
        store_block(right_half, out, column_m, block_n * BN + BN // 2, M, N, True, BN // 2)
    else:
        store_block(total, out, column_m, block_n * BN, M, N, False, BN)
