"""Memory of this process at its peak."""

from __future__ import annotations

from pathlib import Path

import torch

# Linux: writing 5 resets the high-water mark of resident memory (proc(5)).
CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"
STATUS = Path("/proc/self/status")


class PeakMemory:
    """The peak from construction on, over what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = _resident("VmRSS") if _reset_peak() else None

    def extra_bytes(self) -> int | None:
        """Most bytes in use so far beyond those at the start: allocated on the GPU, or resident on the host; None on a
        host whose kernel does not keep count."""
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _resident("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before)


def _reset_peak() -> bool:
    """Forget the high-water mark. Whether that could be done: sandboxes and other kernels have no such file, or do not
    let it be written."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """A figure of this process in bytes, None where the kernel does not give it."""
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10  # given in kB
    return None
