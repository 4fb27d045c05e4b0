"""What the benchmark says of growth: it runs on tiny models, and its bytes, floors and ratios are what they are meant
to be."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.bench import growth_report, rates
from pretrain.bench.growth import Cost, GrowthResult, Moved, growth_kinds, moved_bytes
from pretrain.bench.rates import Rates
from pretrain.bench.workloads import SMALL
from pretrain.cli import main
from pretrain.config.growth import GrowthConfig
from pretrain.config.optim import OptimConfig
from pretrain.config.stages import grown_model
from pretrain.errors import UserError
from pretrain.growth.maps import GrowthPoint
from pretrain.model.counts import count_parameters
from pretrain.model.logical import logical_tensors
from pretrain.optim.states import state_key
from tests.bench.test_bench import tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import single_process

FP32 = 4
COST = Cost(live=1.0, round_trip=4.0, transplant=0.6, floor=0.3, both_bytes=900.0, peak_bytes=1000.0)
RESULT = GrowthResult("depth x2", planned_bytes=1000, costs=[COST] * 3, steps=[0.5] * 3)


def run_bench(json_file: str, kinds: list[str]) -> str:
    """`pretrain bench growth --quick` on the tiny model and small buffers; what this rank printed."""
    from pretrain.bench import command, growth

    command.growth_workload = lambda quick: tiny()
    growth.growth_kinds = lambda processes: {kind: growth_kinds(processes)[kind] for kind in kinds}
    rates.BUFFER_BYTES = 1 << 20
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["bench", "growth", "--quick", "--rounds", "1", "--json", json_file]) == 0
    return out.getvalue()


def test_measures_growth(tmp_path: Path) -> None:
    file, kinds = tmp_path / "growth.json", ["experts x2, noise", "depth x2, new layout"]
    printed, other = run_ranks(run_bench, 2, str(file), kinds)
    assert other == ""
    found = json.loads(file.read_text())["growth"]
    assert [growth["kind"] for growth in found] == kinds
    for growth in found:
        (cost,) = growth["costs"]
        assert all(value > 0 for value in [*cost.values(), *growth["steps"]])
        assert cost["both_bytes"] <= cost["peak_bytes"]
        row = next(line for line in printed.splitlines() if line.startswith(f"| {growth['kind']} "))
        assert f" {cost['live'] / cost['round_trip']:.3f} " in row
        assert f"{growth['kind']}: {cost['transplant'] / cost['floor']:.2f} of the floor" in printed


def whole(tensors: list[tuple[str, tuple[int, ...]]]) -> list[ShardedTensor]:
    """Tensors of zeros that one rank holds whole."""
    return [
        ShardedTensor(key, torch.zeros(shape), torch.float32, shape, shape, (0,) * len(shape), None, (0, 0, 0))
        for key, shape in tensors
    ]


def moved(growth: GrowthConfig, *, held: float = 1.0) -> tuple[Moved, int, int]:
    """What one rank moves that holds this share of the old tensors; parameters of both models."""
    before = tiny().model
    after = grown_model(before, growth)
    old, new = (
        whole([(key, t.shape) for t in logical_tensors(m) for key in (t.key, state_key("exp_avg", t.key))])
        for m in (before, after)
    )
    some = old[: round(held * len(old))]
    found = moved_bytes(GrowthPoint(1, growth, before, after), some, new, OptimConfig())
    return found, count_parameters(before).total, count_parameters(after).total


def test_bytes_that_have_to_move() -> None:
    growth = GrowthConfig(at_step=1, **growth_kinds(1)["hidden x2, expert ffn x2"])
    found, small, large = moved(growth)
    # All new weights, and of their one moment what the old model had.
    assert found == Moved(read=2 * small * FP32, written=(large + small) * FP32, received=0)
    copied, _, _ = moved(growth.model_copy(update={"optimizer_state": "copy"}))
    assert copied.written == 2 * large * FP32
    reset, _, _ = moved(growth.model_copy(update={"optimizer_state": "reset"}))
    assert reset.written == large * FP32


def test_what_others_hold_is_received_once() -> None:
    """Although a copied layer has two places for it."""
    found, small, _ = moved(GrowthConfig(at_step=1, **growth_kinds(1)["depth x2"]), held=0.5)
    assert found.read + found.received == 2 * small * FP32
    assert 0 < found.received < 2 * small * FP32


def test_floor() -> None:
    parts = Moved(read=100, written=300, received=50)
    assert parts.floor(Rates(copy=200.0, exchange=25.0)) == 4.0
    assert replace(parts, received=0).floor(Rates(copy=200.0, exchange=math.inf)) == 2.0


def test_one_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "BUFFER_BYTES", 1 << 20)
    with single_process():
        found = rates.measure_rates(torch.device("cpu"))
    assert 0 < found.copy < math.inf
    assert found.exchange == math.inf


def test_ratios() -> None:
    assert growth_report.of_floor(RESULT) == 2.0
    assert growth_report.of_round_trip(RESULT) == 0.25
    assert growth_report.in_steps(RESULT) == 2.0
    assert growth_report.of_plan(RESULT) == 0.9
    # One slow round moves none of them.
    slow = replace(COST, live=99.0, transplant=99.0, both_bytes=1e9)
    assert growth_report.table(SMALL, [replace(RESULT, costs=[COST, slow, COST])], processes=1) == growth_report.table(
        SMALL, [RESULT], processes=1
    )


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"floor": 0.19}, ["of the floor"]),
        ({"round_trip": 0.9}, ["of the round trip"]),
        ({"both_bytes": 1001.0}, ["of the planned memory"]),
        ({"floor": 0.1, "round_trip": 0.1}, ["of the floor", "of the round trip"]),
    ],
)
def test_verdict_says_what_is_missed(change: dict, missed: list[str]) -> None:
    judged = growth_report.verdict([replace(RESULT, costs=[replace(COST, **change)] * 3)])
    targets = judged.removeprefix("depth x2: ").split("; ")
    assert len(targets) == 3
    assert [target.split(", ")[0].split(" ", 1)[1] for target in targets if target.endswith("MISSED")] == missed


def test_verdict_does_not_judge_unknown_memory() -> None:
    judged = growth_report.verdict([replace(RESULT, costs=[replace(COST, both_bytes=math.nan)] * 3)])
    assert judged.endswith("share of the planned memory not known here")
    assert "MISSED" not in judged


def test_refuses_processes_that_do_not_divide_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.bench import growth

    monkeypatch.setattr(growth.dist, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match=r"3 processes.*use 1, 2, 4 or 8"):
        growth.measure_growth(tiny(), meshes=None, rounds=1)
