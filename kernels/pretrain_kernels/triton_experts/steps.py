"""The launches of one forward and one backward pass, in order. What autograd and the static checks both go through.

R rows, T tokens, E experts, D model width, F expert width. Every function takes `run`, which runs a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pretrain_kernels.triton_experts.activation import dswiglu_launch
from pretrain_kernels.triton_experts.combine import combine_launch
from pretrain_kernels.triton_experts.products import dw_kernel, rows_kernel, up_kernel
from pretrain_kernels.triton_experts.routing import Route
from pretrain_kernels.triton_experts.tiles import GROUP, Tiles
from pretrain_kernels.triton_support import Launch, Tile, interpreting, multiprocessors

Run = Callable[[Launch], None]

WHOLE = 16  # the multiple of elements that Triton looks for in a width


def forward(
    x: Tensor, fc1: Tensor, fc2: Tensor, route: Route, *, tiles: Tiles, keep: bool, run: Run
) -> tuple[Tensor, Tensor | None]:
    """(y, h): the output, [T, D] or [R, D], and if `keep` the pre-activations [R, 2F] that backward needs."""
    rows, (experts, width, hidden) = route.score.numel(), fc2.shape
    h = x.new_empty(rows, 2 * hidden) if keep else None
    active, out = x.new_empty(rows, hidden), x.new_empty(rows, width)
    tile = tiles.up
    arguments = {
        "x": x if route.token is not None else _descriptor(x, tile.m, tile.k),
        "token": route.token,
        "fc1": _descriptor(fc1.view(2 * experts, hidden, width), 1, tile.n, tile.k),
        "h": h, "a": active, "score": route.score, "D": width, "F": hidden, "GATHER": route.token is not None,
    }  # fmt: skip
    run(_row_launch(up_kernel, arguments, route, tile, columns=hidden))
    run(_product(active, fc2, out, route, tiles.down, transposed=True))
    return _combined(out, route, run), h


def backward_rows(
    dy: Tensor, fc2: Tensor, h: Tensor, route: Route, *, tiles: Tiles, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh [R, 2F], score-weighted activations [R, F], gradient of each sorted row's score [R] fp32)."""
    rows, hidden = route.score.numel(), fc2.shape[2]
    scaled, dh = h.new_empty(rows, hidden), torch.empty_like(h)
    by_row = torch.empty_like(route.score)
    # dA' first; the next kernel writes over it.
    run(_product(dy, fc2, scaled, route, tiles.dh, transposed=False, token=route.token))
    run(dswiglu_launch(scaled, h, route.score, dh, by_row))
    return dh, scaled, by_row


def backward_input(dh: Tensor, fc1: Tensor, route: Route, *, tiles: Tiles, run: Run) -> Tensor:
    """Gradient of x, [T, D] or [R, D]."""
    dx = dh.new_empty(dh.shape[0], fc1.shape[2])
    run(_product(dh, fc1, dx, route, tiles.dx, transposed=False))
    return _combined(dx, route, run)


def backward_weight(
    left: Tensor, right: Tensor, out: Tensor, route: Route, *, trainable: Tensor | None, accumulate: bool,
    gathered: str, tiles: Tiles, run: Run,
) -> None:  # fmt: skip
    """out[e] [M, N] = left^T right over expert e's rows, added to `out` if `accumulate`.

    `gathered`: the side ("left" or "right") whose rows are tokens, unless the rows came grouped.
    """
    experts, m, n = out.shape
    side = None if route.token is None else gathered
    if side == "right" and tiles.gather_first:
        assert route.token is not None
        right, side = right.index_select(0, route.token), None
    tile = {None: tiles.dw, "left": tiles.dw_left, "right": tiles.dw_right}[side]
    arguments = {
        "left": None if side == "left" else _descriptor(left, tile.k, tile.m), "left_rows": left,
        "right": None if side == "right" else _descriptor(right, tile.k, tile.n), "right_rows": right,
        "token": route.token, "out": out, "offsets": route.offsets, "trainable": trainable, "M": m, "N": n,
        "GATHER_LEFT": side == "left", "GATHER_RIGHT": side == "right", "ACCUMULATE": accumulate,
    }  # fmt: skip
    grid = (experts * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    run(_launch(dw_kernel, grid, arguments, tile, dtype=left.dtype))


def score_gradient(by_row: Tensor, route: Route) -> Tensor:
    """Gradient of the scores as they came, [T, K] or [R], from that of the sorted rows."""
    return by_row if route.position is None else by_row[route.position]


def _product(
    left: Tensor, weight: Tensor, out: Tensor, route: Route, tile: Tile, *, transposed: bool,
    token: Tensor | None = None,
) -> Launch:  # fmt: skip
    if token is not None and left.shape[1] % WHOLE:
        # The masks of gathered rows then take registers that loading ahead needs: they would be spilled.
        tile = replace(tile, flat=False)
    block = (1, tile.n, tile.k) if transposed else (1, tile.k, tile.n)
    arguments = {
        "left": left if token is not None else _descriptor(left, tile.m, tile.k), "token": token,
        "weight": _descriptor(weight, *block), "out": out, "N": out.shape[1], "DEPTH": left.shape[1],
        "TRANSPOSED": transposed, "GATHER": token is not None,
    }  # fmt: skip
    return _row_launch(rows_kernel, arguments, route, tile, columns=out.shape[1])


def _combined(rows: Tensor, route: Route, run: Run) -> Tensor:
    """The sum of each token's rows; the rows themselves where they came grouped."""
    if route.position is None:
        return rows
    out = rows.new_empty(route.position.shape[0], rows.shape[1])
    run(combine_launch(rows, route.position, out))
    return out


def _row_launch(kernel: object, arguments: dict[str, object], route: Route, tile: Tile, *, columns: int) -> Launch:
    """A kernel over all row tiles and blocks of `columns`: `tile.programs` of each multiprocessor share them."""
    table = {
        "tile_expert": route.tile_expert, "tile_row": route.tile_row, "offsets": route.offsets,
        "tile_count": route.tile_count, "FLAT": tile.flat,
    }  # fmt: skip
    weight = arguments.get("fc1", arguments.get("weight"))
    assert isinstance(weight, TensorDescriptor)
    blocks = route.tile_expert.numel() * triton.cdiv(columns, tile.n)
    if tile.programs:
        blocks = min(blocks, tile.programs * multiprocessors(weight.base.device))
    return _launch(kernel, (blocks,), arguments | table, tile, dtype=weight.base.dtype)


def _launch(
    kernel: object, grid: tuple[int, ...], arguments: dict[str, object], tile: Tile, *, dtype: torch.dtype
) -> Launch:
    blocks = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP}
    upcast = interpreting() and dtype == torch.bfloat16
    return Launch(
        kernel=kernel,
        grid=grid,
        arguments=arguments | blocks | {"UPCAST": upcast},
        warps=tile.warps,
        stages=tile.stages,
    )


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Host-side descriptor of blocks of a contiguous tensor: built for each launch, so nothing is allocated for it."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
