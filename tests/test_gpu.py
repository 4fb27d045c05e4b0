"""The same run on a GPU and on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from tests.conftest import EVERY, SEEN
from tests.helpers.runs import make_corpus, rows, tiny_config

WORKER = "from tests import conftest; print(conftest.with_gpus().get('CUDA_VISIBLE_DEVICES', conftest.EVERY))"
CONTROLLER = f"""
import subprocess, sys
from tests import conftest
subprocess.run([sys.executable, "-c", {WORKER!r}], check=True)
"""


@pytest.mark.parametrize("visible", ["3,1", EVERY])
def test_workers_find_the_gpus_that_their_parent_hid(visible: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (SEEN, "CUDA_VISIBLE_DEVICES")}
    if visible != EVERY:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command, folder = [sys.executable, "-c", CONTROLLER], Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.stdout.strip() == visible, done.stderr


def _train(config: Config, file: Path, environment: dict[str, str]) -> list[float]:
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "pretrain", "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [row["loss"] for row in rows(config.run.directory, "train")]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "kind", "tolerance"),
    [
        # Sums in another order, amplified over the steps by AdamW's division and Muon's orthogonalisation.
        ("fp32", "adamw", 1e-3),
        ("fp32", "muon", 1e-3),
        # Rounding of every product to 8 bits, and tokens near a border that change experts by it.
        ("bf16", "adamw", 3e-2),
        ("bf16", "muon", 3e-2),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(
    tmp_path: Path, gpu_environment: dict[str, str], precision: str, kind: str, tolerance: float
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    losses = {}
    for name, environment in (("gpu", gpu_environment), ("cpu", dict(os.environ))):
        run = {"directory": str(tmp_path / name), "precision": precision}
        config = tiny_config(corpus, tmp_path / name, run=run, optim={"kind": kind, "lr": 3e-3})
        losses[name] = _train(config, tmp_path / f"{name}.toml", environment)
    assert losses["gpu"] == pytest.approx(losses["cpu"], abs=tolerance)
    assert losses["gpu"] != losses["cpu"], "the GPU was not used: no two devices round alike"
