# ruff: noqa: ANN001, ANN201 - the arguments of Triton kernels have no Python types
"""Where every routed row goes, worked out on the device: counts, offsets, stable positions and a table of row tiles.

Nothing here waits for the device: the table's length is a bound that the host knows,
`rows // tile + min(experts, rows)` (each expert has at most one tile that is not full), and surplus entries say -1.
No atomics: a row's position is its expert's offset, plus the rows of that expert in earlier blocks, plus its rank
within its block, so the order is stable.

R rows, E experts, T tokens, K experts of a token (R = T K where tokens are routed). Sizes that change from step to step
are not specialized on, so that no kernel is compiled again in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.triton_support import Launch

BLOCK = 128  # rows counted and ranked by one program: its square is a table in registers
COLUMNS = 16  # experts whose counts one program sums up over the blocks


@dataclass(frozen=True)
class Route:
    """What the matrix kernels need to know about the rows, sorted by expert. All int32 but `score`."""

    offsets: Tensor
    """[E + 1]: expert e owns the rows offsets[e] .. offsets[e + 1] - 1."""
    tile_expert: Tensor
    """[tiles]: the expert of a row tile, -1 for a surplus entry."""
    tile_row: Tensor
    """[tiles]: the first row of a tile."""
    tile_count: Tensor
    """[1]: how many entries of the table are tiles."""
    score: Tensor
    """[R] fp32: combine weight of each sorted row."""
    token: Tensor | None = None
    """[R]: the token of each sorted row; None where the rows came grouped."""
    position: Tensor | None = None
    """[T, K]: the sorted row of each choice; None where the rows came grouped."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order, as `Route(*tensors)` takes them."""
        return (self.offsets, self.tile_expert, self.tile_row, self.tile_count, self.score, self.token, self.position)


@triton.jit(do_not_specialize=["rows"])
def count_kernel(experts, counts, rows, E, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """counts[block, e]: how many of a block's rows chose expert e."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32)
    for first in range(0, E, STEP):
        candidate = first + tl.arange(0, STEP)
        count = tl.sum((expert[:, None] == candidate[None, :]).to(tl.int32), axis=0)
        tl.store(counts + block.to(tl.int64) * E + candidate, count, mask=candidate < E)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts, totals, blocks, E, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Turn counts[block, e] into the count of all earlier blocks, in place, and write totals[e]."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    seen = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        inside = (block < blocks)[:, None] & (expert < E)[None, :]
        pointers = counts + block.to(tl.int64)[:, None] * E + expert[None, :]
        count = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, tl.cumsum(count, axis=0) - count + seen[None, :], mask=inside)
        seen += tl.sum(count, axis=0)
    tl.store(totals + expert, seen, mask=expert < E)


@triton.jit(do_not_specialize=["tiles"])
def tile_kernel(totals, offsets, tile_expert, tile_row, tile_count, E, tiles, BM: tl.constexpr, BINS: tl.constexpr,
                STEP: tl.constexpr):  # fmt: skip
    """Program e < E writes expert e's offset and tiles; program E writes the end, and marks and counts what is left."""
    me = tl.program_id(0)
    expert = tl.arange(0, BINS)
    rows = tl.load(totals + expert, mask=expert < E, other=0).to(tl.int32)
    needed = (rows + BM - 1) // BM
    first_row = tl.sum(tl.where(expert < me, rows, 0))
    first_tile = tl.sum(tl.where(expert < me, needed, 0))
    mine = tl.where(me < E, tl.sum(tl.where(expert == me, needed, 0)), tiles - first_tile)
    label = tl.where(me < E, me, -1)
    tl.store(offsets + me, first_row)
    if me == E:
        tl.store(tile_count, first_tile)
    for step in range(0, mine, STEP):
        index = step + tl.arange(0, STEP)
        # The second bound keeps the writes inside the table even if the counts do not add up to the rows.
        inside = (index < mine) & (first_tile + index < tiles)
        tl.store(tile_expert + first_tile + index, tl.zeros([STEP], tl.int32) + label, mask=inside)
        tl.store(tile_row + first_tile + index, first_row + index * BM, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def place_kernel(experts, scores, earlier, offsets, position, token, score, rows, E, K, BLOCK: tl.constexpr):
    """position[row] for each choice, and the token and score of each sorted row."""
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    row = block * BLOCK + index
    inside = row < rows
    expert = tl.load(experts + row, mask=inside, other=0).to(tl.int32)
    # The same rows along the other axis of a square table: ranks are counted without exchanging values.
    other = tl.load(experts + block * BLOCK + index, mask=inside, other=-1).to(tl.int32)
    before = (other[None, :] == expert[:, None]) & (index[None, :] < index[:, None])
    rank = tl.sum(before.to(tl.int32), axis=1)
    place = tl.load(offsets + expert, mask=inside, other=0) + rank
    place += tl.load(earlier + block.to(tl.int64) * E + expert, mask=inside, other=0)
    tl.store(position + row, place, mask=inside)
    tl.store(token + place, row // K, mask=inside)
    tl.store(score + place, tl.load(scores + row, mask=inside, other=0.0).to(tl.float32), mask=inside)


def tile_bound(rows: int, experts: int, tile: int) -> int:
    """Row tiles that any routing of `rows` rows can need."""
    return rows // tile + min(experts, rows)


def route_grouped(
    rows_per_expert: Tensor, scores: Tensor, *, tile: int, run: Callable[[Launch], None] = Launch.run
) -> Route:
    """Route rows that are grouped by expert already: `rows_per_expert` [E] adds up to the length of `scores` [R]."""
    table = _tiles(rows_per_expert, rows=scores.numel(), tile=tile, run=run)
    return Route(**table, score=scores)


def route_tokens(
    experts: Tensor, scores: Tensor, *, expert_count: int, tile: int, run: Callable[[Launch], None] = Launch.run
) -> Route:
    """Route tokens: `experts` [T, K] chooses among 0 .. expert_count - 1 (not checked), weighted by `scores` [T, K]."""
    rows, per_token = experts.numel(), experts.shape[1]
    blocks = triton.cdiv(rows, BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=experts.device)

    counts, totals = empty(blocks, expert_count), empty(expert_count)
    sizes = {"rows": rows, "E": expert_count, "BLOCK": BLOCK}
    run(
        Launch(
            kernel=count_kernel,
            grid=(blocks,),
            arguments={"experts": experts, "counts": counts, "STEP": 32} | sizes,
        )
    )
    run(
        Launch(
            kernel=scan_kernel,
            grid=(triton.cdiv(expert_count, COLUMNS),),
            arguments={
                "counts": counts, "totals": totals, "blocks": blocks, "E": expert_count, "BLOCK": BLOCK,
                "COLUMNS": COLUMNS,
            },
        )
    )  # fmt: skip
    table = _tiles(totals, rows=rows, tile=tile, run=run)
    position, token, score = empty(*experts.shape), empty(rows), empty(rows, dtype=torch.float32)
    arguments = {
        "experts": experts, "scores": scores, "earlier": counts, "offsets": table["offsets"],
        "position": position, "token": token, "score": score, "K": per_token,
    }  # fmt: skip
    run(Launch(kernel=place_kernel, grid=(blocks,), arguments=arguments | sizes))
    return Route(**table, score=score, token=token, position=position)


def _tiles(totals: Tensor, *, rows: int, tile: int, run: Callable[[Launch], None]) -> dict[str, Tensor]:
    """The first four fields of a `Route`, of `totals` [E] rows per expert."""
    experts = totals.numel()
    tiles = tile_bound(rows, experts, tile)
    # One by one: all then start at an aligned address, whatever their length.
    lengths = {"offsets": experts + 1, "tile_expert": tiles, "tile_row": tiles, "tile_count": 1}
    table = {name: torch.empty(length, dtype=torch.int32, device=totals.device) for name, length in lengths.items()}
    arguments = table | {
        "totals": totals, "E": experts, "tiles": tiles, "BM": tile, "BINS": triton.next_power_of_2(experts),
        "STEP": 128,
    }  # fmt: skip
    run(Launch(kernel=tile_kernel, grid=(experts + 1,), arguments=arguments))
    return table
