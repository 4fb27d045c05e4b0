"""Compile a Triton launch without a GPU and read registers, spills and instructions off the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.runtime.jit import native_specialize_impl

from pretrain_kernels.triton_support import Launch, interpreting

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a block can use, by compute capability x 10 (CUDA C++ programming guide, technical limits)."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the machine code of one compiled kernel uses, per thread where not said otherwise."""

    registers: int
    stack_bytes: int
    local_accesses: int
    """Loads and stores of local memory in the code: registers that were spilled."""
    shared_bytes: int
    """Shared memory of one block."""
    tensor_instructions: int
    """Matrix instructions: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)."""
    bulk_loads: int
    """Loads by the bulk tensor copy engine (UTMALDG)."""


def compile_ahead(launch: Launch, *, capability: int) -> Compiled:
    """Compile `launch` for an NVIDIA GPU of compute capability x 10 (80, 90, 100), with no GPU present.

    The tensors among the arguments may be on the meta device. Not available in a process that interprets.
    """

    assert not interpreting(), "kernels defined under TRITON_INTERPRET=1 cannot be compiled"
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = compile_source(_source(launch), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _dump("-res-usage", path)
        code = _dump("-sass", path)
    return Compiled(
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=kernel.metadata.shared,
        tensor_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)),
        bulk_loads=len(re.findall(r"\bUTMALDG\b", code)),
    )


def _source(launch: Launch) -> Any:
    """The kernel with the types, constants and alignments that Triton itself would derive from these arguments."""

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", value
        else:
            kind, key = native_specialize_impl(CUDABackend, value, False, not parameter.do_not_specialize, True)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[index,] = key
        elif isinstance(key, str):
            attributes[index,] = CUDABackend.parse_attr(key)
    return ASTSource(launch.kernel, signature, constants, attributes)


def _dump(option: str, path: Path) -> str:
    """Output of the cuobjdump that comes with Triton."""

    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the output of cuobjdump"
    return int(found[1])
