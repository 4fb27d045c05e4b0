"""A sweep with real runs, on a model of two layers and a few steps: what its ledger says is what the runs say."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.tuning.sweep import sweep
from tests.helpers.commands import command_process
from tests.helpers.runs import rows
from tests.tuning.sweeps import LR, write_sweep

GRID = [1e-3, 1e-2, 1e30]
"""Too low for a few steps, right, and beyond all numbers after one of them."""


def test_real_runs(tmp_path: Path, corpus: Path) -> None:
    optimizer = {
        "set": {"optim.kind": "adamw", "optim.max_skipped_steps": 2},
        "start": {LR: GRID[0]},
        "grid": {LR: GRID},
    }
    file = write_sweep(tmp_path, corpus, optimizer={"adamw": optimizer})
    with command_process() as run:

        def train(config_file: Path, log_file: Path) -> int:
            done = run("train", config_file)
            log_file.write_text(done.out + done.err)
            return done.code

        assert sweep(file, jobs=2, train=train) == 0
    ledger = [json.loads(line) for line in (tmp_path / "sweep" / "ledger.jsonl").read_text().splitlines()]
    found = {row["settings"][LR]: row for row in ledger}
    assert len(ledger) == len(found) == len(GRID)
    for rate in GRID[:2]:
        directory = tmp_path / "sweep" / "runs" / found[rate]["key"]
        last = rows(directory, "valid")[-1]
        assert (last["step"], found[rate]["tokens"]) == (10, last["tokens"])
        assert (found[rate]["loss"], found[rate]["reason"]) == (last["valid_loss"], "")
        assert found[rate]["seconds"] > 0
        assert not (directory / "checkpoints").exists()
    assert found[1e-2]["loss"] < found[1e-3]["loss"]
    assert found[1e30]["loss"] is None
    assert found[1e30]["reason"] in ("diverged", "loss is not finite")
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert results["optimizers"]["adamw"]["best"]["one"]["settings"] == {LR: 1e-2}
