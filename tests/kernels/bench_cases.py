"""The benchmark of the kernels with the Triton ones, in Triton's interpreter: `test_bench` runs this file."""

from __future__ import annotations

import time

import pytest
import torch

from pretrain_kernels.bench import measure, peers, report
from pretrain_kernels.bench.measure import COMBINE, COPY, DOWN, DX, OURS, Results, Setup
from pretrain_kernels.bench.shapes import Problem, Shape, make_problem

CPU = torch.device("cpu")
# Small tiles, which the interpreter is faster with.
CAPABILITY = (8, 0)
TOY = Shape("toy", D=32, F=16, E=4, K=2, tokens=24)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CAPABILITY)


def clock(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def product(rows: torch.Tensor, weights: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Each expert's rows times its matrix, in fp32."""
    parts = rows.float().split(problem.counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights.detach().float(), strict=True)])


def test_products_are_those_of_the_layer() -> None:
    problem = make_problem(TOY, "zipf", device=CPU, dtype=torch.float16)
    launches = measure._triton_launches(problem)
    for operation, weights in ((DOWN, problem.fc2.mT), (DX, problem.fc1)):
        launch = launches[operation]
        rows = launch.arguments["left"].base
        assert (rows != 0).float().mean() > 0.99
        launch.run()
        out = launch.arguments["out"].float()
        torch.testing.assert_close(out, product(rows, weights, problem), rtol=2e-3, atol=2e-3)
    (step, moved), (_, copied) = (measure.combine_steps(problem)[name] for name in (OURS, COPY))
    step()
    assert moved == 2 * 32 * (48 + 24) + 4 * 48
    assert copied == 2 * 2 * 32 * 48


def test_measures_all_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "AGREEMENT", 5e-2)  # the interpreter cuts bf16 off where others round
    layers = {peers.UNFUSED: peers.unfused, OURS: peers.ours("triton")}
    results = Results()
    list(measure.measure_shape(TOY, Setup(CPU, clock, rounds=1, layers=layers), results))
    operations = {found.operation for found in results.measurements if found.variant == OURS}
    assert operations == {DOWN, DX, measure.FORWARD, measure.STEP, COMBINE, measure.ROUTER, measure.NEWTON_SCHULZ}
    assert 1 <= results.saved["toy"] < 1.1  # tables of offsets and tiles weigh more than at full size
    targets = {verdict.target for verdict in report.verdicts(results, {"toy": TOY})}
    assert f"{DOWN}: ours / {measure.BMM}" in targets
    assert f"{COMBINE}: bandwidth / copy" in targets
