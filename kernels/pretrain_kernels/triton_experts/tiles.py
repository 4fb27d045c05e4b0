"""Tile choices of the expert kernels, by rows per expert and expert width. Nothing is tuned in a user's first step.

Chosen by what the compiler makes of them, without a GPU: no spilled registers, tensor-core instructions, and no more
shared memory than there is, in Triton 3.6.0 and 3.7.1. Their speed has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pretrain_kernels.triton_support import Tile

GROUP = 8  # row tiles that share a weight block before the next column of blocks: 8 x 128 rows x 2048 x 2 bytes = 4 MiB


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the matrix kernels. The four that are tiled over rows have the same `m`: they share a table.

    `dw_gathered` reads one side by token: the row's number is loaded first, which takes stages of its own.
    """

    up: Tile
    down: Tile
    dh: Tile
    dx: Tile
    dw: Tile
    dw_gathered: Tile

    def __post_init__(self) -> None:
        assert self.up.m == self.down.m == self.dh.m == self.dx.m, self

    @property
    def rows(self) -> int:
        """Rows of a row tile."""
        return self.up.m


MANY_ROWS = Tiles(
    up=Tile(m=128, n=128, k=64, warps=8, stages=4),
    down=Tile(m=128, n=256, k=64, warps=8, stages=4),
    dh=Tile(m=128, n=128, k=64, warps=8, stages=4),
    dx=Tile(m=128, n=256, k=64, warps=8, stages=4),
    dw=Tile(m=128, n=256, k=64, warps=8, stages=4),
    dw_gathered=Tile(m=128, n=256, k=64, warps=8, stages=6),
)
FEW_ROWS = Tiles(
    up=Tile(m=64, n=128, k=64, warps=8, stages=4),
    down=Tile(m=64, n=128, k=64, warps=4, stages=4),
    dh=Tile(m=64, n=128, k=64, warps=8, stages=4),
    dx=Tile(m=64, n=128, k=64, warps=4, stages=4),
    dw=Tile(m=128, n=128, k=64, warps=8, stages=4),
    dw_gathered=Tile(m=128, n=128, k=64, warps=8, stages=6),
)
# Before sm_90 descriptors become plain loads with addresses in registers, which leaves room for smaller sums.
BEFORE_HOPPER = Tiles(
    up=Tile(m=64, n=64, k=32, warps=4, stages=3),
    down=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dh=Tile(m=64, n=64, k=32, warps=4, stages=3),
    dx=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dw=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dw_gathered=Tile(m=64, n=128, k=32, warps=8, stages=3),
)

# (rows per expert, expert width F, tiles): the first entry with at least that many of both is taken.
HOPPER_TABLE: tuple[tuple[float, float, Tiles], ...] = ((128, inf, FEW_ROWS), (inf, inf, MANY_ROWS))


def choose_tiles(*, rows: int, experts: int, width: int, capability: int) -> Tiles:
    """Tiles for `rows` routed rows over `experts` experts of width `width` (F), at compute capability x 10.

    The rule looks at what the host knows: the mean of rows per expert, not the routing of this step.
    """
    if capability < 90:
        return BEFORE_HOPPER
    return next(tiles for most, widest, tiles in HOPPER_TABLE if rows <= most * experts and width <= widest)
