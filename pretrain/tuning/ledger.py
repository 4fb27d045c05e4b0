"""The ledger of a sweep: a row for each trial that has ended, well or not, found again by a hash of what it trained.

`ledger.jsonl` is only ever appended to. Whatever ends the sweep, every row in it counts, and nothing in it is done
again. To have a trial done again, remove its line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.data.files import idx_path, read_sidecar, sha256_of
from pretrain.metrics.jsonl import JsonlWriter, read_jsonl
from pretrain.tuning.sensitivity import Value

LEDGER_FILE = "ledger.jsonl"
NOT_HASHED = ("checkpoint", "metrics")
"""Sections that change nothing in what is learned."""


@dataclass(frozen=True)
class Row:
    """A trial that has ended: one configuration trained with one seed."""

    key: str
    """See `trial_key`."""
    optimizer: str
    cell: str
    seed: int
    settings: dict[str, Value]
    loss: float
    """Final validation loss, nats per token; inf when there is none."""
    reason: str
    """Why there is no loss; empty when there is one."""
    seconds: float
    """Wall time of training, restarts included."""
    tokens: int
    """That the run was to see."""


def trial_key(config: Config) -> str:
    """Hash of everything that decides what a run learns: its configuration without paths, and the data's contents.

    The same on every machine and in every process, whatever the order of keys.
    """
    values: dict[str, Any] = tomllib.loads(dump_config(config))
    for section in NOT_HASHED:
        values.pop(section, None)
    values["run"].pop("directory")
    values["data"] = {
        split: [(data_hash(source.prefix), source.weight) for source in getattr(config.data, split)]
        for split in ("train", "valid")
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def data_hash(prefix: Path) -> str:
    """Contents of a dataset: its sidecar's word on the tokens or, without one, the index of its documents."""
    sidecar = read_sidecar(prefix)
    return sidecar.bin.sha256 if sidecar else sha256_of(idx_path(prefix))


class Ledger:
    """The rows of a sweep by key. Rows may be added from several threads."""

    def __init__(self, rows: dict[str, Row], writer: JsonlWriter | None) -> None:
        self.rows = rows
        self._writer = writer
        self._lock = threading.Lock()

    def add(self, row: Row) -> None:
        """Append a row; it is in the file when this returns."""
        assert self._writer is not None, "opened for reading"
        with self._lock:
            self._writer.write({**asdict(row), "time": round(time.time(), 3)})
            self.rows[row.key] = row

    def ended(self) -> list[Row]:
        """All rows of this moment; other threads may go on adding."""
        with self._lock:
            return list(self.rows.values())


@contextmanager
def open_ledger(directory: Path, *, writing: bool) -> Iterator[Ledger]:
    """The ledger of a sweep's directory. A last line that was cut off while it was written is dropped, and said so.

    Raises RunDirectoryError when a line in the middle is damaged.
    """
    path = directory / LEDGER_FILE
    rows = {row.key: row for row in _read(path)}
    writer = JsonlWriter(path) if writing else None
    try:
        yield Ledger(rows, writer)
    finally:
        if writer:
            writer.close()


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows = read_jsonl(path)
    if len(rows) < len(path.read_bytes().splitlines()):
        print(f"{path}: the last line was cut off as it was written, and is dropped; its trial is looked at again")
    return [_row(values) for values in rows]


def _row(values: dict[str, Any]) -> Row:
    values = {name: values[name] for name in Row.__dataclass_fields__}
    # JSON has no word for infinity.
    return Row(**values | {"loss": math.inf if values["loss"] is None else values["loss"]})
