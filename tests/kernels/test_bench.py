"""The benchmark of the kernels, without a GPU: what it runs on, its checks, its clockwork, ratios and verdicts."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from pretrain_kernels.bench import check, measure, peers, report
from pretrain_kernels.bench.check import CheckError
from pretrain_kernels.bench.measure import DOWN, OURS, STEP, Measurement, Results, Setup
from pretrain_kernels.bench.report import Verdict
from pretrain_kernels.bench.shapes import QUICK, ROUTINGS, SHAPES, Shape, make_problem
from tests.kernels.triton_process import run_cases

command = importlib.import_module("pretrain_kernels.bench.__main__")
CPU = torch.device("cpu")
TOY = Shape("toy", D=32, F=16, E=4, K=2, tokens=24)


def counting_clock():
    """A clock that runs the step, and on which every step takes longer than the one before."""
    seconds = itertools.count(1)

    def clock(step) -> float:
        step()
        return float(next(seconds))

    return clock


def toy_setup(**layers) -> Setup:
    named = {
        peers.UNFUSED: peers.unfused,
        "ours (loop)": peers.ours("loop"),
        "ours (grouped_mm)": peers.ours("grouped_mm"),
    }
    return Setup(CPU, counting_clock(), rounds=3, layers=named | layers, triton=False)


def toy_problem(routing: str = "zipf"):
    return make_problem(TOY, routing, device=CPU)


# Shapes and routing


def test_operations_and_bytes_are_those_of_the_formulas() -> None:
    shape = Shape("", D=10, F=20, E=4, K=3, tokens=5)
    assert shape.rows == 15
    assert shape.forward_flops == 6 * 15 * 10 * 20
    assert shape.step_flops == 18 * 15 * 10 * 20
    assert shape.saved_bytes == 2 * 5 * 10 + 4 * 15 * 20 + 12 * 15


def test_published_forward_operations() -> None:
    """TFLOP of a forward pass at 16384 tokens, worked out by hand from the published widths."""
    tflop = {name: shape.forward_flops / 1e12 for name, shape in SHAPES.items()}
    assert tflop == pytest.approx(
        {
            "Qwen3-30B-A3B": 1.24,
            "OLMoE-1B-7B": 1.65,
            "Mixtral-8x7B": 2 * 5.77,
            "SPES-7B": 1.65,
            "DeepSeek-V2-Lite": 1.70,
            "SPARKLING": 0.41,
        },
        rel=0.01,
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [SHAPES["OLMoE-1B-7B"], Shape("odd", D=8, F=8, E=7, K=3, tokens=50)], ids=str)
def test_tokens_choose_different_experts(routing: str, shape: Shape) -> None:
    experts = ROUTINGS[routing](shape, torch.Generator().manual_seed(0))
    assert experts.shape == (shape.tokens, shape.K)
    assert experts.dtype == torch.int64
    assert 0 <= int(experts.min()) <= int(experts.max()) < shape.E
    assert all(len(set(row)) == shape.K for row in experts.tolist())


def test_uniform_is_even_and_zipf_is_skewed() -> None:
    shape = Shape("", D=8, F=8, E=64, K=1, tokens=1 << 16)
    counts = {
        name: routing(shape, torch.Generator().manual_seed(0)).flatten().bincount(minlength=64).sort().values
        for name, routing in ROUTINGS.items()
    }
    assert counts["uniform"].unique().tolist() == [shape.rows // 64]
    # One choice a token: the most popular expert has 1 / (1 + 1/2 + ... + 1/64) of the rows, the second half of that.
    harmonic = sum(1 / rank for rank in range(1, 65))
    popular = counts["zipf"].flip(0)[:2] / shape.rows * harmonic
    assert popular.tolist() == pytest.approx([1, 0.5], rel=0.03)


def test_inputs_are_random_everywhere_and_the_same_again() -> None:
    first, second = toy_problem(), toy_problem()
    for a, b in zip((*first.leaves, first.dy), (*second.leaves, second.dy), strict=True):
        assert torch.equal(a, b)
        assert (a != 0).float().mean() > 0.99
    assert first.counts.sum() == TOY.rows


# Peers


def test_a_peer_that_does_not_import_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel.ops.fused_moe", "scattermoe.parallel_experts", "sonicmoe.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    layers, missing = peers.available()
    assert not layers
    assert set(missing) == {peers.LIGER, peers.SCATTERMOE, peers.SONICMOE}
    assert all("Error: " in peer.reason for peer in missing.values())


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes) -> None:
    """Make the imports of `name` and of its parents find a module with these attributes."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_peer_of_another_release_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "liger_kernel.ops.fused_moe")
    assert peers.liger() == peers.Missing("liger_kernel.ops.fused_moe has no LigerFusedMoEFunction")


def test_liger_gets_what_its_function_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signature: tokens, [E, 2F, D], [E, D, F], int32 choices, weights."""
    taken = []
    function = types.SimpleNamespace(apply=lambda *arguments: taken.append(arguments) or arguments[0])
    install(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=function)
    problem = toy_problem()
    layer = peers.liger()
    assert not isinstance(layer, peers.Missing)
    layer(problem.x, problem.fc1, problem.fc2, problem.routing)
    ((x, fc1, fc2, experts, scores),) = taken
    assert x is problem.x
    assert (fc1.shape, fc2.shape) == ((4, 32, 32), (4, 32, 16))
    assert experts.dtype == torch.int32
    assert scores is problem.routing.scores


def sorted_choices(experts: torch.Tensor, num_experts: int):
    numbers, choice = experts.flatten().sort(stable=True)
    return numbers, choice, torch.bincount(numbers, minlength=num_experts).cumsum(0)


def rows_linear(x, weights, k, numbers, choice, ends, gates=None, grouped_in=False, grouped_out=False):
    """ScatterMoE's linear layer by its documented meaning, in plain torch."""
    rows = x if grouped_in else x[choice // k]
    rows = torch.stack([row @ weights[number] for row, number in zip(rows, numbers.tolist(), strict=True)])
    if grouped_out:
        return rows
    in_order = torch.zeros_like(rows).index_copy(0, choice, rows)
    return (gates.unsqueeze(1) @ in_order.view(*gates.shape, -1)).squeeze(1)


def test_scattermoe_adapter_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "scattermoe.parallel_experts", parallel_linear=rows_linear, flatten_sort_count=sorted_choices)
    results = Results()
    found = measure.agreeing_layers(toy_problem(), "zipf", toy_setup(scattermoe=peers.scattermoe()).layers, results)
    assert "scattermoe" in found, results.missing


def general_routing(x, scores, token, expert, w1, b1, w2, b2, E, stream, activation, concat_layout=False):
    """SonicMoE's call by its documented meaning: w1 [2F, D, E], w2 [D, F, E], one entry for each row, tokens sorted."""
    assert b1 is None
    assert b2 is None
    assert activation == "swiglu"
    assert concat_layout
    assert bool((token.diff() >= 0).all())
    y = torch.zeros_like(x)
    for row, number, score in zip(token.tolist(), expert.tolist(), scores, strict=True):
        gate, up = (w1[:, :, number] @ x[row]).chunk(2)
        out = w2[:, :, number] @ (torch.nn.functional.silu(gate) * up) * score
        y = y.index_add(0, torch.tensor([row]), out.to(x.dtype).unsqueeze(0))
    return y, None


def test_sonicmoe_adapter_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sonicmoe.enums", ActivationType=types.SimpleNamespace(SWIGLU="swiglu"))
    module = types.ModuleType("sonicmoe.functional")
    module.moe_general_routing_inputs = general_routing
    monkeypatch.setitem(sys.modules, "sonicmoe.functional", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    results = Results()
    found = measure.agreeing_layers(toy_problem(), "zipf", toy_setup(sonicmoe=peers.sonicmoe()).layers, results)
    assert "sonicmoe" in found, results.missing


# Checks


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_checks_hold(backend: str) -> None:
    check.check_reference(CPU, backend, torch.bfloat16)
    check.check_main_grad(CPU, backend)
    check.check_repeats(CPU, backend)
    check.check_router(CPU, "torch")
    check.check_newton_schulz(CPU, "torch")


def off(monkeypatch: pytest.MonkeyPatch, name: str, change) -> None:
    """Change what a function that the checks call returns."""
    right = getattr(check, name)
    monkeypatch.setattr(check, name, lambda *a, **named: change(right(*a, **named), named))


def test_a_wrong_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, "swiglu_experts", lambda y, _: y * 1.02)
    with pytest.raises(
        CheckError, match=r"^grouped, 1, 127, 128 and 129 rows, torch.bfloat16: output is 2\.\de-02 off"
    ):
        check.check_reference(CPU, "grouped_mm", torch.bfloat16)
    with pytest.raises(CheckError, match=r"^main_grad: output is"):
        check.check_main_grad(CPU, "grouped_mm")


def test_a_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, "swiglu_experts", lambda y, _: torch.where(torch.arange(len(y)).unsqueeze(1) == 3, torch.nan, y))
    with pytest.raises(CheckError, match="output is nan off"):
        check.check_reference(CPU, "grouped_mm", torch.bfloat16)


def test_gradients_of_frozen_experts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.swiglu_experts

    def trains_all(*inputs, trainable, backend):
        return right(*inputs, backend=backend)

    monkeypatch.setattr(check, "swiglu_experts", trains_all)
    with pytest.raises(CheckError, match="half of the experts frozen: fc1 is"):
        check.check_reference(CPU, "grouped_mm", torch.bfloat16)


def test_other_bits_the_second_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count()
    off(monkeypatch, "swiglu_experts", lambda y, _: y + next(times) * 2**-6)
    with pytest.raises(CheckError, match=r"^repeatability: output differs between two runs"):
        check.check_repeats(CPU, "grouped_mm")


def test_another_router_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = itertools.cycle([True, False])  # the checked backend, then torch's

    def flipped(tokens, _):
        return types.SimpleNamespace(
            experts=tokens.experts.flip(1) if next(ours) else tokens.experts, scores=tokens.scores
        )

    off(monkeypatch, "route", flipped)
    with pytest.raises(CheckError, match=r"^router, softmax: other experts than torch's"):
        check.check_router(CPU, "torch")


def test_a_worse_newton_schulz_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = itertools.chain([1.0, 1.2], itertools.repeat(1.0))  # the second call is the first that is checked
    off(monkeypatch, "newton_schulz", lambda x, _: x * next(factors))
    with pytest.raises(CheckError, match=r"^Newton-Schulz, plain, torch\.bfloat16: "):
        check.check_newton_schulz(CPU, "torch")


def fake_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let checks of a GPU's behaviour run on the CPU; returns the modes of waiting that are set."""
    modes: list[str] = []
    right = check.swiglu_experts
    monkeypatch.setattr(check, "swiglu_experts", lambda *a, backend: right(*a, backend="grouped_mm"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def test_a_wait_for_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = fake_device(monkeypatch)
    check.check_no_wait(CPU)
    assert modes == ["error", "default"]

    def waits(y, _):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return y

    off(monkeypatch, "swiglu_experts", waits)
    with pytest.raises(CheckError, match=r"^no wait for the device: called a synchronizing"):
        check.check_no_wait(CPU)
    assert modes[-1] == "default"


def test_a_graph_that_does_not_replay_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch)
    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    with pytest.raises(CheckError, match=r"^CUDA graph: output differs"):
        check.check_graph(CPU)


@pytest.mark.parametrize("layout", ["grouped", "tokens"])
def test_checked_cases_take_both_sets_of_tiles(layout: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pretrain_kernels.triton_experts import choose_tiles

    taken = {
        choose_tiles(rows=case.routing.scores.numel(), experts=len(case.fc1), width=check.F, capability=90)
        for name, case in check.cases(CPU, torch.bfloat16)
        if name.startswith(layout)
    }
    assert len(taken) == 2


# Clockwork


def test_turns_are_interleaved_and_warm_ups_not_counted() -> None:
    ran: list[str] = []
    taken = measure.take_turns(
        {name: lambda name=name: ran.append(name) for name in "abc"}, rounds=4, clock=counting_clock()
    )
    warm, timed = ran[: 3 * measure.WARM_UP], ran[3 * measure.WARM_UP :]
    assert warm == ["a", "a", "b", "b", "c", "c"]
    rounds = [timed[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert taken == {name: [1.0 + place for place, ran in enumerate(timed) if ran == name] for name in "abc"}


def test_measures_a_toy_shape() -> None:
    results = Results()
    done = list(measure.measure_shape(TOY, toy_setup(), results))
    measure.measure_square(toy_setup(), results, side=16)
    assert done[0] == "toy, uniform: layers"
    assert not results.missing
    for routing in ROUTINGS:
        for operation, flops in ((measure.FORWARD, TOY.forward_flops), (STEP, TOY.step_flops)):
            for variant in toy_setup().layers:
                found = results.find("toy", routing, operation, variant)
                assert found is not None
                assert len(found.seconds) == 3
                assert found.flops == flops
    for operation, factor in ((DOWN, 2), (measure.DX, 4)):
        found = results.find("toy", "uniform", operation, measure.BMM)
        assert found is not None
        assert found.flops == factor * TOY.rows * TOY.D * TOY.F
        assert results.find("toy", "zipf", operation, measure.BMM) is None
    assert results.find("toy", "", measure.ROUTER, measure.TORCH)
    assert results.find("toy", "", measure.NEWTON_SCHULZ, measure.LOOP)
    assert results.find("", "", measure.SQUARE, measure.TORCH)
    assert list(report.table(results))


def test_products_are_those_of_the_experts() -> None:
    """grouped_mm and bmm get the same rows and weights where routing is even."""
    products = measure.product_steps(toy_problem("uniform"), bound=True, triton=False)
    for operation, (steps, _) in products.items():
        equal = steps[measure.BMM]().flatten(0, 1)
        torch.testing.assert_close(steps[measure.GROUPED_MM](), equal, msg=operation)


def test_measures_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = Path(__file__).parent / "bench_cases.py"
    results = run_cases(cases, tmp_path, interpret=True)
    assert len(results) == 2
    assert not {name: message for name, message in results.items() if message}
    # Sums that are not written: the products are noticed to be others.
    first = "from pretrain_kernels.triton_support import Launch\nLaunch.run = lambda launch: None"
    broken = run_cases(cases, tmp_path, interpret=True, only="products", first=first)
    assert all(broken.values())


def test_a_layer_of_ours_that_disagrees_ends_everything() -> None:
    broken = {"ours (broken)": lambda *inputs: 1.1 * peers.unfused(*inputs)}
    with pytest.raises(CheckError, match=r"^ours \(broken\) at toy, zipf: output is 1\.\de-01 off"):
        measure.agreeing_layers(toy_problem(), "zipf", toy_setup(**broken).layers, Results())


def test_a_peer_that_disagrees_or_fails_is_left_out_with_the_reason() -> None:
    def fails(*inputs):
        raise RuntimeError("no kernel\nfor this")

    results = Results()
    setup = toy_setup(wrong=lambda *inputs: 1.1 * peers.unfused(*inputs), fails=fails)
    found = measure.agreeing_layers(toy_problem(), "zipf", setup.layers, results)
    assert set(found) == set(setup.layers) - {"wrong", "fails"}
    assert results.missing["fails at toy, zipf"] == "RuntimeError: no kernel"
    assert results.missing["wrong at toy, zipf"].startswith("CheckError: wrong at toy, zipf: output is 1.")


def test_saved_bytes_count_each_tensor_once_and_no_weights() -> None:
    problem = toy_problem()

    def layer(x, fc1, fc2, routing):
        return (x * x.sigmoid()) @ fc1[0]  # keeps x twice, its sigmoid, the product and a view of fc1

    assert measure.saved_bytes(problem, layer) == 3 * problem.x.numel() * 2


# Ratios, verdicts, output


def measured(
    operation: str, variant: str, seconds: float, *, shape: str = "OLMoE-1B-7B", routing: str = "uniform", **work
):
    return Measurement(shape, routing, operation, variant, [seconds] * 3, **(work or {"flops": 10**12}))


def verdict_of(results: Results, target: str) -> Verdict:
    (found,) = [verdict for verdict in report.verdicts(results) if verdict.target == target]
    return found


def test_rates_are_work_over_the_median() -> None:
    found = Measurement("", "", "", "", [1.0, 4.0, 2.0], flops=6 * 10**12, moved=10**13)
    assert (found.median, found.tflops, found.terabytes) == (2.0, 3.0, 5.0)


@pytest.mark.parametrize(("peer", "met"), [(1.51, True), (1.49, False)])
def test_speed_over_a_peer(peer: float, met: bool) -> None:
    results = Results([measured(STEP, OURS, 1.0), measured(STEP, peers.UNFUSED, peer)])
    found = verdict_of(results, f"{STEP}: ours / {peers.UNFUSED}")
    assert (found.value, found.bound, found.met) == (pytest.approx(peer), 1.5, met)
    assert str(found).endswith("met" if met else "MISSED")


def test_bounds_depend_on_the_shape() -> None:
    wide = [measured(STEP, name, 1.0, shape="Mixtral-8x7B") for name in (OURS, peers.UNFUSED, peers.LIGER)]
    assert verdict_of(Results(wide), f"{STEP}: ours / {peers.UNFUSED}").bound == 1.1
    assert len(report.verdicts(Results(wide))) == 1  # Liger's bound holds at another shape alone


@pytest.mark.parametrize(("rate", "met"), [(0.61, True), (0.59, False)])
def test_share_of_the_square_product(rate: float, met: bool) -> None:
    square = Measurement("", "", measure.SQUARE, measure.TORCH, [1.0], flops=10**12)
    found = verdict_of(Results([measured(STEP, OURS, 1 / rate), square]), f"{STEP}: rate / square product")
    assert (found.value, found.met) == (pytest.approx(rate), met)


@pytest.mark.parametrize(("skewed", "met"), [(1.14, True), (1.16, False)])
def test_skew_costs_at_most_so_much(skewed: float, met: bool) -> None:
    results = Results([measured(STEP, OURS, 1.0), measured(STEP, OURS, skewed, routing="zipf")])
    assert verdict_of(results, f"{STEP}: time, Zipf / uniform").met is met


@pytest.mark.parametrize(("ours", "met"), [(81, True), (79, False)])
def test_bandwidth_and_saved_bytes(ours: int, met: bool) -> None:
    results = Results(
        [measured(measure.COMBINE, OURS, 1.0, moved=ours), measured(measure.COMBINE, measure.COPY, 1.0, moved=100)],
        saved={"OLMoE-1B-7B": 1.04 if met else 1.06},
    )
    assert [verdict.met for verdict in report.verdicts(results)] == [met, met]


def test_table_has_a_line_for_each_measurement() -> None:
    results = Results([measured(STEP, OURS, 0.004), measured(STEP, peers.UNFUSED, 0.008)])
    _, heading, ours, other = report.table(results)
    assert heading == "OLMoE-1B-7B, uniform"
    assert ours.split() == ["forward+backward", "ours", "(triton)", "4.000", "250", "1.00"]
    assert other.split() == ["forward+backward", "unfused", "torch", "8.000", "125", "2.00"]


def test_writes_files(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (measure.FORWARD, STEP)
    results = Results(
        [measured(operation, variant, 0.5) for operation in names for variant in (OURS, peers.UNFUSED)],
        missing={"liger": "ImportError: none"},
    )
    paths = {kind: str(tmp_path / f"out.{kind}") for kind in ("csv", "json", "png")}
    options = argparse.Namespace(csv=paths["csv"], json=paths["json"], picture=paths["png"])
    command.present(options, results, {"device": "some GPU"})
    with open(paths["csv"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["median"]) for row in rows] == [0.5] * 4
    with open(paths["json"], encoding="utf-8") as file:
        content = json.load(file)
    assert content["machine"] == {"device": "some GPU"}
    assert content["measurements"][0]["seconds"] == [0.5] * 3
    assert [verdict["met"] for verdict in content["verdicts"]] == [False]
    with open(paths["png"], "rb") as file:
        assert file.read(4) == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "not measured: liger: ImportError: none" in printed


# Command line


def test_options() -> None:
    everything = command.parse([])
    assert (everything.rounds, everything.shapes) == (20, list(SHAPES))
    quick = command.parse(["--quick"])
    assert (quick.rounds, quick.shapes) == (5, list(SHAPES)[:QUICK])
    assert command.parse(["--quick", "--shapes", "SPARKLING"]).shapes == ["SPARKLING"]
    with pytest.raises(SystemExit):
        command.parse(["--shapes", "nothing"])


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.splitlines() == [
        "pretrain_kernels.bench: needs an NVIDIA GPU of compute capability 8.0 or newer, and torch sees none"
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("pretrain_kernels.triton_support.installed", lambda: True)


def test_refuses_what_would_fail_in_the_end(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert command.obstacle(command.parse(["--csv", str(tmp_path / "a.csv")])) is None
    missing = str(tmp_path / "none" / "a.csv")
    assert command.obstacle(command.parse(["--csv", missing])) == f"{missing}: there is no folder {tmp_path / 'none'}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "needs a GPU of compute capability 8.0 or newer" in str(command.obstacle(command.parse([])))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in str(command.obstacle(command.parse([])))


def test_describes_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    properties = types.SimpleNamespace(name="some GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    machine = command.describe_machine(5)
    assert (machine["device"], machine["compute capability"], machine["rounds"]) == ("some GPU", "9.0", 5)
    assert machine["triton"] == triton.__version__


def test_a_failing_check_ends_the_command_before_anything_is_measured(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(device):
        yield "this holds"
        raise CheckError("that: 1 is more than 0")

    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(command, "describe_machine", lambda rounds: {"device": "some GPU"})
    monkeypatch.setattr(check, "run_checks", failing)
    monkeypatch.setattr(command, "measure_all", lambda *_: pytest.fail("measured"))
    assert command.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["device some GPU", "checked: this holds"]
    assert printed.err == "pretrain_kernels.bench: check failed: that: 1 is more than 0\n"

    # And measures where all hold.
    monkeypatch.setattr(check, "run_checks", lambda device: iter(()))
    monkeypatch.setattr(command, "measure_all", lambda *_: Results())
    assert command.main([]) == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_runs_on_a_gpu(tmp_path: Path, gpu_environment: dict[str, str]) -> None:
    file = tmp_path / "out.json"
    arguments = ["--quick", "--shapes", "SPARKLING", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain_kernels.bench", *arguments],
        env=gpu_environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    ours = [found for found in content["measurements"] if found["variant"] == OURS]
    assert {found["shape"] for found in ours} == {"SPARKLING"}
    assert all(second > 0 for found in ours for second in found["seconds"])
