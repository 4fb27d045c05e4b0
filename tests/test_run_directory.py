"""The lock of a run directory, and the small files in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import run_directory
from pretrain.errors import RunDirectoryError
from pretrain.run_directory import locked, write_atomically, write_manifest

HOLD = """
import sys, time
from pathlib import Path
from pretrain.run_directory import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run` until its input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_lock_names_its_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunDirectoryError) as caught, locked(tmp_path / "run"):
        pass
    assert str(caught.value) == (
        f"run.directory = {tmp_path / 'run'}: in use by process {holder.pid} on {socket.gethostname()}; wait for that "
        "run to end, stop it, or choose another directory"
    )
    with locked(tmp_path / "another"):
        pass


def test_the_lock_ends_with_the_block(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    assert holder.wait(timeout=60) == 0
    for _ in range(2):
        with locked(tmp_path / "run"):
            assert (tmp_path / "run" / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_ends_with_a_killed_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    with locked(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError) as caught, locked(tmp_path / "file" / "run"):
        pass
    assert str(caught.value).startswith(
        f"run.directory = {tmp_path / 'file' / 'run'}: cannot be written (Not a directory); free some space there"
    )


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(RunDirectoryError, match=r"cannot be written \(No space left on device\); free some space"):
            write_atomically(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_the_manifest_lists_every_start(tmp_path: Path) -> None:
    for ranks in (2, 4):
        write_manifest(tmp_path, world_size=ranks, device="cpu", parameters={"total": 3, "active": 2})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["parameters"] == {"total": 3, "active": 2}
    assert [start["world_size"] for start in manifest["starts"]] == [2, 4]
    start = manifest["starts"][0]
    assert start["command"] == sys.argv
    assert {"meristem", "torch", "megatron-core"} <= set(start["versions"])
    assert "no-such-package" not in start["versions"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"starts": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(RunDirectoryError, match=r"manifest\.json: damaged, .*; move the file away"):
        write_manifest(tmp_path, world_size=1, device="cpu", parameters={})
    assert (tmp_path / "manifest.json").read_text() == damage


def test_the_commit_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if not head:
        pytest.skip("not in a git checkout")
    assert (run_directory._commit() or "").removesuffix("-dirty") == head
    # Installed elsewhere there is no commit to tell.
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "run_directory.py"))
    assert run_directory._commit() is None
