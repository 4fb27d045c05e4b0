"""Rows survive crashes and full disks, and no step appears twice."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from pretrain.errors import RunDirectoryError
from pretrain.metrics import jsonl
from pretrain.metrics.jsonl import JsonlWriter, read_jsonl


@contextmanager
def disk_full_at(size):
    """Files of this process cannot grow past `size` bytes: a write fails, after taking what still fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_steps(path, steps, **options):
    writer = JsonlWriter(path, **options)
    for step in steps:
        writer.write({"step": step, "loss": step / 3})
    writer.close()
    return writer


def steps_of(path):
    return [row["step"] for row in read_jsonl(path)]


def test_rows_come_back_exactly_and_are_on_disk_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path)
    row = {"step": 1, "loss": 1 / 3, "list": [1, 2.5], "nested": {"a": None}, "skipped": False}
    writer.write(row)
    assert read_jsonl(path) == [row]  # before close
    writer.close()


def test_numbers_that_are_not_finite_become_null_in_strict_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1, "loss": float("nan"), "moe": {"entropy": [1.0, float("inf")]}})
    writer.close()

    def refuse(word):
        raise AssertionError(word)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "moe": {"entropy": [1.0, None]}}


def test_rows_of_a_killed_process_are_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = (
        "import os, sys, pathlib; from pretrain.metrics.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 6): writer.write({'step': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tail", [b'{"step":3,"lo', b'{"step":3}', b"\x00" * 64, b"\x00" * 8 + b"\n"])
def test_half_written_last_line_is_dropped_on_open(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    write_steps(path, [1, 2])
    with path.open("ab") as file:
        file.write(tail)
    assert steps_of(path) == [1, 2]  # readable while it is torn
    write_steps(path, [3])
    assert steps_of(path) == [1, 2, 3]


def test_without_repair_the_torn_line_would_spoil_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_steps(path, [1])
    with path.open("ab") as file:
        file.write(b'{"step":2,"lo{"step":2}\n{"step":3}\n')
    with pytest.raises(RunDirectoryError, match=r"rows.jsonl line 2: not a JSON object: remove that line"):
        read_jsonl(path)
    with pytest.raises(RunDirectoryError, match="line 2"):
        JsonlWriter(path)


def test_resume_cuts_the_steps_that_come_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_steps(path, range(1, 11))
    writer = write_steps(path, range(7, 13), keep_through_step=6)
    assert writer.previous == {"step": 10, "loss": 10 / 3}
    assert steps_of(path) == list(range(1, 13))
    assert list(tmp_path.iterdir()) == [path]
    write_steps(path, [7])  # the negative control: without the cut a step appears twice
    assert steps_of(path).count(7) == 2


def test_nothing_is_rewritten_when_nothing_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_steps(path, [1, 2])
    inode = path.stat().st_ino
    write_steps(path, [3], keep_through_step=2)
    assert path.stat().st_ino == inode
    write_steps(path, [3], keep_through_step=2)
    assert path.stat().st_ino != inode


def test_crash_while_cutting_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_steps(path, range(1, 6))
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter(path, keep_through_step=2)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_steps(path, [3], keep_through_step=2)
    assert steps_of(path) == [1, 2, 3]


def test_full_disk_warns_once_and_the_rows_arrive_later(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1})
    with disk_full_at(path.stat().st_size + 5), caplog.at_level(logging.WARNING):
        for step in range(2, 6):
            writer.write({"step": step})
        assert steps_of(path) == [1]
    assert len(caplog.records) == 1
    assert "training goes on" in caplog.text
    writer.write({"step": 6})
    writer.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes().count(b"\n") == 6


def test_rows_that_never_fit_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_PENDING_ROWS", 2)
    path = tmp_path / "rows.jsonl"
    writer = JsonlWriter(path)
    with disk_full_at(0):
        for step in range(1, 6):
            writer.write({"step": step})
        assert writer.dropped_rows == 3
        writer.close()
    assert "5 rows were not written" in caplog.text


def test_unwritable_place_is_a_clear_error(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"rows.jsonl: cannot be written \(.*\): free space or pick"):
        JsonlWriter(tmp_path / "missing" / "rows.jsonl")


def test_disk_full_helper_really_fills_the_disk(tmp_path):
    with disk_full_at(3), pytest.raises(OSError, match="File too large"):
        (tmp_path / "file").write_bytes(b"four")
    assert os.path.getsize(tmp_path / "file") == 3
