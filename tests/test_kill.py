"""Whatever dies, the run goes on from its last checkpoint and ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pretrain.checkpoint import list_checkpoints
from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from tests.helpers.commands import command_process, torchrun
from tests.helpers.runs import events, make_corpus, rows, tiny_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def written(config: Config, folder: Path) -> Path:
    file = folder / f"{config.run.directory.name}.toml"
    file.write_text(dump_config(config))
    return file


def tensor_bytes(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    files = [load_file(file) for file in checkpoint.glob("*.safetensors")]
    return {name: tensor.numpy().tobytes() for file in files for name, tensor in file.items()}


@pytest.mark.slow
def test_a_killed_rank_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in step 5, and then in the save of step 6; torchrun starts both again each time."""
    whole, killed = (tiny_config(corpus, tmp_path / name, parallel={"expert": 2}) for name in ("whole", "killed"))
    result = torchrun("-m", "pretrain", "train", written(whole, tmp_path), cwd=ROOT)
    assert result.code == 0, result.err
    marks = tmp_path / "marks"
    marks.mkdir()
    command = ("-m", "tests.helpers.killing_train", "train", written(killed, tmp_path))
    result = torchrun(*command, max_restarts=2, cwd=ROOT, KILL_MARKS=str(marks))
    assert result.code == 0, result.err
    assert {mark.name for mark in marks.iterdir()} == {"step", "save"}

    run = killed.run.directory
    assert [row.layout for row in list_checkpoints(run)] == ["2 ranks, expert 2"] * 2
    assert [event["step"] for event in events(run, "restart")] == [3, 3]
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses == [row["loss"] for row in rows(whole.run.directory, "train")]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    final = tensor_bytes(run / "checkpoints" / "step_00000006")
    assert final == tensor_bytes(whole.run.directory / "checkpoints" / "step_00000006")
    # Negative control: the comparison tells steps apart.
    assert final != tensor_bytes(run / "checkpoints" / "step_00000003")


@pytest.mark.slow
def test_a_run_holds_its_directory_until_it_is_killed(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = {"budget": {"steps": 4000}, "eval": {"every_steps": 0}, "checkpoint": {"every_steps": 5}}
    command = [sys.executable, "-m", "pretrain", "train", str(written(tiny_config(corpus, run, **steps), tmp_path))]
    with (
        command_process() as pretrain,
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while not list((run / "checkpoints").glob("step_*5")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            refused = pretrain("train", written(tiny_config(corpus, run, **steps), tmp_path))
            assert process.poll() is None, "the first run is not disturbed"
            assert refused.code == 2
            assert f"run.directory = {run}: in use by process {process.pid} on " in refused.err
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        last = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*[0-9]"))
        again = tiny_config(corpus, run, **(steps | {"budget": {"steps": last + 1}}))
        assert pretrain("train", written(again, tmp_path)).code == 0
    (restart,) = events(run, "restart")
    assert restart["step"] == last
