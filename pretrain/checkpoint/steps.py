"""The folder that holds a run's checkpoints: names, leftovers of crashes, and which checkpoints to remove.

step_00000300             a checkpoint: complete, because it only gets this name by a rename
step_00000300_grown       the newer one of the same step, when the model grew after it
step_00000300.partial     being written
step_00000300.displaced   the former checkpoint of this step, while another one takes its place
step_00000300.removed     being deleted

The last three exist for a grown one as well.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

PARTIAL, DISPLACED, REMOVED = ".partial", ".displaced", ".removed"
_NAME = re.compile(r"step_(\d{8,16})(_grown)?")
_log = logging.getLogger(__name__)


class Moment(NamedTuple):
    """When a checkpoint was taken. The later of two moments is the greater one."""

    step: int
    """Optimizer steps done."""
    grown: bool = False
    """Whether the model had grown after the last of these steps. A step may have both checkpoints, this one later."""

    @property
    def name(self) -> str:
        """Folder name of the checkpoint."""
        return f"step_{self.step:08d}{'_grown' if self.grown else ''}"


def moment_of(path: Path) -> Moment | None:
    """What a checkpoint's folder name says; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return Moment(int(match[1]), grown=match[2] is not None) if match else None


def list_moments(directory: Path) -> dict[Moment, Path]:
    """The folder of every checkpoint, valid or not, oldest first. Empty when `directory` does not exist."""
    if not directory.is_dir():
        return {}
    found = ((moment_of(path), path) for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    return dict(sorted((moment, path) for moment, path in found if moment is not None))


def put_in_place(partial: Path, directory: Path) -> None:
    """Rename a complete `partial` to `directory`; a checkpoint that has this name already gives way."""
    sync_directory(partial)
    displaced = directory.with_name(directory.name + DISPLACED)
    if directory.exists():
        if displaced.exists():
            shutil.rmtree(displaced)
        os.rename(directory, displaced)
    os.rename(partial, directory)
    sync_directory(directory.parent)
    if displaced.exists():
        shutil.rmtree(displaced)


def remove(path: Path) -> None:
    """Delete a checkpoint such that a crash on the way leaves no half of one under its name."""
    removed = path.with_name(path.name + REMOVED)
    os.rename(path, removed)
    sync_directory(path.parent)
    shutil.rmtree(removed)


def recover(directory: Path) -> None:
    """Clear away what crashed saves and deletions left; a displaced checkpoint without a successor returns."""
    for path in sorted(directory.iterdir()):
        if moment_of(path.with_suffix("")) is None:
            continue
        if path.suffix == DISPLACED and not path.with_suffix("").exists():
            _log.warning("%s was being replaced: putting it back", path)
            os.rename(path, path.with_suffix(""))
        elif path.suffix in (PARTIAL, DISPLACED, REMOVED):
            _log.warning("removing %s, left by an interrupted save", path)
            shutil.rmtree(path)


def sync_directory(directory: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
