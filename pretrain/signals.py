"""Being asked to stop: SIGTERM, SIGUSR1 (SLURM's warning before preemption or the time limit) and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

DONE, REQUEUE = 0, 75
"""Exit codes of training: the budget is used up; saved after a request to stop, start me again (EX_TEMPFAIL)."""


class StopRequest:
    """Whether somebody asked this job to save and end. One rank hearing it is enough."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal this rank received."""
        self.agreed = False
        """Whether all ranks know; set by `agree` alone, so that they leave the loop at the same step."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: note the signal; a second Ctrl-C ends the process at once."""
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def agree(self, device: torch.device) -> bool:
        """Collective at a step boundary: whether any rank has been asked to stop."""
        asked = torch.tensor(int(self.signal is not None), dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.agreed = bool(asked.item())
        return self.agreed


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Turn the signals of SIGNALS into a StopRequest for the time of a `with` block."""
    stop = StopRequest()
    previous = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
