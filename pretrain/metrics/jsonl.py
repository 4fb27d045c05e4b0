"""Append-only JSON lines: one object a line, never a torn line in the middle, never a step twice."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import RunDirectoryError

logger = logging.getLogger(__name__)

# Rows kept in memory while the disk takes none: about 10 MB of rows, hours of steps.
MAX_PENDING_ROWS = 10_000


class JsonlWriter:
    """Appends rows to one file, each in the file (not in a buffer of ours) when `write` returns.

    Opening repairs what a crash left: a half-written last line is dropped and, with `keep_through_step`, so are
    the rows of later steps, which the resumed run will write again. A failing disk never stops training: rows
    wait in memory, one warning is logged, and every later `write` tries again. One writer per file at a time.

    Raises RunDirectoryError when the file cannot be read, repaired or opened.
    """

    def __init__(self, path: Path, *, keep_through_step: int | None = None) -> None:
        self.path = path
        self.previous: dict[str, Any] | None = None
        """Last row the file held before it was cut: how far the run had come when it stopped."""
        self.dropped_rows = 0
        """Rows lost because the disk stayed full for more than MAX_PENDING_ROWS."""
        try:
            self.previous = _repair(path, keep_through_step)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._end = os.fstat(self._fd).st_size
        except OSError as error:
            raise RunDirectoryError(
                f"{path}: cannot be written ({error.strerror}): free space or pick another run.directory"
            ) from error
        self._pending: list[bytes] = []
        self._failing = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`. Numbers that are not finite become null, as JSON has no word for them."""
        self._pending.append(_encode(row))
        if len(self._pending) > MAX_PENDING_ROWS:
            del self._pending[0]
            self.dropped_rows += 1
        try:
            self._flush()
        except OSError as error:
            if not self._failing:
                logger.warning("%s: cannot write (%s); rows wait in memory, training goes on", self.path, error)
            self._failing = True

    def close(self) -> None:
        """Close the file; warn about the rows that never made it to disk."""
        lost = self.dropped_rows + len(self._pending)
        if lost:
            logger.warning("%s: %d rows were not written, the disk never took them", self.path, lost)
        os.close(self._fd)

    def _flush(self) -> None:
        if self._failing:
            os.ftruncate(self._fd, self._end)  # part of a line may have reached the file
        while self._pending:
            line = self._pending[0]
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            self._end += written
            del self._pending[0]
        if self._failing:
            self._failing = False
            logger.warning("%s: written again, %d rows lost", self.path, self.dropped_rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete rows of `path`; a half-written last line (a run in progress, or a crash) is left out.

    Raises RunDirectoryError for a damaged line that is not the last.
    """
    return [row for _, row in _complete_lines(path)]


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    torn = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise RunDirectoryError(f"{path} line {torn}: not a JSON object: remove that line and start again")
            row = _parse(line)
            if row is None:
                torn = number
            else:
                yield line, row


def _repair(path: Path, keep_through_step: int | None) -> dict[str, Any] | None:
    """Drop a torn tail and the rows after `keep_through_step`; return the last complete row from before."""
    if not path.exists():
        return None

    def is_kept(row: Mapping[str, Any]) -> bool:
        return keep_through_step is None or row.get("step", 0) <= keep_through_step

    last = None
    kept_bytes = 0
    for line, row in _complete_lines(path):
        last = row
        kept_bytes += len(line) if is_kept(row) else 0
    if kept_bytes != path.stat().st_size:
        # Written aside and renamed, so that a crash here leaves the old file or the new one.
        aside = path.with_name(path.name + ".tmp")
        with aside.open("wb") as file:
            file.writelines(line for line, row in _complete_lines(path) if is_kept(row))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return last
