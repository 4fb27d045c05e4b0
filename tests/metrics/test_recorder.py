"""The files of a run over a restart, and what each row holds."""

import dataclasses
import re
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pretrain.metrics
from pretrain.config.schema import MetricsConfig
from pretrain.metrics import events
from pretrain.metrics.history import read_histories
from pretrain.metrics.jsonl import read_jsonl
from pretrain.metrics.moe import BalanceWindow
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.rows import TrainRow, ValidRow
from tests.metrics.synthetic import GROWTH, train_row, valid_row


def test_restart_replaces_rows_and_keeps_events(tmp_path):
    first = Recorder(tmp_path, metrics=MetricsConfig(), config={}, total_steps=20)
    assert first.last_step == 0
    assert first.last_alive is None
    for step in range(1, 9):
        first.train(train_row(step, loss=1.0))
    first.valid(valid_row(8, 2.0))
    first.event("skip", step=3)
    first.event("skip", step=7)
    first.event("growth", step=8)
    first.close()
    last_time = read_jsonl(tmp_path / "metrics.jsonl")[-1]["time"]

    second = Recorder(tmp_path, metrics=MetricsConfig(), config={}, total_steps=20, restored_step=5)
    assert second.last_step == 8
    assert second.last_alive == last_time
    second.event("restart", step=5, lost_steps=second.last_step - 5)
    for step in range(6, 11):
        second.train(train_row(step, loss=2.0))
    second.event("skip", step=9)
    second.close()

    (history,) = read_histories([tmp_path])
    assert [(row["step"], row["loss"]) for row in history.train] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 11)),
    ]
    assert history.valid == []
    assert [event["event"] for event in history.events] == ["skip", "skip", "growth", "restart", "skip"]
    assert [event["step"] for event in history.events_in_force("skip")] == [3, 9]
    assert history.events_in_force("growth") == []
    assert [event["lost_steps"] for event in history.restarts] == [3]


def test_empty_fields_are_left_out_and_null_ones_are_not(tmp_path):
    recorder = Recorder(tmp_path, metrics=MetricsConfig(), config={}, total_steps=20)
    recorder.train(train_row(1, grad_norm=float("inf"), skipped=True))
    recorder.train(train_row(2, mfu=0.4, aux_losses={"z": 0.1}, lr_new=[1e-3, 0.0]))
    recorder.close()
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert first["kind"] == "train"
    assert first["grad_norm"] is None
    assert first["skipped"] is True
    assert {"mfu", "moe", "aux_losses", "lr_new"}.isdisjoint(first)
    assert second["mfu"] == 0.4
    assert second["aux_losses"] == {"z": 0.1}
    assert second["lr_new"] == [1e-3, 0.0]


def growths_after_kill(directory: Path, *, written: bool, checkpoint: str) -> list[int]:
    """A run grows at step 8, is killed before or after the event is written, and goes on from `checkpoint`. When that
    is the grown one, it writes the event if none holds; else it grows again. Steps of the growths in force."""
    directory.mkdir()
    options = {"metrics": MetricsConfig(), "config": {}, "total_steps": 20}
    first = Recorder(directory, **options)
    first.event("growth", step=4, **GROWTH)
    if written:
        first.event("growth", step=8, **GROWTH)
    first.close()
    for _ in range(2):  # and a second time, killed at once
        again = Recorder(directory, **options, restored_step=8)
        again.event("restart", step=8, checkpoint=checkpoint)
        assert again.has_event("growth", step=4)
        assert not again.has_event("growth", step=5)
        if not checkpoint.endswith("_grown") or not again.has_event("growth", step=8):
            again.event("growth", step=8, **GROWTH)
        assert again.has_event("growth", step=8)
        again.close()
    (directory / "metrics.jsonl").write_text('{"kind":"train","step":1}\n')
    return [event["step"] for event in read_histories([directory])[0].events_in_force("growth")]


def test_a_growth_is_written_once_however_it_was_killed(tmp_path, monkeypatch):
    cases = list(product((True, False), ("step_00000008_grown", "step_00000008")))
    for index, (written, checkpoint) in enumerate(cases):
        assert growths_after_kill(tmp_path / str(index), written=written, checkpoint=checkpoint) == [4, 8]
    # Negative control: by the step alone, the growth that comes again after the checkpoint before it counts twice.
    monkeypatch.setattr(events, "_survives", lambda event, restart: event["step"] <= restart["step"])
    assert growths_after_kill(tmp_path / "control", written=True, checkpoint="step_00000008") == [4, 8, 8, 8]


def test_tracker_gets_the_same_rows_and_its_run_goes_on(tmp_path, monkeypatch):
    runs = []

    class Run(SimpleNamespace):
        def log(self, numbers, step):
            self.rows.append((step, numbers))

        def finish(self, exit_code):
            self.exit_code = exit_code

    def init(**arguments):
        runs.append(Run(rows=[], arguments=arguments))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=SimpleNamespace, Error=OSError))
    metrics = MetricsConfig(wandb=True, wandb_project="test")
    first = Recorder(tmp_path, metrics=metrics, config={"hf_token": "hidden"}, total_steps=20)
    for step in (1, 2, 3):
        first.train(train_row(step))
    state = first.state_dict()
    first.close(exit_code=75)

    second = Recorder(tmp_path, metrics=metrics, config={}, total_steps=20, restored_step=1, **state)
    for step in (2, 3, 4):
        second.train(train_row(step, moe=BalanceWindow().add([[1, 2], [3, 4]])))
    second.valid(valid_row(4, 2.0))
    second.close()

    assert [step for step, _ in runs[0].rows] == [1, 2, 3]
    assert [step for step, _ in runs[1].rows] == [4, 4]  # 2 and 3 are there already: steps only increase
    assert runs[0].arguments["id"] == runs[1].arguments["id"] == state["tracker_id"]
    assert runs[0].arguments["config"] == {"hf_token": "<redacted>"}
    assert (runs[0].exit_code, runs[1].exit_code) == (75, 0)
    train, valid = (numbers for _, numbers in runs[1].rows)
    assert train["moe/entropy_mean"] > 0.9
    assert not [key for key, value in train.items() if isinstance(value, list)]  # no key per layer or expert
    assert valid["valid_loss"] == 2.0


def test_every_field_is_in_the_readme():
    readme = (Path(pretrain.metrics.__file__).parent / "README.md").read_text()
    names = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", readme, flags=re.MULTILINE)
    documented = {name.strip("`") for cell in names for name in cell.split(", ")}
    counts = [[1, 2], [3, 4]]
    moe = BalanceWindow().add(counts, bias=counts)
    fields = {field.name for row in (TrainRow, ValidRow) for field in dataclasses.fields(row)}
    written = fields | moe.keys() | {"kind", "time"} | GROWTH.keys()
    assert written - documented == set()
    of_rounds = {"round", "members", "absent", "stale", "moved", "behind", "losses", "similarity", "merged"}
    of_events = of_rounds | {"sent_bytes", "unchecked", "wait_seconds", "goodput", "wall_seconds", "seconds"}
    assert documented - written <= of_events
