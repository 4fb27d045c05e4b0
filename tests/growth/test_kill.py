"""A growth is done once or not at all, wherever it is killed, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.metrics.events import events_in_force
from pretrain.metrics.jsonl import read_jsonl
from tests.helpers.distributed import run_ranks
from tests.helpers.growing_runs import checkpoint, growing_config, tensor_bytes
from tests.helpers.killing_growth import AT, BROKEN, GROWN, GROWTH, LAST, POINTS, RUN, die_at_call
from tests.helpers.runs import events, make_corpus, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def swept(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every case, in a process of its own: the test process must not fork with threads running."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.killing_growth"]
    command += [str(corpus), str(tmp_path_factory.mktemp("runs"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {outcome["case"]: outcome for outcome in found}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere(swept: dict[str, dict[str, Any]], point: str) -> None:
    outcome, (goes_on_from, _) = swept[point], POINTS[point]
    assert outcome["restart"] == goes_on_from
    assert outcome["same"] == {"grown": True, "final": True}
    # One growth in force, whichever process did it; it began anew only where no checkpoint of it was there.
    assert outcome["growths"] == [GROWN]
    not_begun = point in ("in the save before", "before the plan")
    assert outcome["began"] == (1 if not_begun or goes_on_from == GROWN else 2)
    assert outcome["steps"] == [*range(1, LAST + 1)]
    # Nothing half done stays.
    assert outcome["names"] == [f"step_{step:08d}" for step in (2, 3)] + [GROWN, "step_00000004", "step_00000005"]


@pytest.mark.slow
def test_what_goes_wrong_is_seen(swept: dict[str, dict[str, Any]]) -> None:
    """Negative controls."""
    assert swept.keys() == POINTS.keys() | BROKEN.keys()
    assert swept["no second look"]["growths"] == []
    assert swept["no second look"]["same"] == {"grown": True, "final": True}
    assert swept["other numbers"]["same"] == {"grown": False, "final": False}
    assert swept["other numbers"]["restart"] == AT


def _train(config: Config) -> int:
    from pretrain.train import train

    return train(config)


def _train_both(configs: list[Config]) -> list[int]:
    return [_train(config) for config in configs]


def _train_and_die(config: Config) -> int:
    """Rank 1 dies with what it sends in the buffer."""
    from pretrain.growth import pull

    if dist.get_rank() == 1:
        die_at_call(pull, "_visit", 2)
    return _train(config)


@pytest.mark.slow
def test_a_rank_killed_in_mid_transfer(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 dies while a model changes from expert to tensor parallelism; then both are started again."""
    moving = [{**GROWTH, "parallel": {"expert": 1, "tensor": 2}}]
    whole, killed = (
        growing_config(corpus, tmp_path / name, moving, **RUN, parallel={"expert": 2}) for name in ("whole", "killed")
    )
    with pytest.raises(AssertionError, match="error_0 of 2:"):
        run_ranks(_train_and_die, 2, killed)
    run = killed.run.directory
    assert len(events(run, "growing")) == 1
    assert events(run, "growth") == []
    assert run_ranks(_train_both, 2, [killed, whole]) == [[0, 0], [0, 0]]

    assert [event["checkpoint"] for event in events(run, "restart")] == [AT]
    (growth,) = events_in_force(read_jsonl(run / "events.jsonl"), "growth")
    assert growth["checkpoint"] == GROWN
    assert growth["moved_bytes"] > 0
    assert len(events(run, "growing")) == 2
    final = tensor_bytes(checkpoint(killed, str(LAST)))
    assert final == tensor_bytes(checkpoint(whole, str(LAST)))
    assert final != tensor_bytes(checkpoint(killed, "4"))
    assert tensor_bytes(checkpoint(killed, "3_grown")) == tensor_bytes(checkpoint(whole, "3_grown"))
    losses = [[row["loss"] for row in rows(config.run.directory, "train")] for config in (whole, killed)]
    assert losses[0] == losses[1]
