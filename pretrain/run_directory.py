"""The folder of one run: its lock, its resolved configuration, and the manifest of what ran there.

config.toml      resolved configuration of the latest start
manifest.json    versions, commit, command, machine of every start
metrics.jsonl, events.jsonl, checkpoints/, report/    see the packages that write them
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.errors import RunDirectoryError

LOCK_FILE = "run.lock"
CONFIG_FILE = "config.toml"
MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"
PACKAGES = ("torch", "megatron-core", "numpy", "triton", "transformer-engine")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run directory, made if needed, for this job alone. Call on one rank only.

    The lock is the kernel's: it ends with the process, however that ends. Raises RunDirectoryError when another process
    holds it, or the directory cannot be written to.
    """
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk did not take would be tried again, and raise, on closing.
        lock = open(directory / LOCK_FILE, "a+b", buffering=0)  # noqa: SIM115 (held for the whole block)
    with lock:
        with _writing(directory):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().decode() or "another process"
                raise RunDirectoryError(
                    f"run.directory = {directory}: in use by {holder}; wait for that run to end, stop it, or choose "
                    f"another directory"
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Errors of the file system as a RunDirectoryError."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"run.directory = {directory}: cannot be written ({error.strerror}); free some space there, mend its "
            f"permissions, or choose another directory"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file of a run directory in one step, so that a crash leaves the old or the new one.

    Raises RunDirectoryError, and leaves nothing else behind, when it cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    with _writing(path.parent):
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_manifest(directory: Path, *, world_size: int, device: str, parameters: dict[str, int]) -> None:
    """Add this start to the run's manifest. `parameters`: total and active, for the report."""
    path = directory / MANIFEST_FILE
    starts = _earlier_starts(path)
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "world_size": world_size,
            "device": device,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "versions": {"meristem": __version__} | {name: found for name in PACKAGES if (found := _version(name))},
            "commit": _commit(),
        }
    )
    write_atomically(path, json.dumps({"parameters": parameters, "starts": starts}, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (ValueError, LookupError, TypeError) as error:
        raise RunDirectoryError(f"{path}: damaged, lists no starts of the run; move the file away") from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this package is imported from, with `-dirty` when it was changed; None outside one."""
    here = Path(__file__).parent
    describe = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # No git here: the package was installed, and its version says what it is.
    return done.stdout.strip() or None
