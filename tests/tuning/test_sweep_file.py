"""Files of sweeps: what they may look like, what follows from them, and all that is wrong with one at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError
from pretrain.tuning.descent import settings_of
from pretrain.tuning.sweep_file import load_sweep
from tests.tuning.sweeps import ADAMW, DECAY, LR, RATES, cell, write_sweep

WARMUP = "schedule.warmup_steps"


def problems(folder: Path, corpus: Path, **keys: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write_sweep(folder, corpus, **keys))
    return caught.value.problems


def with_grid(**grid: list[Any]) -> dict[str, Any]:
    """AdamW with more keys in its grid, starting from their first values."""
    dotted = {key.replace("__", "."): values for key, values in grid.items()}
    start = {key: values[0] for key, values in dotted.items()}
    return {"adamw": ADAMW | {"start": ADAMW["start"] | start, "grid": ADAMW["grid"] | dotted}}


def test_cells_and_configurations(tmp_path: Path, corpus: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, corpus, cell=[cell("a", 1), cell("b", 1, "deep", steps=40)]))
    # L (3 d ffn + 4 d^2), and tokens over 20 of them.
    sizes = [layers * (3 * 16 * 32 + 4 * 16 * 16) for layers in (2, 8)]
    assert [(one.model_size, one.tokens) for one in sweep.cells] == [(sizes[0], 5120), (sizes[1], 20480)]
    assert [one.ratio for one in sweep.cells] == [5120 / (20 * sizes[0]), 20480 / (20 * sizes[1])]
    assert [one.name for one in sweep.cells_of(1)] == ["a", "b"]
    assert sweep.cells_of(2, 3) == []
    config = sweep.run_config("adamw", "b", settings_of({LR: 4e-3, DECAY: 0.2}), seed=5)
    assert (config.optim.lr, config.optim.weight_decay, config.run.seed) == (4e-3, 0.2, 5)
    assert (config.model.num_layers, config.total_steps, config.optim.kind) == (8, 40, "adamw")
    assert (sweep.written.threshold, sweep.written.margin) == (3e-3, 6.4e-3)  # as published


def test_keys_may_be_dotted_quoted_or_nested(tmp_path: Path, corpus: Path) -> None:
    file = write_sweep(tmp_path, corpus)
    head = file.read_text().partition("cell =")[0]
    forms = [
        """
        start = { "optim.lr" = 1e-3, "optim.weight_decay" = 0 }
        grid = { "optim.lr" = [1e-3], "optim.weight_decay" = [0] }
        """,
        """
        start = { optim.lr = 1e-3, optim.weight_decay = 0 }
        grid = { optim = { lr = [1e-3], weight_decay = [0] } }
        """,
        """
        start.optim.lr = 1e-3
        start.optim.weight_decay = 0
        [optimizer.a.grid.optim]
        lr = [1e-3]
        weight_decay = [0]
        """,
    ]
    found = []
    for form in forms:
        file.write_text(f'{head}[[cell]]\nname = "one"\nphase = 1\n[optimizer.a]\n{form}\n')
        found.append(load_sweep(file).written)
    assert found[0] == found[1] == found[2]
    assert found[0].optimizer["a"].grid == {LR: [1e-3], DECAY: [0]}


def test_a_key_that_is_a_table_stays_one(tmp_path: Path, corpus: Path) -> None:
    file = write_sweep(tmp_path, corpus)
    head = file.read_text().partition("cell =")[0]
    keys = """
        start.optim.lr = 1e-3
        grid.optim.lr = [1e-3]
        set.optim = { kind = "muon", routes = { "*.router.weight" = "muon" } }
    """
    file.write_text(f'{head}[[cell]]\nname = "one"\nphase = 1\n[optimizer.a]\n{keys}\n')
    sweep = load_sweep(file)
    config = sweep.run_config("a", "one", settings_of({LR: 1e-3}))
    assert config.optim.routes == {"*.router.weight": "muon"}


def test_a_warmup_longer_than_the_run_is_left_out_and_no_problem(tmp_path: Path, corpus: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, corpus, optimizer=with_grid(schedule__warmup_steps=[0, 5, 10, 400])))
    values = ADAMW["start"]
    allowed = [sweep.allows("adamw", "one", settings_of(values | {WARMUP: steps})) for steps in (0, 5, 10, 400)]
    assert allowed == [True, True, False, False]
    # Negative control: at the start it is one.
    found = problems(tmp_path, corpus, optimizer=with_grid(schedule__warmup_steps=[400, 0]))
    assert found == (
        "optimizer.adamw in cell one: schedule.warmup_steps = 400: must be less than the 10 steps of [budget]; shorten "
        "the warm-up or lengthen the budget",
    )


def test_problems_of_the_file_come_all_at_once(tmp_path: Path, corpus: Path) -> None:
    found = problems(
        tmp_path,
        corpus,
        thresold=1.0,
        margin=-1.0,
        seeds=[],
        cell=[{"name": "a/b", "phase": 4}],
        optimizer={"adamw": {"start": {LR: [1]}, "grid": {LR: 1e-3, DECAY: []}}},
    )
    assert [line.partition(":")[0] for line in found] == [
        "seeds",
        "margin = -1.0",
        "cell[0].name",
        "cell[0].phase = 4",
        "optimizer.adamw.start.optim.lr = [1]",
        "optimizer.adamw.grid.optim.lr = 0.001",
        "optimizer.adamw.grid.optim.weight_decay",
        "thresold",
    ]
    assert all("; " in line for line in found)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sweep(tmp_path / "none.toml")


def test_problems_of_keys_and_cells_come_all_at_once(tmp_path: Path, corpus: Path) -> None:
    optimizer = {
        "set": {"run.seed": 3, LR: 1e-3, "model.num_layers": 4},
        "start": {LR: 5e-3, "optim.beta1": 0.9},
        "grid": {LR: [*RATES, 1e-3], DECAY: [0]},
        "lr": "optim.muon.lr",
    }
    found = problems(
        tmp_path,
        corpus,
        seeds=[1, 1],
        cell=[cell("one", 1), cell("one", 3) | {"set": {"run.directory": "x", "model.num_layers": 4}}],
        optimizer={"adamw": optimizer},
    )
    expected = [
        "cell one: run.directory: set by the sweep itself",
        "optimizer.adamw: run.seed: set by the sweep itself",
        "optimizer.adamw.start: optim.weight_decay is missing",
        "optimizer.adamw.start: optim.beta1 has no grid",
        "optimizer.adamw.start: optim.lr = 0.005: not among its grid",
        "optimizer.adamw.grid: optim.lr = [0.001, 0.002, 0.004, 0.008, 0.016, 0.001]: a value is given twice",
        "optimizer.adamw: optim.lr is in `set` and in `grid`",
        "optimizer.adamw: model.num_layers is set by cell one, too",
        "optimizer.adamw.lr = optim.muon.lr: must be in the grid",
        "cell: one is given twice",
        "seeds = [1, 1]: one is given twice",
        "cell: 1 of phase 1; phases 2 and 3 need at least two of them",
    ]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_problems_of_runs_are_told_once(tmp_path: Path, corpus: Path) -> None:
    base = {"budget": {"steps": 10}, "eval": {"every_steps": 0}, "parallel": {"tensor": 2}}
    cells = [{"name": name, "phase": 1} for name in ("a", "b")]
    found = problems(tmp_path, corpus, base=base, cell=cells)
    assert len(found) == 1
    assert found[0].startswith("optimizer.adamw in cell a and 1 more: ")  # two ranks; a sweep's runs have one
    base.pop("parallel")
    grid = with_grid(optim__betta1=[0.9, 0.95], batch__global_batch_size=[16, 32])
    found = problems(tmp_path, corpus, base=base, cell=cells, optimizer=grid)
    assert [line.partition(": ")[2].partition(":")[0] for line in found] == ["optim.betta1 = 0.9"]
    assert "did you mean optim.beta1?" in found[0]
    found = problems(tmp_path, corpus, base=base, cell=cells, optimizer=with_grid(batch__global_batch_size=[16, 33]))
    assert [line.partition(": ")[2].partition(":")[0] for line in found] == [
        "eval.every_steps = 0, data.valid with 1 datasets",
        "budget.steps = 10",
        "batch.global_batch_size = 33",
    ]
    # Another value of the grid than the start's.
    found = problems(tmp_path, corpus, optimizer=with_grid(optim__beta2=[0.95, 1.5]))
    assert found == ("optimizer.adamw in cell one: optim.beta2 = 1.5: must be less than 1; lower it",)
