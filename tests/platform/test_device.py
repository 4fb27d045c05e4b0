"""Device, threads, fp32 products and allocator: chosen as documented, and said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from pretrain.errors import UserError
from pretrain.platform import device


@pytest.mark.parametrize(
    ("ranks", "environment", "threads"),
    [
        (1, {}, 6),
        (2, {}, 3),
        (4, {}, 1),
        (8, {}, 1),  # more ranks than cores
        (2, {"OMP_NUM_THREADS": "5"}, 5),
        (2, {"OMP_NUM_THREADS": "4,2"}, 4),
        (2, {"OMP_NUM_THREADS": "dynamic"}, 3),
        (2, {"SLURM_CPUS_PER_TASK": "7"}, 7),
        (2, {"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "7"}, 5),
    ],
)
def test_thread_count(ranks: int, environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert device.thread_count(ranks, environment) == threads


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_onednn_is_kept_where_it_is_exact(fp32_precision: None) -> None:
    error = device.matmul_error()
    assert 0 < error < device.MATMUL_TOLERANCE
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    chosen = device.use_onednn_for_fp32()
    exact = chosen.startswith("oneDNN (relative error ")
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if exact else "none")
    # Whatever was chosen, products are fp32 products.
    assert device.matmul_error() < device.MATMUL_TOLERANCE


def test_onednn_is_dropped_where_it_rounds_to_bf16(fp32_precision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    monkeypatch.setattr(device, "matmul_error", lambda: 2e-3)
    assert device.use_onednn_for_fp32() == "as torch has it (oneDNN's relative error would be 2e-03)"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_the_accuracy_check_sees_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return product(a, b) if a.dtype is torch.float64 else product(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert device.matmul_error() > 100 * device.MATMUL_TOLERANCE


def test_the_accuracy_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    device.matmul_error()
    assert torch.equal(before, torch.get_rng_state())


FAULTS = """
import ctypes, resource, sys
from pretrain.platform.device import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
said = keep_freed_memory() if sys.argv[1] == "keep" else ""
def step():
    buffer = libc.malloc(2**26)
    ctypes.memset(buffer, 1, 2**26)
    libc.free(buffer)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, said)
"""


def faults(mode: str, **environment: str) -> tuple[int, str]:
    """Page faults of four equal steps after a first one, and what was said."""
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    count, _, said = result.stdout.strip().partition(" ")
    return int(count), said


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc only")
def test_freed_memory_is_kept() -> None:
    pages = 4 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    kept, said = faults("keep")
    assert said == "keeps freed memory"
    assert kept < pages // 100
    # Transparent huge pages can make one fault out of 512.
    assert faults("leave")[0] > max(pages // 1024, 2 * kept)


def test_the_users_allocator_settings_stay() -> None:
    assert faults("keep", MALLOC_TOP_PAD_="1048576")[1] == "as set by MALLOC_TOP_PAD_"


def test_a_rank_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(UserError, match=r"local rank 2 has no GPU: 2 visible .*--nproc-per-node 2"):
        device.setup(2, local_world_size=3)


def test_the_gpu_of_the_local_rank_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    result = device.setup(1, local_world_size=2)
    assert (result.device, result.backend) == (torch.device("cuda", 1), "nccl")
    assert chosen == [result.device]
    # Without it, megatron-core's router fails on a GPU where Transformer Engine is not installed.
    assert moe_utils.te_general_gemm is None


def test_describe_says_every_choice() -> None:
    choices = device.Device(torch.device("cpu"), "gloo", 3, fp32_matmul="by hand", allocator="none at all")
    assert choices.describe() == "cpu with gloo, 3 CPU threads; fp32 products: by hand; allocator: none at all"
