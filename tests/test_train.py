"""Whole runs: restarts, stops, layouts, and steps that are skipped."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.errors import UserError
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import events, make_corpus, rows, tiny_config

# Losses of two layouts after a few steps: fp32 sums in another order, amplified by AdamW's division by sqrt(v).
LAYOUT_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def _train_all(configs: list[Config]) -> list[int]:
    """Train one after another in the same processes."""
    from pretrain.train import train

    return [train(config) for config in configs]


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def _same_tensors(a: Path, b: Path) -> bool:
    first, second = _tensors(a), _tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _forget_after(directory: Path, copy: Path, step: int) -> None:
    """Copy a run as it was when it had saved `step`, with the rows a crash soon after would leave."""
    shutil.copytree(directory, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"expert": 2}, {"tensor": 2}, {"pipeline": 2}],
    4: [{"expert": 2, "tensor": 2}],
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr"), [("adamw", 3e-3), ("muon", 1e-2)])
def test_resume_is_as_if_never_stopped(corpus: Path, tmp_path: Path, kind: str, lr: float) -> None:
    optim = {"kind": kind, "lr": lr}
    whole = tiny_config(corpus, tmp_path / "whole", optim=optim, parallel={"expert": 2})
    assert run_ranks(_train_all, 2, [whole]) == [[0], [0]]
    final = whole.run.directory / "checkpoints" / "step_00000006"
    reference = [row["loss"] for row in rows(whole.run.directory, "train")]
    assert reference[-1] < reference[0] - 0.5, "the run does not learn"

    for ranks, layouts in LAYOUTS.items():
        resumed = []
        for number, layout in enumerate(layouts):
            directory = tmp_path / f"resumed_{ranks}_{number}"
            _forget_after(whole.run.directory, directory, 3)
            resumed.append(tiny_config(corpus, directory, optim=optim, parallel=layout))
        run_ranks(_train_all, ranks, resumed)
        for config, layout in zip(resumed, layouts, strict=True):
            losses = [row["loss"] for row in rows(config.run.directory, "train")]
            assert [row["step"] for row in rows(config.run.directory, "train")] == [1, 2, 3, 4, 5, 6]
            assert losses == pytest.approx(reference, abs=LAYOUT_TOLERANCE), layout
            (restart,) = events(config.run.directory, "restart")
            assert restart["step"] == 3
            if layout == {"expert": 2}:
                assert losses == reference
                assert _same_tensors(config.run.directory / "checkpoints" / "step_00000006", final)

    # Negative control: the comparison tells steps apart.
    assert not _same_tensors(whole.run.directory / "checkpoints" / "step_00000003", final)


def _command(config: Config, tmp_path: Path) -> list[str]:
    file = tmp_path / f"{config.run.directory.name}.toml"
    file.write_text(dump_config(config))
    return [sys.executable, "-m", "pretrain", "train", str(file)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_asks_to_be_started_again(corpus: Path, tmp_path: Path, name: str) -> None:
    long = {"budget": {"steps": 400}, "eval": {"every_steps": 0}, "checkpoint": {"every_steps": 0}}
    config = tiny_config(corpus, tmp_path / "run", **long)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(_command(config, tmp_path), env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    metrics = config.run.directory / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, "ended before it was asked to"
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == 75
    (stopped,) = events(config.run.directory, "stopped")
    assert stopped["signal"] == name
    (saved,) = events(config.run.directory, "save")
    assert saved["step"] == stopped["step"] < 400

    short = tiny_config(corpus, config.run.directory, **{**long, "budget": {"steps": stopped["step"] + 2}})
    done = subprocess.run(_command(short, tmp_path), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (restart,) = events(config.run.directory, "restart")
    assert restart["step"] == stopped["step"]
    assert restart["changed"] == [f"budget.steps: 400 -> {stopped['step'] + 2}"]


def _train_with_poison(config: Config, poisoned: list[int]) -> str:
    """Train with a gradient of rank 1 made NaN at some steps; returns the user error that ended it, if any."""
    from pretrain import train as module
    from pretrain.parallel.engine import Engine

    original = Engine.forward_backward
    calls = [0]

    def poisoning(self: Engine, batch: Any) -> torch.Tensor:
        loss = original(self, batch)
        calls[0] += 1
        if calls[0] in poisoned and dist.get_rank() == 1:
            self.shards[-1].tensor.main_grad.view(-1)[0] = float("nan")
        return loss

    Engine.forward_backward = poisoning  # type: ignore[method-assign]
    try:
        module.train(config)
    except UserError as error:
        return str(error)
    finally:
        Engine.forward_backward = original  # type: ignore[method-assign]
    return ""


def _poison_both(configs: list[Config]) -> list[str]:
    return [_train_with_poison(configs[0], [2, 4]), _train_with_poison(configs[1], [2, 3, 4, 5, 6])]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(corpus: Path, tmp_path: Path) -> None:
    # The last shard of rank 1 is of a tensor that rank 1 owns or not; the decision must be common all the same.
    configs = [
        tiny_config(corpus, tmp_path / name, parallel={"expert": 2}, optim={"lr": 3e-3, "max_skipped_steps": 3})
        for name in ("some", "many")
    ]
    (some, many), other_rank = run_ranks(_poison_both, 2, configs)
    assert other_rank == [some, many]
    assert some == ""
    skipped = [row["step"] for row in rows(configs[0].run.directory, "train") if row["skipped"]]
    assert skipped == [row["step"] for row in events(configs[0].run.directory, "skip")] == [2, 4]
    losses = [row["loss"] for row in rows(configs[0].run.directory, "train")]
    assert all(map(math.isfinite, losses))
    # A skipped step changes nothing, selection biases included; the others move them by the update rate.
    spreads = [row["moe"]["bias_spread"] for row in rows(configs[0].run.directory, "train")]
    assert spreads[1] == spreads[0]
    assert spreads[2] != spreads[1]
    assert spreads[3] == spreads[2]
    assert "optim.max_skipped_steps = 3" in many
    assert "step 5 is the 4th in a row" in many


@pytest.mark.slow
def test_bf16_async_muon_run_learns(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(
        corpus,
        tmp_path / "run",
        run={"directory": str(tmp_path / "run"), "precision": "bf16"},
        optim={"kind": "muon", "lr": 5e-3},
        budget={"steps": 12},
        checkpoint={"every_steps": 4, "asynchronous": True, "keep": 2},
        parallel={"expert": 2, "recompute": "selective"},
    )
    run_ranks(_train_all, 2, [config])
    losses = [row["loss"] for row in rows(config.run.directory, "train")]
    assert losses[-1] < losses[0] - 1.0
    assert sorted(path.name for path in (config.run.directory / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000012",
    ]
    assert [row["checkpoint"] for row in events(config.run.directory, "save")] == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    names = set(_tensors(config.run.directory / "checkpoints" / "step_00000012"))
    assert any("optimizer.master." in name for name in names)
    assert any("optimizer.momentum." in name for name in names)
