"""This process's device, and what is set on the machine before training: threads, fp32 products, allocator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pretrain.errors import UserError

MATMUL_TOLERANCE = 1e-5
"""Largest relative error of an fp32 product. Correct fp32 has about 4e-7 at size 512, bf16 inside about 2e-3."""

# mallopt's parameters (glibc's malloc.h) and the environment variables that set the same.
_MALLOPT = {
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # -1: never give memory at the heap's end back
    "MALLOC_TOP_PAD_": (-2, 2**29),  # grow the heap by 512 MiB at a time
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),  # below 2 GiB, allocate from the heap and not by mmap
}


@dataclass(frozen=True)
class Device:
    """Where this process computes, and with which settings."""

    device: torch.device
    backend: str
    """torch.distributed's backend for it: gloo or nccl."""
    threads: int
    """Threads of one torch operation on the CPU."""
    fp32_matmul: str
    """What computes fp32 products."""
    allocator: str
    """What became of the C library's allocator."""

    def describe(self) -> str:
        """Every choice in one line, for the log."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return (
            f"{self.device}{name} with {self.backend}, {self.threads} CPU thread{'s' if self.threads > 1 else ''}; "
            f"fp32 products: {self.fp32_matmul}; allocator: {self.allocator}"
        )


def setup(local_rank: int = 0, *, local_world_size: int = 1) -> Device:
    """Choose and prepare this process's device; without CUDA, make megatron-core fit the CPU.

    Args:
        local_rank: index of this process on its machine; it gets the GPU of that index.
        local_world_size: processes of this run on the machine, which share its cores.

    Raises:
        UserError: more processes than GPUs on this machine, or an unsupported megatron-core on a CPU.
    """
    # Only here: it imports torch's compiler, and what it does megatron-core, which takes seconds.
    from pretrain.platform import cpu_adapter  # noqa: PLC0415

    threads = thread_count(local_world_size)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"local rank {local_rank} has no GPU: {gpus} visible on this machine; start at most {gpus} "
                f"processes on it (--nproc-per-node {gpus}), or widen CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Without Transformer Engine megatron-core's router fails on a GPU, too.
        cpu_adapter.router_gemm()
        return Device(device, "nccl", threads, fp32_matmul="as torch has it", allocator="as torch has it")
    cpu_adapter.apply()
    return Device(
        torch.device("cpu"), "gloo", threads, fp32_matmul=use_onednn_for_fp32(), allocator=keep_freed_memory()
    )


def thread_count(local_world_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """Threads for one of `local_world_size` processes: OMP_NUM_THREADS, or SLURM's share, or an equal share."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        # OMP_NUM_THREADS may list nested levels ("4,2"); the outer one counts.
        value = environment.get(name, "").split(",")[0]
        if value.isdecimal() and int(value) > 0:
            return int(value)
    # Cores this process may use, not cores of the machine: a container or a scheduler may give it fewer.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size)


def matmul_error() -> float:
    """Relative error of an fp32 product of two 512 x 512 matrices, with fp64 as the truth."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    truth = a.double() @ b.double()
    return float(((a @ b).double() - truth).norm() / truth.norm())


def use_onednn_for_fp32() -> str:
    """Let oneDNN compute fp32 products where that keeps fp32's accuracy; return what was chosen.

    The switch says "bf16", but bf16 arithmetic only comes with AMX units; without, oneDNN computes in fp32. On an AMD
    EPYC with AVX-512 it was 1.0-1.1x as fast as MKL on expert layers (8-32 experts, 128-512 wide, one thread,
    interleaved), and 0.4x on products as small as 16 x 128 x 128. The outcome depends on the machine alone and on no
    timing, so all ranks and restarts agree.
    Not to be mixed with torch.set_float32_matmul_precision, which raises afterwards.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch.backends.mkldnn.is_available():
        return "as torch has it (no oneDNN)"
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    error = matmul_error()
    if error < MATMUL_TOLERANCE:
        return f"oneDNN (relative error {error:.0e})"
    matmul.fp32_precision = before
    return f"as torch has it (oneDNN's relative error would be {error:.0e})"


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> str:
    """Have glibc keep freed memory for the next step, rather than return it page by page; return what was done.

    A step allocates the same large buffers over and over, and the system clears every page it hands out. CPU time of
    forward and backward, fp32, one thread: 16 experts (1024 x 1024, 4096 rows, even routing) 2.6 s without, 1.3 s with,
    the same as with MALLOC_* in the environment of the process; 16 experts (512 x 512, 8192 rows, another random
    routing every step) 0.74 s without, 0.60 s with. Peak memory 1.0 -> 1.3-1.5 GB, and 0.74 -> 0.75 GB after 120 steps.
    """
    given = sorted(name for name in _MALLOPT if name in environment)
    if given:
        return f"as set by {', '.join(given)}"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "as the system has it (no mallopt)"
    # A list, so that one refusal does not keep the others from being tried; mallopt returns 1 for success.
    accepted = [mallopt(parameter, value) == 1 for parameter, value in _MALLOPT.values()]
    return "keeps freed memory" if all(accepted) else "as the system has it (mallopt refused)"
