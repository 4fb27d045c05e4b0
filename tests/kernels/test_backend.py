"""Which backend is chosen, and what is said where one does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain_kernels import (
    BackendError,
    Grouped,
    Tokens,
    check_backend,
    choose_backend,
    swiglu_experts,
    triton_support,
)
from tests.kernels.triton_process import run_cases

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.skipif(triton_support.interpreting(), reason="about Triton without its interpreter")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 9.0, and Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton_support, "installed", lambda: True)


@pytest.mark.parametrize(
    ("dtype", "D", "width", "backend"),
    [
        (BF16, 64, 24, "triton"),
        (FP16, 64, 24, "triton"),
        (BF16, 8, 8, "triton"),
        (BF16, 64, 12, "loop"),
        (BF16, 12, 64, "loop"),
        (FP32, 64, 12, "grouped_mm"),
        (FP32, 64, 6, "loop"),
        (FP64, 64, 64, "loop"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_choice_on_a_gpu(dtype: torch.dtype, D: int, width: int, backend: str) -> None:
    assert choose_backend(GPU, dtype, D, width) == backend


@pytest.mark.usefixtures("hopper")
def test_choice_without_triton_or_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert choose_backend(GPU, BF16, 64, 64) == "grouped_mm"
    with pytest.raises(BackendError, match=r"compute capability 8\.0"):
        check_backend("triton", GPU, BF16, 64, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_backend(GPU, BF16, 64, 64) == "triton"
    monkeypatch.setattr(triton_support, "installed", lambda: False)
    assert choose_backend(GPU, BF16, 64, 64) == "grouped_mm"
    with pytest.raises(BackendError, match="not installed"):
        check_backend("triton", GPU, BF16, 64, 64)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_grouped_mm_wherever_torch_takes_it_on_the_cpu(dtype: torch.dtype) -> None:
    """The loop is for what torch's grouped_mm refuses, forward or backward."""
    ends = torch.tensor([1, 3], dtype=torch.int32)

    def takes(width: int) -> bool:
        x, weight = torch.ones(3, 16, dtype=dtype, requires_grad=True), torch.ones(2, width, 16, dtype=dtype)
        try:
            out = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
            out.backward(torch.ones_like(out))
        except RuntimeError:
            return False
        return True

    taken = [width for width in range(1, 17) if takes(width)]
    assert taken == {FP32: [4, 8, 12, 16], BF16: [8, 16], FP64: []}[dtype]
    for D, F_ in ((16, "width"), ("width", 16)):
        chosen = [
            width
            for width in range(1, 17)
            if choose_backend(CPU, dtype, width if D == "width" else 16, width if F_ == "width" else 16) != "loop"
        ]
        assert chosen == taken


@pytest.mark.parametrize(
    ("backend", "dtype", "D", "width", "problem", "remedy"),
    [
        ("triton", BF16, 64, 64, "needs an NVIDIA GPU", "grouped_mm"),
        ("grouped_mm", FP64, 64, 64, "does not take fp64", "loop"),
        ("grouped_mm", BF16, 64, 12, "F = 12", "loop"),
        ("grouped_mm", FP32, 7, 12, "D = 7", "loop"),
    ],
)
@pytest.mark.skipif(not triton_support.installed(), reason="Triton is not installed")
def test_misfits_are_one_clear_line(
    backend: str, dtype: torch.dtype, D: int, width: int, problem: str, remedy: str
) -> None:
    x, fc1 = torch.ones(3, D, dtype=dtype), torch.ones(1, 2 * width, D, dtype=dtype)
    fc2 = torch.ones(1, D, width, dtype=dtype)
    with pytest.raises(BackendError) as error:
        swiglu_experts(x, fc1, fc2, Grouped(torch.tensor([3]), torch.ones(3)), backend=backend)
    message = str(error.value)
    assert message.startswith(f'experts backend "{backend}": ')
    assert problem in message
    assert message.endswith(f'; use "{remedy}"')
    assert "\n" not in message
    swiglu_experts(x, fc1, fc2, Grouped(torch.tensor([3]), torch.ones(3)), backend=remedy)


@pytest.mark.usefixtures("hopper")
def test_triton_refuses_fp32_on_a_gpu() -> None:
    with pytest.raises(BackendError, match=r"takes bf16 and fp16, not torch\.float32"):
        check_backend("triton", GPU, FP32, 64, 64)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fc1": torch.ones(2, 15, 8)}, "fc1"),
        ({"x": torch.ones(3, 9)}, "x (3, 9)"),
        ({"x": torch.ones(3, 8, dtype=BF16)}, "one data type"),
        ({"routing": Grouped(torch.tensor([1, 2]), torch.ones(4))}, "scores"),
        ({"routing": Grouped(torch.tensor([1, 2]), torch.ones(3, 1))}, "scores"),
        ({"routing": Tokens(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1))}, "scores"),
        ({"routing": Grouped(torch.tensor([3]), torch.ones(3))}, "rows_per_expert"),
        ({"routing": Grouped(torch.tensor([1, 1]), torch.ones(3))}, "sums to 2"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, object], problem: str) -> None:
    right = {
        "x": torch.ones(3, 8),
        "fc1": torch.ones(2, 16, 8),
        "fc2": torch.ones(2, 8, 8),
        "routing": Grouped(torch.tensor([1, 2]), torch.ones(3)),
    }
    swiglu_experts(**right)
    with pytest.raises(ValueError, match=r"must (be|have)") as error:
        swiglu_experts(**right | change)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not triton_support.installed(), reason="Triton is not installed")
def test_triton_through_the_one_function(tmp_path: Path) -> None:
    """In the interpreter, in a process of its own: a few of the tests that the other backends pass."""
    only = "triton and (memory_layout or (under_megatron and True) or loss_curves)"
    results = run_cases(Path(__file__).with_name("test_experts.py"), tmp_path, interpret=True, only=only)
    assert len(results) == 3
    assert not any(results.values()), results
