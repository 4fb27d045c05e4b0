"""What a run shows while it trains: one live line on a terminal, plain lines at intervals in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pretrain.metrics.formats import count, duration

# A log gets a line after 5 s, later ones at 5 % of the time gone by, never less often than every minute: the start is
# watched closely, and a week makes 10,000 lines.
MIN_INTERVAL_SECONDS, MAX_INTERVAL_SECONDS, INTERVAL_SHARE = 5.0, 60.0, 0.05
ETA_STEPS = 50


class Eta:
    """Time left, from the last ETA_STEPS steps and from what evaluation and saving have added to steps so far."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._recent: deque[float] = deque(maxlen=ETA_STEPS)
        self._first_end: float | None = None
        self._steps_seconds = 0.0

    def step(self, seconds: float) -> None:
        """A step has ended that took `seconds`. The first one, which warms things up, does not count."""
        if self._first_end is None:
            self._first_end = self._now()
            return
        self._recent.append(seconds)
        self._steps_seconds += seconds

    def remaining_seconds(self, steps: int) -> float | None:
        """Estimate for `steps` more steps; None before there is anything to go by."""
        if self._first_end is None or not self._recent:
            return None
        # At least 1: wall time holds the steps and what lies between them.
        overhead = max(1.0, (self._now() - self._first_end) / self._steps_seconds) if self._steps_seconds else 1.0
        return steps * overhead * sum(self._recent) / len(self._recent)


class ProgressLine:
    """Step, losses, speed and time left. Make one on rank 0 only."""

    def __init__(
        self,
        *,
        total_steps: int,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._console = console or Console()
        self._now = now
        self._eta = Eta(now)
        self._valid = ""
        self._begun = now()
        self._printed_at = float("-inf")
        self._live: Progress | None = None
        if self._console.is_terminal:
            # Prints and warnings of others appear above the line: rich redirects stdout and stderr.
            self._live = Progress(
                TextColumn("{task.fields[head]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[tail]}"),
                console=self._console,
                refresh_per_second=2,
            )
            self._task = self._live.add_task("", total=total_steps, head="", tail="")

    def step(
        self, step: int, *, loss: float, step_seconds: float, tokens_per_second: float, skipped: bool = False
    ) -> None:
        """Step `step` (counted from 1) has ended."""
        self._eta.step(step_seconds)
        parts = [
            "skipped" if skipped else f"loss {loss:.3f}",
            self._valid,
            f"{count(tokens_per_second)} tokens/s",
        ]
        left = self._eta.remaining_seconds(self._total - step)
        if left is not None and step < self._total:
            parts.append(f"ETA {duration(left)}")
        head, tail = f"step {step}/{self._total}", "  ".join(part for part in parts if part)
        if self._live is not None:
            # Not before: from here on rich folds what others print to the width of the terminal, tables included.
            self._live.start()
            self._live.update(self._task, completed=step, head=head, tail=tail)
        elif step == self._total or self._now() - self._printed_at >= self._interval():
            self._print(f"{head}  {tail}")

    def valid(self, step: int, *, loss: float, bits_per_byte: float | None = None) -> None:
        """A validation after `step` steps; its result stays on the line."""
        figure = f"{loss:.3f}" if bits_per_byte is None else f"{bits_per_byte:.3f} bits/byte"
        self._valid = f"valid {figure}"
        if self._live is None:
            self._print(f"step {step}/{self._total}  {self._valid}")

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def _interval(self) -> float:
        elapsed = self._now() - self._begun
        return min(MAX_INTERVAL_SECONDS, max(MIN_INTERVAL_SECONDS, INTERVAL_SHARE * elapsed))

    def _print(self, line: str) -> None:
        self._printed_at = self._now()
        # soft_wrap: a line stays a line however narrow rich takes a log file to be.
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
