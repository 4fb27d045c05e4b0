"""Whole sweeps with a made-up loss: all phases, nothing twice, whatever ends it; and what failed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.run_directory import locked
from pretrain.tuning import phases, sweep_report, trials
from pretrain.tuning.sweep import sweep
from tests.tuning.sweeps import ADAMW, DECAY, LR, RATES, Trainer, cell, finish, made_up_loss, write_lines, write_sweep

THREE_PHASES = [
    cell("small", 1),
    cell("small-long", 1, steps=40),
    cell("deep", 2, "deep"),
    cell("small-longest", 2, steps=160),
    cell("deeper", 3, "deeper"),
]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and one test looks at them."""
    monkeypatch.setattr(sweep_report, "_draw", lambda *_: {})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep" / "ledger.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep" / "results.json").read_text())


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(({**row, "time": 0} for row in found), key=lambda row: row["key"])


def test_three_phases(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trainer = write_sweep(tmp_path, corpus, cell=THREE_PHASES, seeds=[1, 2]), Trainer()
    assert sweep(file, jobs=4, train=trainer) == 0
    assert len({*trainer.trained}) == len(trainer.trained) == len(rows(tmp_path))
    assert "losses" in (tmp_path / "sweep" / "README.md").read_text()
    said = capsys.readouterr().out
    assert f"[{len(trainer.trained)} done, 0 asked for, 0s] adamw deeper seed " in said

    found = results(tmp_path)
    of_adamw = found["optimizers"]["adamw"]
    best = {name: one["settings"][LR] for name, one in of_adamw["best"].items()}
    # The made-up law, 8e-3 (N / N_small)^-0.5 C^-0.5 with D for C: all cells by steps of one length.
    assert best == {"small": 8e-3, "small-long": 4e-3, "deep": 4e-3, "small-longest": 2e-3}
    assert all(one["settings"][DECAY] == 0.1 for one in of_adamw["best"].values())
    # Seeds 1 and 2 differ by 0.002: the mean is 0.001 above.
    assert of_adamw["best"]["small"]["loss"] == pytest.approx(3.001)
    assert found["seed_deviation"] == pytest.approx(0.002 / math.sqrt(2))
    assert {key: one["sensitive"] for key, one in of_adamw["sensitive"].items()} == {LR: True, DECAY: False}
    # Phase 2 leaves alone what is not sensitive.
    assert of_adamw["best"]["deep"]["tried"] == len(RATES)
    check = of_adamw["checks"]["deeper"]
    assert check["settings"] == {LR: 2e-3, DECAY: 0.1}
    assert check["stood"] is True
    assert min(check["losses"], key=check["losses"].get) == "1"
    pictures = {path.name for path in (tmp_path / "sweep").glob("*.png")}
    assert pictures == {"progress.png", "one-off-adamw.png", "near-optimal-adamw.png", "fit-adamw.png"}

    # Nothing is run twice, and the report says the same.
    again = Trainer()
    assert sweep(file, jobs=4, train=again) == 0
    assert (again.trained, results(tmp_path)) == ([], found)


@pytest.mark.usefixtures("no_pictures")
def test_a_prediction_that_does_not_stand_is_said(tmp_path: Path, corpus: Path) -> None:
    """Negative control: the law breaks down in the largest model."""

    def breaks(config: Config) -> float:
        return made_up_loss(config) - (0.5 if config.model.num_layers == 32 and config.optim.lr < 2e-3 else 0)

    assert sweep(write_sweep(tmp_path, corpus, cell=THREE_PHASES), jobs=4, train=Trainer(breaks)) == 0
    check = results(tmp_path)["optimizers"]["adamw"]["checks"]["deeper"]
    assert check["stood"] is False
    assert min(check["losses"], key=check["losses"].get) == "0.5"
    assert "It **did not stand**" in (tmp_path / "sweep" / "README.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_stops_and_the_sweep_goes_on(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(write_sweep(tmp_path / "whole", corpus), jobs=1, train=Trainer()) == 0
    file, sessions = write_sweep(tmp_path / "parts", corpus), []
    for _ in range(10):
        trainer = Trainer()
        code = sweep(file, jobs=2, max_trials=4, train=trainer)
        sessions.append(len(trainer.trained))
        if code == 0:
            break
        assert code == 75
        said = capsys.readouterr().out
        assert "stopped (--max-trials is used up)" in said
        assert f"to go on: pretrain sweep {file}" in said
    assert sessions[0] == 4
    assert len(sessions) > 2
    assert without_times(rows(tmp_path / "parts")) == without_times(rows(tmp_path / "whole"))
    assert results(tmp_path / "parts") == results(tmp_path / "whole")

    hurried = Trainer()
    assert sweep(write_sweep(tmp_path / "late", corpus), jobs=1, max_hours=1e-9, train=hurried) == 75
    assert hurried.trained == []


@pytest.mark.usefixtures("no_pictures")
def test_dry_run_runs_nothing_and_leaves_nothing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, trainer = write_sweep(tmp_path, corpus), Trainer()
    assert sweep(file, jobs=1, dry_run=True, train=trainer) == 0
    said = capsys.readouterr().out.splitlines()
    assert (trainer.trained, (tmp_path / "sweep").exists()) == ([], False)
    # The start, four other rates and two other decays.
    assert len(said) == 1 + 4 + 2 + 1
    assert "0 trials done, 7 to be run next; a sweep of this file makes at most 15" in said[-1]
    sweep(file, jobs=1, max_trials=7, train=trainer)
    assert trainer.trained == [line.split()[0] for line in said[:-1]]


@pytest.mark.usefixtures("no_pictures")
def test_what_a_killed_sweep_left_counts(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path, corpus)
    assert sweep(file, jobs=1, train=Trainer()) == 0
    ledger = tmp_path / "sweep" / "ledger.jsonl"
    whole = rows(tmp_path)
    # Killed in the middle of a row of a run that has ended; the run before it was not begun.
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-2]) + lines[-1][:40])
    shutil.rmtree(tmp_path / "sweep" / "runs" / whole[-2]["key"])
    capsys.readouterr()
    trainer = Trainer()
    assert sweep(file, jobs=1, train=trainer) == 0
    assert "the last line was cut off" in capsys.readouterr().out
    assert trainer.trained == [whole[-2]["key"]]
    assert without_times(rows(tmp_path)) == without_times(whole)

    # Negative control: a run that had not ended is trained.
    ledger.write_bytes(b"".join(lines[:-1]))
    events = tmp_path / "sweep" / "runs" / whole[-1]["key"] / "events.jsonl"
    events.write_text(events.read_text().replace("finished", "stopped"))
    shutil.rmtree(events.parent / "checkpoints", ignore_errors=True)
    again = Trainer()
    assert sweep(file, jobs=1, train=again) == 0
    assert again.trained == [whole[-1]["key"]]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_a_killed_sweep_left_behind_is_waited_for(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_sweep(tmp_path, corpus, optimizer={"adamw": ADAMW | {"start": {LR: 1e-3}, "grid": {LR: [1e-3]}}})
    # The first session ends with its run under way ...
    assert sweep(file, jobs=1, train=lambda config, log: 75) == 75
    (directory,) = (tmp_path / "sweep" / "runs").iterdir()
    holds, waited = threading.Event(), threading.Event()
    monkeypatch.setattr(trials.time, "sleep", lambda _: waited.set())

    def orphan() -> None:
        with locked(directory):
            holds.set()
            waited.wait()
            finish(load_config(directory / "trial.toml"), 2.0)

    thread = threading.Thread(target=orphan)
    thread.start()
    holds.wait()
    # ... and the second takes that run's result.
    trainer = Trainer()
    assert sweep(file, jobs=1, train=trainer) == 0
    thread.join()
    assert (waited.is_set(), trainer.trained, rows(tmp_path)[0]["loss"]) == (True, [], 2.0)


@pytest.mark.usefixtures("no_pictures")
def test_failed_and_diverged_trials_are_rows_and_never_win(tmp_path: Path, corpus: Path) -> None:
    def train(config_file: Path, log_file: Path) -> int:
        config = load_config(config_file)
        directory = config.run.directory
        if config.optim.lr == 8e-3:  # would be the best
            log_file.write_text("starting\nerror: out of memory\n")
            return 1
        if config.optim.lr == 16e-3:
            write_lines(directory / "events.jsonl", [{"event": "diverged", "step": 3}])
            return 2
        if config.optim.weight_decay == 0.2:
            finish(config, math.nan)
            return 0
        finish(config, made_up_loss(config))
        return 0

    assert sweep(write_sweep(tmp_path, corpus), jobs=1, train=train) == 0
    reasons = {(row["settings"][LR], row["settings"][DECAY]): row["reason"] for row in rows(tmp_path)}
    assert reasons[8e-3, 0.0] == "ended with code 1: error: out of memory"
    assert reasons[16e-3, 0.0] == "diverged"
    assert reasons[1e-3, 0.2] == "loss is not finite"
    assert all((row["loss"] is None) == bool(row["reason"]) for row in rows(tmp_path))
    assert results(tmp_path)["optimizers"]["adamw"]["best"]["one"]["settings"] == {LR: 4e-3, DECAY: 0.1}
    report = (tmp_path / "sweep" / "README.md").read_text()
    assert "optim.lr = 0.008, optim.weight_decay = 0.0: ended with code 1: error: out of memory" in report


@pytest.mark.usefixtures("no_pictures")
def test_when_nothing_has_ever_worked_it_is_no_result(tmp_path: Path, corpus: Path) -> None:
    def fails(config_file: Path, log_file: Path) -> int:
        log_file.write_text("error: no such library\n")
        return 1

    file = write_sweep(tmp_path, corpus)
    with pytest.raises(UserError, match=r"ended with code 1: error: no such library; nothing has worked so far"):
        sweep(file, jobs=2, train=fails)
    assert rows(tmp_path) == []
    # Divergence is one: the whole neighbourhood is looked at before it is given up.
    diverging = Trainer(lambda _: math.inf)
    with pytest.raises(UserError, match=r"cell one: none of 7 configurations has a finite loss"):
        sweep(file, jobs=2, train=diverging)
    assert len(rows(tmp_path)) == 7


@pytest.mark.usefixtures("no_pictures")
def test_killed_runs_are_started_again_once(tmp_path: Path, corpus: Path) -> None:
    calls: dict[str, int] = {}
    inner = Trainer()

    def killed(config_file: Path, log_file: Path) -> int:
        name = config_file.parent.name
        calls[name] = calls.get(name, 0) + 1
        config = load_config(config_file)
        if config.optim.lr == 16e-3 or (config.optim.lr == 8e-3 and calls[name] == 1):
            return -9
        return inner(config_file, log_file)

    assert sweep(write_sweep(tmp_path, corpus), jobs=1, train=killed) == 0
    found = {(row["settings"][LR], row["settings"][DECAY]): row for row in rows(tmp_path)}
    assert calls[found[8e-3, 0.0]["key"]] == 2
    assert found[8e-3, 0.0]["reason"] == ""
    assert calls[found[16e-3, 0.0]["key"]] == 2
    assert found[16e-3, 0.0]["reason"].startswith("ended with code -9")
    assert calls[found[1e-3, 0.0]["key"]] == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_request_to_stop_is_no_failure(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = Trainer()

    def stopped(config_file: Path, log_file: Path) -> int:
        if len(inner.trained) < 2:
            return inner(config_file, log_file)
        # The signal of a scheduler reaches the runs, too: this one had hardly begun, and ends by it.
        os.kill(os.getpid(), signal.SIGTERM)
        handled = signal.getsignal(signal.SIGTERM).__self__  # a method of the StopRequest
        while not handled.signal:
            time.sleep(0.01)
        return -signal.SIGTERM

    file = write_sweep(tmp_path, corpus)
    assert sweep(file, jobs=1, train=stopped) == 75
    assert "stopped (asked to stop): 2 trials done" in capsys.readouterr().out
    assert [row["reason"] for row in rows(tmp_path)] == ["", ""]
    assert sweep(file, jobs=1, train=inner) == 0
    assert len(inner.trained) == len({*inner.trained}) == len(rows(tmp_path))


@pytest.mark.usefixtures("no_pictures")
def test_optimizers_share_what_is_the_same_run(tmp_path: Path, corpus: Path) -> None:
    trainer = Trainer()
    assert sweep(write_sweep(tmp_path, corpus, optimizer={"a": ADAMW, "b": ADAMW}), jobs=4, train=trainer) == 0
    assert len({*trainer.trained}) == len(trainer.trained) == len(rows(tmp_path))
    found = results(tmp_path)["optimizers"]
    assert found["a"] == found["b"]


def test_snap() -> None:
    assert phases.snap(2.7e-3, RATES) == 2e-3  # 2.83e-3 lies in the middle by ratio, 3e-3 by difference
    assert phases.snap(2.9e-3, RATES) == 4e-3
    assert phases.snap(-1.0, RATES) == 1e-3
    assert phases.snap(0.04, [0, 0.1]) == 0
