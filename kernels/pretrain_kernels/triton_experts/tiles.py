"""Tile choices of the expert kernels, by rows per expert and expert width. Nothing is tuned in a user's first step.

For Hopper: the fastest of some tens that were measured on an H100 at the shapes of the benchmark (kernels/README.md),
among those that the compiler makes without spilled registers, with tensor-core instructions, and within the shared
memory there is. Elsewhere: by what the compiler makes of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from pretrain_kernels.triton_support import Tile

GROUP = 8  # row tiles that share a weight block before the next column of blocks: 8 x 128 rows x 2048 x 2 bytes = 4 MiB


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the matrix kernels. The four that are tiled over rows have the same `m`: they share a table.

    dw: both sides contiguous. dw_left, dw_right: that side is read by token: the row's number is loaded first, which
    takes stages of its own.
    """

    up: Tile
    down: Tile
    dh: Tile
    dx: Tile
    dw: Tile
    dw_left: Tile
    dw_right: Tile
    gather_first: bool = False
    """Whether the rows of x are written down in the order of experts for the gradient of fc1, which then takes `dw`:
    4 R D bytes moved once, instead of slower reads that are repeated for every block of 2F."""

    def __post_init__(self) -> None:
        assert self.up.m == self.down.m == self.dh.m == self.dx.m, self

    @property
    def rows(self) -> int:
        """Rows of a row tile."""
        return self.up.m


# `flat` saves 1 to 13 % of the time of a product, most where it is not deep. The up projection, whose two sums fill the
# registers, takes 8 to 31 % longer with it.
_FLAT = Tile(m=128, n=256, k=64, warps=8, stages=3, programs=1, flat=True)
NARROW = Tiles(
    up=Tile(m=128, n=128, k=64, warps=8, stages=4, programs=1),
    down=_FLAT,
    dh=_FLAT,
    dx=_FLAT,
    dw=Tile(m=128, n=256, k=64, warps=8, stages=4),
    dw_left=Tile(m=128, n=256, k=64, warps=8, stages=6),
    dw_right=Tile(m=128, n=128, k=64, warps=8, stages=6),
)
WIDE = replace(NARROW, gather_first=True)
_FLAT_HALF = Tile(m=64, n=128, k=64, warps=4, stages=4, programs=2, flat=True)
_SQUARE = Tile(m=128, n=128, k=64, warps=8, stages=6)
FEW_ROWS = Tiles(
    up=Tile(m=64, n=128, k=64, warps=8, stages=4, programs=1),
    down=_FLAT_HALF,
    dh=_FLAT_HALF,
    dx=_FLAT_HALF,
    dw=replace(_SQUARE, stages=4),
    dw_left=_SQUARE,
    dw_right=_SQUARE,
)
# Before sm_90 descriptors become plain loads with addresses in registers, which leaves room for smaller sums.
BEFORE_HOPPER = Tiles(
    up=Tile(m=64, n=64, k=32, warps=4, stages=3),
    down=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dh=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dx=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dw=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dw_left=Tile(m=64, n=128, k=32, warps=8, stages=3),
    dw_right=Tile(m=64, n=128, k=32, warps=8, stages=3),
)

# Tiles of 64 rows gain up to 3 % at 32 to 96 rows per expert, and lose as much at 128. Gathering first saves 6 % of the
# gradient of fc1 at F = 1024 and 15 % at 14336, and costs 2 % at 768.
# (rows per expert, expert width F, tiles): the first entry with at least that many of both is taken.
HOPPER_TABLE: tuple[tuple[float, float, Tiles], ...] = ((96, inf, FEW_ROWS), (inf, 1023, NARROW), (inf, inf, WIDE))


def choose_tiles(*, rows: int, experts: int, width: int, capability: int) -> Tiles:
    """Tiles for `rows` routed rows over `experts` experts of width `width` (F), at compute capability x 10.

    The rule looks at what the host knows: the mean of rows per expert, not the routing of this step.
    """
    if capability < 90:
        return BEFORE_HOPPER
    return next(tiles for most, widest, tiles in HOPPER_TABLE if rows <= most * experts and width <= widest)
