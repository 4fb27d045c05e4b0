"""Memory of this process at its peak."""

from __future__ import annotations

from pathlib import Path

import torch

# Linux: writing 5 resets the high-water mark of resident memory (proc(5)).
CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"


class PeakMemory:
    """The peak from construction on, over what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            CLEAR_REFS.write_text(RESET_PEAK)
            self._before = _resident("VmRSS")

    def extra_bytes(self) -> int:
        """Most bytes in use so far beyond those at the start: allocated on the GPU, or resident on the host."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10  # given in kB
    raise RuntimeError(f"/proc/self/status has no {field}")
