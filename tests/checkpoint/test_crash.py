"""Whatever interrupts a save, the checkpoints before it stay, and the next save works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain.checkpoint.write as write_module
from pretrain.checkpoint import Checkpoints, Moment, read_checkpoint, read_state, verify_checkpoint
from pretrain.config.schema import CheckpointConfig
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, bits, empty, same_bits, whole

# What a save does to the file system, by module and function; the kill comes just before one of these calls.
OPERATIONS = [
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "chmod"),
    (Path, "write_bytes"),
    (write_module, "save_file"),
]


def save(folder: Path, moment: Moment, *, keep: int = 1, asynchronous: bool = False) -> None:
    """Save `bits(seed_of(moment))` as the checkpoint of `moment` the way a run does, retention included."""
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep, asynchronous=asynchronous))
    step, grown = moment
    seed = seed_of(moment)
    checkpoints.save(step, whole(bits(seed)), state={"seed": seed}, config_toml=CONFIG, grown=grown)
    checkpoints.wait()


def seed_of(moment: Moment) -> int:
    return moment.step + 100 * moment.grown


def interrupt_at(count: int) -> list[str]:
    """Make this process kill itself before its `count`-th operation from now, or halfway if that writes a file."""
    seen: list[str] = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            if len(seen) == count:
                if name in ("write_bytes", "save_file"):
                    original(*args, **kwargs)
                    path = args[0] if name == "write_bytes" else args[1]
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(name)
            return original(*args, **kwargs)

        setattr(owner, name, operation)

    for owner, name in OPERATIONS:
        wrap(owner, name)
    return seen


def kill_in_child(folder: Path, moment: Moment, count: int, asynchronous: bool) -> bool:
    """Fork, save, die before operation `count`. Whether the child was killed rather than done."""
    child = os.fork()
    if child == 0:
        interrupt_at(count)
        save(folder, moment, asynchronous=asynchronous)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def sweep(folder: Path, moment: Moment, asynchronous: bool) -> None:
    """Kill the save of `moment` after that of step 1 at every operation in turn; print how many there were."""
    save(folder, Moment(1))
    original = folder.with_name(f"{folder.name}_original")
    shutil.copytree(folder, original)
    count = 0
    while True:
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
        if not kill_in_child(folder, moment, count, asynchronous):
            break
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=1))
        assert all(verify_checkpoint(path) == [] for path in checkpoints.moments().values())
        path = checkpoints.latest_valid()
        assert path is not None
        found = read_state(path)["seed"]
        # Old or new, never a mix; with no leftovers once a run has started.
        assert found in (1, seed_of(moment))
        target = empty()
        read_checkpoint(path, whole(target))
        assert all(same_bits(target[key], tensor) for key, tensor in bits(found).items())
        assert {entry.name for entry in folder.iterdir()} <= {"step_00000001", moment.name}
        save(folder, Moment(3))
        assert [entry.name for entry in folder.iterdir()] == ["step_00000003"]
        assert verify_checkpoint(folder / "step_00000003") == []
        count += 1
    assert read_state(Checkpoints(folder, CheckpointConfig()).latest_valid())["seed"] == seed_of(moment)
    print(count)


def test_kill_at_every_operation_of_a_save(tmp_path):
    """Step 2, or the model grown after step 1, comes after step 1 and retention removes that; step 1 takes its own
    former place."""
    # In a process of its own: the test process must neither fork with threads running nor keep the hooks.
    code = (
        "from pathlib import Path; from tests.checkpoint.test_crash import Moment, sweep\n"
        "cases = [(Moment(2), False), (Moment(2), True), (Moment(1), False), (Moment(1, grown=True), False)]\n"
        f"for i, case in enumerate(cases): sweep(Path({str(tmp_path)!r}) / str(i), *case)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # 5 files and 3 times a folder are brought to the disk, 4 texts and a shard written, ...
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 4
    assert min(counts) >= 20


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """A kill does not show a missing fsync, a power loss would. The order of the calls does."""
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(source, target):
        done.append(("rename", Path(target).name))
        rename(source, target)

    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig())
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    checkpoints.save(1, whole(bits()), state={}, config_toml=CONFIG)
    files = {("fsync", path.name) for path in (folder / "step_00000001").iterdir()}
    assert len(files) == 5
    assert set(done[:5]) == files
    assert done[4] == ("fsync", "manifest.json")
    assert done[5:] == [("fsync", "step_00000001.partial"), ("rename", "step_00000001"), ("fsync", "checkpoints")]


def test_leftovers_of_every_kind_are_cleared(tmp_path):
    for moment in (Moment(1), Moment(2), Moment(2, grown=True)):
        save(tmp_path, moment, keep=3)
    for name in ("step_00000003", "step_00000003_grown"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / f"{name}.partial")
    for name in ("step_00000001.removed", "step_00000001_grown.removed", "step_00000002.displaced"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    for name in ("step_00000001", "step_00000002_grown"):
        (tmp_path / name).rename(tmp_path / f"{name}.displaced")
    (tmp_path / "notes.partial").mkdir()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    found = ["notes.partial", "step_00000001", "step_00000002", "step_00000002_grown"]
    assert sorted(path.name for path in tmp_path.iterdir()) == found
    assert checkpoints.latest_valid() == tmp_path / "step_00000002_grown"
    assert verify_checkpoint(tmp_path / "step_00000001") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB. Mounting takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not permitted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("known_beforehand", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_full(small_disk, monkeypatch, known_beforehand, asynchronous):
    save(small_disk, Moment(1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(256 * 1024 - 16 * 4096))
    if not known_beforehand:
        # Somebody else fills the disk after we looked.
        monkeypatch.setattr(write_module, "_prepare", lambda partial, need: partial.mkdir())
    large = {"a": whole(bits())[0].data.new_ones(64 * 1024)}
    checkpoints = Checkpoints(small_disk, CheckpointConfig(keep=1, asynchronous=asynchronous))
    durable = []
    checkpoints.on_durable = lambda path, seconds: durable.append(path)

    def save_large():
        checkpoints.save(2, whole(large), state={}, config_toml=CONFIG)
        checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"no space left: need 0\.1 MiB, have 0\.0 MiB"):
        save_large()
    assert durable == []
    assert {path.name for path in small_disk.iterdir()} == {"filler", "step_00000001"}
    assert checkpoints.latest_valid() == small_disk / "step_00000001"
    # Room again: the same object saves.
    monkeypatch.undo()
    filler.unlink()
    save_large()
    assert durable == [small_disk / "step_00000002"]
    assert checkpoints.latest_valid() == small_disk / "step_00000002"


def test_read_only_file_system(small_disk):
    save(small_disk, Moment(1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"cannot keep checkpoints here: Read-only file system"):
        Checkpoints(small_disk, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: Read-only file system"):
        write_module.write_checkpoint(small_disk / "c", whole(bits()), step=2, state={}, config_toml="")
    # Reading needs no writing.
    target = empty()
    read_checkpoint(small_disk / "step_00000001", whole(target))
    assert all(same_bits(target[key], tensor) for key, tensor in bits(1).items())


def test_folder_that_vanished(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file now")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint: Not a directory"):
        checkpoints.save(1, whole(bits()), state={}, config_toml="")
