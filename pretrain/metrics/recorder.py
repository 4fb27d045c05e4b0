"""One place to tell about a run: rows and events go to the files, to the tracker and to the progress line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config.schema import MetricsConfig
from pretrain.metrics.events import events_in_force
from pretrain.metrics.jsonl import JsonlWriter, read_jsonl
from pretrain.metrics.progress import ProgressLine
from pretrain.metrics.rows import TrainRow, ValidRow
from pretrain.metrics.tracker import WandbTracker

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


class Recorder:
    """Writes a run's `metrics.jsonl` and `events.jsonl`, feeds wandb when asked, and shows progress.

    Make one on rank 0 only; `None` elsewhere. `metrics.jsonl` loses the rows after the restored step, which come
    again. `events.jsonl` keeps everything: it is the history, in which a `restart` event takes back what came after
    its step (see `events_in_force`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        metrics: MetricsConfig,
        config: Mapping[str, Any],
        total_steps: int,
        restored_step: int = 0,
        tracker_id: str | None = None,
    ) -> None:
        """`config`: the whole configuration, for the tracker. `restored_step`: steps of the checkpoint the run goes on
        from, 0 for a new run. `tracker_id`: what `state_dict` of that checkpoint said."""
        self._rows = JsonlWriter(directory / METRICS_FILE, keep_through_step=restored_step)
        self._events = JsonlWriter(directory / EVENTS_FILE)
        previous = self._rows.previous or {}
        self.last_alive: float | None = previous.get("time")
        """Wall time of the last row an earlier process of this run wrote, for `RunClock.load_state_dict`."""
        self.last_step: int = previous.get("step", 0)
        """Step of that row: what lies between the restored step and it is lost work."""
        self._tracker = None
        if metrics.wandb:
            self._tracker = WandbTracker(
                directory,
                project=metrics.wandb_project,
                name=directory.resolve().name,
                config=config,
                run_id=tracker_id,
                # Only a run that goes on has been sent these steps.
                logged_step=self.last_step if tracker_id else -1,
            )
        self._progress = ProgressLine(total_steps=total_steps)

    def step(
        self, step: int, *, loss: float, step_seconds: float, tokens_per_second: float, skipped: bool = False
    ) -> None:
        """Every step: move the progress line."""
        self._progress.step(
            step, loss=loss, step_seconds=step_seconds, tokens_per_second=tokens_per_second, skipped=skipped
        )

    def train(self, row: TrainRow) -> None:
        """Every `metrics.log_every_steps` steps: write a row."""
        self._write(row.to_json())

    def valid(self, row: ValidRow) -> None:
        """After a validation: write a row and show it."""
        self._write(row.to_json())
        self._progress.valid(row.step, loss=row.valid_loss, bits_per_byte=row.valid_bits_per_byte)

    def event(self, event: str, *, step: int, **fields: Any) -> None:
        """Something happened after `step` steps: start, restart, skip, save, growth, baselines, stop, goodput."""
        self._events.write({"event": event, "time": round(time.time(), 3), "step": step, **fields})

    def has_event(self, event: str, *, step: int) -> bool:
        """Whether the file holds an event of this name and step that is in force, also one of an earlier process. A run
        that went on from a checkpoint has to have written its `restart` before it asks."""
        return any(found["step"] == step for found in events_in_force(read_jsonl(self._events.path), event))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: `tracker_id`."""
        return {"tracker_id": self._tracker.run_id if self._tracker else None}

    def close(self, *, exit_code: int = 0) -> None:
        """Close the files, the tracker and the progress line."""
        self._progress.close()
        self._rows.close()
        self._events.close()
        if self._tracker:
            self._tracker.close(exit_code=exit_code)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._rows.write(row)
        if self._tracker:
            self._tracker.log(row)
