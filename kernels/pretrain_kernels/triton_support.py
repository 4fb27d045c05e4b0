"""What every Triton kernel here shares: is Triton there, is it interpreting, and one launch as a value.

Importing this module needs neither Triton nor CUDA.

A `Launch` holds a kernel, its grid and its arguments. The same value is run on a device, run by Triton's interpreter
on the CPU (`TRITON_INTERPRET=1` in the environment before Triton is imported), or compiled without a GPU
(`pretrain_kernels.triton_compile`). So what the static checks see is exactly what is launched.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors. Read by Triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere (interpreter, compiling ahead) those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Block sizes of one matrix kernel and how it is scheduled.

    `m` x `n` is the output block, `k` the step of the contraction; `warps` of 32 threads and `stages` of software
    pipelining (blocks of operands in flight).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0
    """Programs of a multiprocessor, which take one block after the other; 0: one program for each block."""
    flat: bool = False
    """Whether a program loads the next block's operands while it finishes the last one; takes shared memory."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch: `kernel` over `grid` blocks with `arguments` by name (constexprs included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Run it on the current device (or in the interpreter). An empty grid is no launch."""
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
