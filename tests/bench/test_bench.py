"""The benchmark on models so small that it takes seconds: it runs, compares equal work, and says what it measured."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import optimizer as megatron_optimizer

from pretrain.bench import variants
from pretrain.bench.measure import Seconds, Timings, ratio, take_turns
from pretrain.bench.stand_ins import optimizer_on_cpu
from pretrain.bench.workloads import Workload
from pretrain.config.schema import ModelConfig
from pretrain.errors import UserError
from tests.helpers.distributed import run_ranks

VARIANTS = [variants.OURS, variants.BARE, variants.STOCK, variants.TRANSFORMERS]
ROUNDS = 3
DEMO = """
[run]
directory = "elsewhere"
precision = "fp32"
[model]
vocab_size = 64
hidden_size = 16
num_layers = 1
num_attention_heads = 2
num_experts = 4
top_k = 2
expert_ffn_size = 16
[[data.train]]
prefix = "nowhere/train"
[[data.valid]]
prefix = "nowhere/valid"
[batch]
sequence_length = 16
global_batch_size = 4
[budget]
tokens = 1_000_000
[schedule]
warmup_steps = 50
[parallel]
expert = 2
[checkpoint]
every_steps = 1
[eval]
every_steps = 1
"""


def tiny() -> Workload:
    """Query groups, head and expert sizes all differ, so that a wrong mapping of weights has no room to hide."""
    model = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=12,
        qk_norm=True,
        num_experts=4,
        top_k=2,
        expert_ffn_size=24,
        init_std=0.2,  # Attention and routing matter to the loss from the first step on.
    )
    return Workload("tiny", model, sequence_length=24, micro_batch_size=3)


def run_bench(json_file: str) -> str:
    """`pretrain bench --quick` on the tiny model; what it printed."""
    from pretrain.bench import command

    command.workloads_for = lambda device: (tiny(),)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert command.bench("step", rounds=ROUNDS, quick=True, json_file=Path(json_file)) == 0
    return out.getvalue()


def run_on_other_weights() -> str:
    """The refusal of a benchmark in which one variant starts from other weights."""
    from pretrain.bench import command
    from pretrain.config.schema import ParallelConfig
    from pretrain.parallel.mesh import mesh_of
    from pretrain.platform import distributed

    original = variants.initial_weights

    def scaled(config, mesh):
        weights = dict(original(config, mesh))
        weights["decoder.layers.1.mlp.experts.linear_fc2.weight"] *= 1.5
        return weights

    variants.initial_weights = scaled
    with distributed.joined() as device, mesh_of(ParallelConfig(), device) as mesh:
        try:
            command.measured(tiny(), "fp32", mesh, rounds=1)
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def printed_and_json(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    (printed,) = run_ranks(run_bench, 1, str(file))
    return printed, json.loads(file.read_text())


def test_prints_a_ratio_to_every_peer(printed_and_json) -> None:
    printed, _ = printed_and_json
    for precision in ("fp32", "bf16"):
        table = printed.split(f"tiny, {precision}")[1].split("\n\n")[1].splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        assert [row[0] for row in cells[2:]] == VARIANTS
        for row in cells[3:]:
            titled = zip(cells[0], row, strict=True)
            ratios = [float(cell) for title, cell in titled if title in ("ours / it", "by round")]
            assert len(ratios) == 4
            assert min(ratios) > 0
        assert f"\ntiny {precision}: " in printed  # the verdict


def test_writes_every_figure(printed_and_json) -> None:
    _, figures = printed_and_json
    assert [result["precision"] for result in figures["results"]] == ["fp32", "bf16"]
    assert "torch " in figures["machine"]["versions"]
    for result in figures["results"]:
        assert list(result["timings"]) == VARIANTS
        assert all(len(timing["seconds"]) == ROUNDS for timing in result["timings"].values())


def test_all_do_the_same_work(printed_and_json) -> None:
    """Over three updates, too: same optimizer, clipping, decay."""
    _, figures = printed_and_json
    for result, tolerance in zip(figures["results"], (1e-5, 3e-2), strict=True):
        losses = [timing["losses"] for timing in result["timings"].values()]
        assert losses[0][0] != losses[0][-1]
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], abs=tolerance)


def test_refuses_unequal_work() -> None:
    (refusal,) = run_ranks(run_on_other_weights, 1)
    assert refusal.startswith(variants.STOCK)


@pytest.mark.parametrize(
    ("processes", "json_file", "word"), [(2, None, "2 processes"), (1, "nowhere/bench.json", "nowhere")]
)
def test_says_at_once_what_cannot_work(
    monkeypatch: pytest.MonkeyPatch, processes: int, json_file: str | None, word: str
) -> None:
    from pretrain.bench import command

    monkeypatch.setattr(command.distributed, "world_size", lambda: processes)
    with pytest.raises(UserError, match=word):
        command.bench("step", rounds=1, quick=True, json_file=Path(json_file) if json_file else None)


def test_measures_the_demo(tmp_path: Path) -> None:
    from pretrain.bench.demo import demo_speed

    config = tmp_path / "demo.toml"
    config.write_text(DEMO)
    speed = demo_speed(config)
    assert speed.processes == 2
    assert 0 < speed.slowest <= speed.tokens_per_second <= speed.fastest < math.inf


def test_ratio_by_round_is_not_moved_by_slow_rounds() -> None:
    ours, peer = [1.0, 1.0, 9.0, 9.0, 9.0], [2.0, 2.0, 18.0, 2.0, 2.0]
    assert ratio(ours, peer).of_medians == 9.0 / 2.0
    assert ratio([1.0, 1.0, 9.0], [2.0, 2.0, 18.0]).per_round == 0.5


def test_steps_take_turns() -> None:
    order: list[str] = []

    def step(name: str) -> float:
        order.append(name)
        return 0.0

    steps = {name: lambda name=name: step(name) for name in "abc"}
    taken = take_turns(steps, rounds=20, device=torch.device("cpu"))
    rounds = ["".join(order[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert len(set(rounds)) == 6
    assert all(len(seconds) == 20 for seconds in taken.values())
    assert Timings([], [Seconds(wall=2.0, cpu=1.0)]).of("cpu") == [1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where CUDA is there")
def test_stand_ins_are_taken_back() -> None:
    before = torch.Tensor.type, megatron_optimizer.torch
    with optimizer_on_cpu():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype is torch.float64
        assert megatron_optimizer.torch.zeros(1, device="cuda").device.type == "cpu"
    assert (torch.Tensor.type, megatron_optimizer.torch) == before
    assert torch.ones(1).type() == "torch.FloatTensor"
