"""The measured peak of this process's memory against what it takes, and hosts that do not tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.platform import memory
from pretrain.platform.memory import PeakMemory

CPU = torch.device("cpu")
MIB = 1 << 20
# Pages that the interpreter itself takes or gives back meanwhile.
NOISE = 8 * MIB


@pytest.fixture
def counted() -> None:
    if not memory._reset_peak():
        pytest.skip("this host does not let its high-water mark be reset")


def take(size: int) -> None:
    """Touch so many bytes, and give them back."""
    torch.ones(size, dtype=torch.uint8)


@pytest.mark.usefixtures("counted")
def test_a_peak_counts_though_it_is_over():
    peak = PeakMemory(CPU)
    take(64 * MIB)
    assert 64 * MIB - NOISE <= peak.extra_bytes() <= 64 * MIB + NOISE


@pytest.mark.usefixtures("counted")
def test_what_was_before_does_not_count():
    take(256 * MIB)
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    peak = PeakMemory(CPU)
    assert peak.extra_bytes() <= NOISE
    take(32 * MIB)
    assert 32 * MIB - NOISE <= peak.extra_bytes() <= 32 * MIB + NOISE
    assert held[-1] == 1


@pytest.mark.usefixtures("counted")
def test_an_earlier_peak_is_forgotten(monkeypatch):
    """Negative control: without the reset, it is not."""
    monkeypatch.setattr(memory, "_reset_peak", lambda: True)
    take(256 * MIB)
    assert PeakMemory(CPU).extra_bytes() > 128 * MIB


def test_a_missing_file_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    peak = PeakMemory(CPU)
    take(MIB)
    assert peak.extra_bytes() is None


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_a_file_that_cannot_be_written_is_no_figure(tmp_path, monkeypatch, error):
    """Not by its mode: root may write whatever the mode says."""

    class ReadOnly(type(Path())):
        def write_text(self, *_):
            raise error("read-only")

    monkeypatch.setattr(memory, "CLEAR_REFS", ReadOnly(tmp_path / "clear_refs"))
    assert PeakMemory(CPU).extra_bytes() is None


@pytest.mark.parametrize("status", [None, "Name:\tpython\n", "VmRSS:\t  100 kB\n"])
def test_a_host_without_the_figures(tmp_path, monkeypatch, status):
    file = tmp_path / "status"
    if status is not None:
        file.write_text(status)
    monkeypatch.setattr(memory, "STATUS", file)
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    assert PeakMemory(CPU).extra_bytes() is None


def test_figures_are_read_in_kibibytes(tmp_path, monkeypatch):
    file = tmp_path / "status"
    monkeypatch.setattr(memory, "STATUS", file)
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    file.write_text("Name:\tVmHWM\nVmHWM:\t 900 kB\nVmRSS:\t 100 kB\n")
    peak = PeakMemory(CPU)
    assert peak.extra_bytes() == 800 << 10
    file.write_text("VmHWM:\t 50 kB\n")
    assert peak.extra_bytes() == 0
