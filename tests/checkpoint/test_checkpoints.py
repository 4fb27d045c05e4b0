"""A run's checkpoints: which one is resumed from, which are kept, and what background saving promises."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pretrain.checkpoint.checkpoints as checkpoints_module
import pretrain.checkpoint.write as write_module
from pretrain.checkpoint import (
    LS_HEADER,
    Checkpoints,
    Moment,
    list_checkpoints,
    read_checkpoint,
    read_state,
    verify_checkpoints,
)
from pretrain.config.schema import CheckpointConfig
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, STATE, bits, empty, part, same_bits, whole
from tests.helpers.distributed import run_ranks


def open_checkpoints(folder: Path, **config) -> tuple[Checkpoints, list]:
    """Checkpoints whose callbacks append to the list that comes with them."""
    events: list = []
    checkpoints = Checkpoints(
        folder,
        CheckpointConfig(**config),
        on_durable=lambda path, seconds: events.append(("durable", path.name)),
        on_damaged=lambda path, findings: events.append(("damaged", path.name, *findings)),
    )
    return checkpoints, events


def save(checkpoints: Checkpoints, *steps: int, grown: bool = False) -> None:
    for step in steps:
        state = {"step": step, "grown": grown}
        checkpoints.save(step, whole(bits(step + 100 * grown)), state=state, config_toml=CONFIG, grown=grown)


def names(folder: Path) -> list[int | str]:
    """Steps, and `3_grown` and the like, in the order of names."""
    texts = [path.name.removeprefix("step_").lstrip("0") for path in sorted(folder.iterdir())]
    return [int(text) if text.isdecimal() else text for text in texts]


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# Which one is resumed from ------------------------------------------------------------------------------------


def test_newest_by_step_not_by_time(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=9)
    assert checkpoints.latest_valid() is None
    save(checkpoints, 9, 100, 20)
    os.utime(tmp_path / "step_00000009", (2e9, 2e9))
    assert checkpoints.latest_valid() == tmp_path / "step_00000100"
    assert list(checkpoints.moments()) == [Moment(9), Moment(20), Moment(100)]


def test_the_grown_one_is_the_newer_of_a_step(tmp_path):
    checkpoints, events = open_checkpoints(tmp_path, keep=9)
    save(checkpoints, 3, grown=True)
    save(checkpoints, 2, 3)
    assert list(checkpoints.moments()) == [Moment(2), Moment(3), Moment(3, grown=True)]
    newest = checkpoints.latest_valid()
    assert newest == tmp_path / "step_00000003_grown"
    target = empty()
    read_checkpoint(newest, whole(target))
    assert all(same_bits(target[key], tensor) for key, tensor in bits(103).items())
    # Without it, the run goes back to the model before the growth; the next step is newer than both.
    flip_last_bit(newest / "shard_00000_000.safetensors")
    assert checkpoints.latest_valid() == tmp_path / "step_00000003"
    assert [event[:2] for event in events if event[0] == "damaged"] == [("damaged", "step_00000003_grown")]
    save(checkpoints, 3, grown=True)
    assert checkpoints.latest_valid() == newest
    save(checkpoints, 4)
    assert checkpoints.latest_valid() == tmp_path / "step_00000004"


def test_a_damaged_one_is_named_and_passed_over(tmp_path, caplog):
    checkpoints, events = open_checkpoints(tmp_path, keep=9)
    save(checkpoints, 1, 2, 3, 4)
    flip_last_bit(tmp_path / "step_00000004" / "shard_00000_000.safetensors")
    (tmp_path / "step_00000003" / "manifest.json").write_text("")
    events.clear()
    assert checkpoints.latest_valid() == tmp_path / "step_00000002"
    assert events == [
        ("damaged", "step_00000004", "shard_00000_000.safetensors: changed (sha256 differs from the manifest's)"),
        ("damaged", "step_00000003", "manifest.json: empty"),
    ]
    assert "step_00000004 is damaged and passed over: shard_00000_000.safetensors: changed" in caplog.text
    # Without hashing the shards, the flipped bit is not seen.
    assert checkpoints.latest_valid(deep=False) == tmp_path / "step_00000004"


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path)
    save(checkpoints, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints are damaged \(step_00000002: index\.json: missing"):
        checkpoints.latest_valid()


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path)
    save(checkpoints, 1, 2)
    (tmp_path / "step_00000002" / "index.json").unlink()
    save(checkpoints, 2)
    assert checkpoints.latest_valid() == tmp_path / "step_00000002"


def test_other_names_are_no_checkpoints(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path)
    save(checkpoints, 1)
    for name in ("step_9", "step_00000002.bak", "step_00000002_grew", "best", "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000003").write_text("a file")
    (tmp_path / "step_00000004").symlink_to("step_00000001")
    assert list(checkpoints.moments()) == [Moment(1)]


# Retention ----------------------------------------------------------------------------------------------------


def test_newest_and_pinned_are_kept(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=2, keep_every_steps=20)
    save(checkpoints, *range(5, 61, 5))
    assert names(tmp_path) == [20, 40, 55, 60]
    assert all(read_state(path)["step"] == moment.step for moment, path in checkpoints.moments().items())


def test_both_of_a_step_count_and_both_are_pinned(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=2, keep_every_steps=20)
    save(checkpoints, 15)
    save(checkpoints, 15, grown=True)
    assert names(tmp_path) == [15, "15_grown"]
    save(checkpoints, 20)
    assert names(tmp_path) == ["15_grown", 20]
    save(checkpoints, 20, grown=True)
    save(checkpoints, 25, 30)
    assert names(tmp_path) == [20, "20_grown", 25, 30]
    one, _ = open_checkpoints(tmp_path, keep=1)
    save(one, 30, grown=True)
    assert names(tmp_path) == ["30_grown"]


def test_a_damaged_one_pushes_out_no_good_one(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2)
    (tmp_path / "step_00000002" / "state.json").unlink()
    save(checkpoints, 3)
    assert names(tmp_path) == [1, 2, 3]
    # It goes when there are enough good ones after it.
    save(checkpoints, 4)
    assert names(tmp_path) == [3, 4]


def test_nothing_is_removed_before_the_new_one_is_in_place(tmp_path, monkeypatch):
    checkpoints, _ = open_checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "put_in_place", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(checkpoints, 2)
    assert names(tmp_path) == [1]
    save(checkpoints, 2)
    assert names(tmp_path) == [2]


def test_an_old_one_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    checkpoints, events = open_checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def fail(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoints_module, "remove", fail)
    with pytest.raises(
        CheckpointError, match="step_00000001: cannot remove this old checkpoint: Device or resource busy"
    ):
        save(checkpoints, 2)
    # The new one is none the worse.
    assert events == [("durable", "step_00000001"), ("durable", "step_00000002")]
    assert checkpoints.latest_valid() == tmp_path / "step_00000002"


# Saving in the background -------------------------------------------------------------------------------------


class Gate:
    """Holds the writer at the first shard until opened."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = write_module.save_file

        def gated(content, path):
            self.reached.set()
            assert self.opened.wait(60)
            original(content, path)

        monkeypatch.setattr(write_module, "save_file", gated)


def test_background_save_is_durable_only_when_it_is(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoints, events = open_checkpoints(tmp_path, asynchronous=True)
    tensors, state = bits(1), {"step": 1, "rng": [1, 2]}
    checkpoints.save(1, whole(tensors), state=state, config_toml=CONFIG)
    # Training goes on: what it changes now is not in the checkpoint.
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8).zero_()
    state["rng"].append(3)
    assert gate.reached.wait(60)
    assert events == []
    assert checkpoints.moments() == {}
    assert names_with_suffix(tmp_path) == {".partial"}
    gate.opened.set()
    checkpoints.wait()
    assert events == [("durable", "step_00000001")]
    target = empty()
    read_checkpoint(checkpoints.latest_valid(), whole(target))
    assert all(same_bits(target[key], tensor) for key, tensor in bits(1).items())
    assert read_state(tmp_path / "step_00000001") == {"step": 1, "rng": [1, 2]}


def test_host_memory_is_used_again_and_follows_the_model(tmp_path):
    """Also when the model changes shape between two saves, as growth does."""
    checkpoints, _ = open_checkpoints(tmp_path, asynchronous=True, keep=9)
    small, large = {"a": torch.arange(4.0), "b": torch.zeros(2)}, {"a": torch.arange(8.0)}
    for step, tensors in enumerate((small, small, large, small), start=1):
        tensors["a"] += 100
        checkpoints.save(step, whole(tensors), state={}, config_toml="")
        checkpoints.wait()
        target = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        read_checkpoint(checkpoints.latest_valid(), whole(target))
        assert all(torch.equal(target[key], tensor) for key, tensor in tensors.items())


def names_with_suffix(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


def test_without_asynchronous_save_returns_durable(tmp_path, monkeypatch):
    """Negative control of the test above."""
    gate = Gate(monkeypatch)
    gate.opened.set()
    checkpoints, events = open_checkpoints(tmp_path)
    save(checkpoints, 1)
    assert gate.reached.is_set()
    assert events == [("durable", "step_00000001")]


def test_the_next_save_waits_for_the_pending_one(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoints, events = open_checkpoints(tmp_path, asynchronous=True)
    save(checkpoints, 1)
    assert gate.reached.wait(60)
    second = threading.Thread(target=save, args=(checkpoints, 2))
    second.start()
    # It cannot get on while the first is held.
    second.join(0.2)
    assert second.is_alive()
    assert events == []
    gate.opened.set()
    second.join()
    checkpoints.wait()
    assert events == [("durable", "step_00000001"), ("durable", "step_00000002")]


@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_background_error_is_raised_at_the_next_call(tmp_path, monkeypatch, call):
    checkpoints, events = open_checkpoints(tmp_path, asynchronous=True)

    def fail(content, path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "save_file", fail)
        save(checkpoints, 1)
        with pytest.raises(CheckpointError, match="cannot write the checkpoint: Input/output error"):
            checkpoints.wait() if call == "wait" else save(checkpoints, 2)
    assert events == []
    assert list(tmp_path.iterdir()) == []
    # Raised once; the next save works.
    save(checkpoints, 3)
    checkpoints.wait()
    assert events == [("durable", "step_00000003")]


def test_an_error_of_the_callback_is_not_swallowed(tmp_path):
    def fail(path, seconds):
        raise ValueError("event log is closed")

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=True), on_durable=fail)
    save(checkpoints, 1)
    with pytest.raises(RuntimeError, match="event log is closed"):
        checkpoints.wait()


def train_while_saving(folder: Path) -> list:
    """Collectives on the default group while the background thread has its own."""
    rank = dist.get_rank()
    checkpoints, events = open_checkpoints(folder, asynchronous=True, keep=2)
    tensors = part("rows", rank, bits())
    total = 0.0
    for step in range(1, 6):
        checkpoints.save(step, tensors, state={"step": step}, config_toml=CONFIG)
        for _ in range(20):
            value = torch.tensor([float(rank)])
            dist.all_reduce(value)
            total += value.item()
    checkpoints.wait()
    # One bit of rank 1's file, found by whichever rank gets to hash it.
    if rank == 0:
        flip_last_bit(next((folder / "step_00000005").glob("shard_00001_*")))
    dist.barrier()
    path = checkpoints.latest_valid()
    target = part("columns", rank, empty())
    read_checkpoint(path, target)
    good = all(same_bits(a.data, b.data) for a, b in zip(target, part("columns", rank, bits()), strict=True))
    return [total, path.name, good, events]


def test_background_saves_beside_training_on_two_ranks(tmp_path):
    results = run_ranks(train_while_saving, 2, tmp_path)
    assert results == [results[0]] * 2
    total, name, good, events = results[0]
    assert total == 5 * 20 * 1
    assert (name, good) == ("step_00000004", True)
    assert events[:5] == [("durable", f"step_{step:08d}") for step in range(1, 6)]
    assert events[5][:2] == ("damaged", "step_00000005")
    assert events[5][2].startswith("shard_00001_000.safetensors: changed")


# Listing ------------------------------------------------------------------------------------------------------


def test_listing(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path / "checkpoints", keep=9)
    for step in (1, 2, 3):
        checkpoints.save(step, whole(bits()), state={**STATE, "tokens": step * 4096}, config_toml=CONFIG)
    manifest = json.loads((tmp_path / "checkpoints" / "step_00000001" / "manifest.json").read_text())
    flip_last_bit(tmp_path / "checkpoints" / "step_00000002" / "shard_00000_000.safetensors")
    (tmp_path / "checkpoints" / "step_00000003" / "state.json").unlink()
    quick, deep = list_checkpoints(tmp_path), list_checkpoints(tmp_path, deep=True)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    assert quick[0].cells() == (
        "1", "4,096", f"{size / 2**20:.1f} MiB", manifest["created"], "1 rank, tensor 2, expert 4", "yes"
    )  # fmt: skip
    assert len(quick[0].cells()) == len(LS_HEADER)
    assert [row.problem for row in quick] == ["", "", "state.json: missing"]
    assert quick[2].cells() == ("3", "", "", "", "", "no: state.json: missing")
    assert [bool(row.problem) for row in deep] == [False, True, True]
    findings = verify_checkpoints(tmp_path)
    assert [path.name for path in findings] == ["step_00000001", "step_00000002", "step_00000003"]
    assert [len(found) for found in findings.values()] == [0, 1, 1]


def test_listing_marks_the_grown_one(tmp_path):
    checkpoints, _ = open_checkpoints(tmp_path / "checkpoints", keep=9)
    save(checkpoints, 1)
    save(checkpoints, 1, grown=True)
    assert [row.cells()[0] for row in list_checkpoints(tmp_path)] == ["1", "1 grown"]
    assert [path.name for path in verify_checkpoints(tmp_path)] == ["step_00000001", "step_00000001_grown"]


def test_listing_a_run_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        list_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        verify_checkpoints(tmp_path / "nowhere")
