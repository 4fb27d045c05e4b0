"""The CPU benchmark measures layers that agree, or stops."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from pretrain_kernels.bench import cpu


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One small shape and two rounds; the process's own settings come back."""
    monkeypatch.setattr(cpu, "SHAPES", [cpu.Shape(E=3, D=16, F=8, R=12)])
    monkeypatch.setattr(sys, "argv", ["cpu", "--rounds", "2"])
    matmul = torch.backends.mkldnn.matmul
    before, threads = matmul.fp32_precision, torch.get_num_threads()
    yield
    matmul.fp32_precision = before
    torch.set_num_threads(threads)


def test_reports_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    cpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert "E 3, D 16, F 8, 12 rows" in lines
    measured = [line for line in lines if line.endswith("x") and " ms " in line]
    assert [line.strip().startswith(str(variant)) for line, variant in zip(measured, cpu.VARIANTS, strict=True)]
    assert measured[0].endswith("1.00x")


def test_stops_where_the_layers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.swiglu_experts
    monkeypatch.setattr(cpu, "swiglu_experts", lambda *inputs: 1.001 * right(*inputs))
    with pytest.raises(RuntimeError, match=r"ours fp32 is 1\.0e-03 off SequentialMLP fp32"):
        cpu.main()


def test_counts_floating_point_operations() -> None:
    """9 products of R x D with D x F: 3 forward, and 2 for the gradients of each."""
    assert cpu.Shape(E=1, D=10, F=20, R=30).gflop == pytest.approx(9 * 2 * 10 * 20 * 30 / 1e9)
