"""Cases of the machine code of the expert kernels, run by test_triton_experts.py in a process of its own.

That process does not interpret.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton
from torch import Tensor

from pretrain_kernels.triton_compile import SHARED_MEMORY_LIMIT, compile_ahead
from pretrain_kernels.triton_experts import Tiles, products, steps
from pretrain_kernels.triton_experts.routing import route_grouped, route_tokens
from pretrain_kernels.triton_experts.tiles import BEFORE_HOPPER, FEW_ROWS, NARROW
from pretrain_kernels.triton_support import Launch

# Tokens, choices and experts: of Qwen3-30B-A3B.
T, K, E = 4096, 8, 128
MATRIX_KERNELS = ("up_kernel", "rows_kernel", "dw_kernel")


@dataclass(frozen=True)
class Kind:
    """Data type, model width and expert width. Triton generates other code where a width is no multiple of 16."""

    dtype: torch.dtype
    D: int
    F: int


USUAL = Kind(torch.bfloat16, 2048, 768)  # Qwen3-30B-A3B
UNEVEN = Kind(torch.float16, 2056, 776)  # multiples of 8


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory: compiling looks at types and sizes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(tiles: Tiles, kind: Kind = USUAL, *, grouped: bool) -> list[Launch]:
    """All launches of training and of inference, weight gradients stored in the 16-bit type and added to fp32."""
    done: list[Launch] = []
    run, D, F = done.append, kind.D, kind.F
    shapes = ((T * K if grouped else T, D), (E, 2 * F, D), (E, D, F))
    x, fc1, fc2 = (meta(*shape, dtype=kind.dtype) for shape in shapes)
    if grouped:
        counts, scores = meta(E, dtype=torch.int64), meta(T * K, dtype=torch.float32)
        route = route_grouped(counts, scores, tile=tiles.rows, run=run)
    else:
        experts, scores = meta(T, K, dtype=torch.int64), meta(T, K, dtype=torch.float32)
        route = route_tokens(experts, scores, expert_count=E, tile=tiles.rows, run=run)
    y, h = steps.forward(x, fc1, fc2, route, tiles=tiles, keep=True, run=run)
    assert h is not None
    dh, scaled, _ = steps.backward_rows(y, fc2, h, route, tiles=tiles, run=run)
    steps.backward_input(dh, fc1, route, tiles=tiles, run=run)
    common = {"route": route, "tiles": tiles, "run": run}
    for left, right, weight, gathered in ((dh, x, fc1, "right"), (y, scaled, fc2, "left")):
        for out, accumulate, trainable in ((weight, False, None), (weight.float(), True, meta(E, dtype=torch.uint8))):
            steps.backward_weight(
                left, right, out, gathered=gathered, trainable=trainable, accumulate=accumulate, **common
            )
    steps.forward(x, fc1, fc2, route, tiles=tiles, keep=False, run=run)
    return done


def problems(launch: Launch, capability: int) -> list[str]:
    """What is wrong with the machine code of one launch."""
    name = launch.kernel.__name__
    code = compile_ahead(launch, capability=capability)
    found = []
    if code.local_accesses or code.stack_bytes:
        found.append("spills")
    if code.shared_bytes > SHARED_MEMORY_LIMIT[capability]:
        found.append("shared memory")
    if name in MATRIX_KERNELS and not code.tensor_instructions:
        found.append("no tensor-core instructions")
    if name in MATRIX_KERNELS and capability >= 90 and not code.bulk_loads:
        found.append("no bulk loads")
    return [f"{name}: {problem}: {code}" for problem in found]


def check(chosen: list[Launch], capability: int) -> None:
    """All of them are free of problems."""
    found = [problem for launch in chosen for problem in problems(launch, capability)]
    assert not found, "\n".join(found)


# Compiling takes long: what spills first.
@pytest.mark.parametrize(
    ("tiles", "kind", "layout"),
    [
        (NARROW, USUAL, "tokens"),
        (NARROW, USUAL, "grouped"),
        (FEW_ROWS, USUAL, "tokens"),
        (NARROW, UNEVEN, "tokens"),
        (NARROW, UNEVEN, "grouped"),
    ],
    ids=["narrow-tokens", "narrow-grouped", "few-tokens", "uneven-tokens", "uneven-grouped"],
)
def test_hopper(tiles: Tiles, kind: Kind, layout: str) -> None:
    check(launches(tiles, kind, grouped=layout == "grouped"), 90)


@pytest.mark.parametrize(
    ("capability", "tiles", "kind"),
    [(80, BEFORE_HOPPER, USUAL), (80, BEFORE_HOPPER, UNEVEN), (100, NARROW, USUAL)],
    ids=["ampere", "ampere-uneven", "blackwell"],
)
def test_neighbours_of_hopper(capability: int, tiles: Tiles, kind: Kind) -> None:
    """One launch of each kernel."""
    first = {launch.kernel.__name__: launch for launch in reversed(launches(tiles, kind, grouped=False))}
    assert len(first) == 9
    check(list(first.values()), capability)


def test_a_tile_that_is_too_large_is_noticed() -> None:
    tile = replace(NARROW.up, n=256)  # two sums of 128 x 256 in fp32: 256 registers a thread
    tiles = replace(NARROW, up=tile)
    up = next(launch for launch in launches(tiles, grouped=True) if launch.kernel.__name__ == "up_kernel")
    assert [problem.split(": ")[1] for problem in problems(up, 90)] == ["spills", "shared memory"]


@triton.jit
def unknown(width, pointer):
    """Instead of `products.whole`: the width as the compiler finds it."""
    return width


def test_a_width_that_says_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "whole", unknown)
    up = launches(NARROW, UNEVEN, grouped=True)[1]
    afresh = triton.jit(up.kernel.fn)  # the kernel itself has been compiled
    assert [problem.split(": ")[1] for problem in problems(replace(up, kernel=afresh), 90)] == ["spills"]
