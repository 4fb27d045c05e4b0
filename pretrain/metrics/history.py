"""Read what a run has written, while it runs or afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import RunDirectoryError
from pretrain.metrics.events import events_in_force
from pretrain.metrics.jsonl import read_jsonl
from pretrain.metrics.recorder import EVENTS_FILE, METRICS_FILE

Series = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """The rows and events of one run."""

    name: str
    """Directory name; with a part of the path before it where several runs share that."""
    directory: Path
    train: list[dict[str, Any]]
    """Rows of `TrainRow`, by step."""
    valid: list[dict[str, Any]]
    """Rows of `ValidRow`, by step."""
    events: list[dict[str, Any]]
    """Everything that happened, in order, also what a restart took back."""
    manifest: dict[str, Any]

    def events_in_force(self, name: str) -> list[dict[str, Any]]:
        """Events of this name that no restart took back, see `events.events_in_force`."""
        return events_in_force(self.events, name)

    def last_event(self, name: str) -> dict[str, Any] | None:
        """The newest event of this name."""
        return next((event for event in reversed(self.events) if event["event"] == name), None)

    @property
    def latest_train(self) -> list[dict[str, Any]]:
        """The training rows of the model as it is now, after its last growth; all when it has none since."""
        grown_at = max((event["step"] for event in self.events_in_force("growth")), default=0)
        return [row for row in self.train if row["step"] > grown_at] or self.train

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Every time the run went on from a checkpoint."""
        return [event for event in self.events if event["event"] == "restart"]

    @property
    def wall_seconds(self) -> float:
        """As the run's clock has told, and from there, or from the first event, to the last row."""
        times = [row["time"] for row in (*self.events, *self.train, *self.valid)]
        told = self.last_event("goodput")
        if told is None:
            return float(max(times) - min(times))
        return float(told["wall_seconds"] + max(times) - told["time"])

    @property
    def is_moe(self) -> bool:
        return any("moe" in row for row in self.train)


def series(rows: Sequence[dict[str, Any]], key: str) -> Series:
    """One number per row, NaN where the row has none; `a.b` reaches into a nested table."""
    return np.array([_number(row, key) for row in rows], dtype=np.float64)


def listed(rows: Sequence[dict[str, Any]], key: str) -> Series:
    """[entries, rows] a list of every row, NaN where a row's is shorter (it was written before a growth, with fewer
    layers for example); `a.b` reaches into a nested table."""
    lists = [_value(row, key) or [] for row in rows]
    table = np.full((max(map(len, lists), default=0), len(rows)), np.nan)
    for column, values in enumerate(lists):
        table[: len(values), column] = [np.nan if value is None else value for value in values]
    return table


def read_histories(run_dirs: Sequence[Path]) -> list[History]:
    """The histories of several runs, with distinct names. Raises RunDirectoryError for a folder that is no run, or
    has no rows yet."""
    full = [path.resolve() for path in run_dirs]
    if len(set(full)) != len(full):
        raise RunDirectoryError("a run is given twice: name each run directory once")
    names = [path.name for path in full]
    if len(set(names)) != len(names):
        common = os.path.commonpath(full)
        names = [os.path.relpath(path, common) for path in full]
    return [_read(path, name) for path, name in zip(run_dirs, names, strict=True)]


def _read(directory: Path, name: str) -> History:
    if not directory.is_dir():
        raise RunDirectoryError(f"{directory}: no such run directory: check the path (run.directory of the config)")
    if not (directory / METRICS_FILE).exists():
        raise RunDirectoryError(f"{directory}: no {METRICS_FILE} in it: give the run directory of a run that started")
    rows = read_jsonl(directory / METRICS_FILE)
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        raise RunDirectoryError(f"{directory}: {METRICS_FILE} has no training rows yet: wait for the first step")
    events_path, manifest_path = directory / EVENTS_FILE, directory / "manifest.json"
    return History(
        name=name,
        directory=directory,
        train=train,
        valid=[row for row in rows if row["kind"] == "valid"],
        events=read_jsonl(events_path) if events_path.exists() else [],
        manifest=json.loads(manifest_path.read_text()) if manifest_path.exists() else {},
    )


def _number(row: dict[str, Any], key: str) -> float:
    value = _value(row, key)
    return float("nan") if value is None else float(value)


def _value(row: dict[str, Any], key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
