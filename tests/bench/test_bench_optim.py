"""The benchmark of optimizers on a tiny model: peers do the same work, memory is as planned, slow updates show."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from pretrain.bench import optim, optim_report
from pretrain.bench.measure import Seconds
from pretrain.bench.optim import OURS, PASSES, OptimResult, optim_config
from pretrain.bench.optim_peers import LOOP, peers, tensors_of
from pretrain.bench.workloads import Workload
from pretrain.config.optim import Kind
from pretrain.config.schema import ModelConfig
from pretrain.optim.routing import route, rules_of
from pretrain.optim.sharded import ShardedOptimizer
from tests.helpers.distributed import run_ranks
from tests.optim.build import MOE, Layout, make_groups, make_shards, set_grads

TINY = Workload(
    "tiny",
    ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        num_experts=4,
        top_k=2,
        expert_ffn_size=16,
    ),
    sequence_length=16,
    micro_batch_size=2,
)
EQUAL = {
    "adamw": ("torch AdamW, fused", "torch AdamW, foreach", "torch AdamW, loop"),
    "nadamw": ("torch NAdam, foreach", "torch NAdam, loop"),
    "lion": ("pytorch_optimizer Lion, foreach", "pytorch_optimizer Lion, loop"),
    "sophia": ("pytorch_optimizer SophiaH, loop",),
    "adamh": (LOOP,),
    "muon": ("torch Muon (bf16)", LOOP),
    "scion": (LOOP,),
}
"""Peers whose rule is ours. Those of MARS and Cautious clip a tensor or scale a whole one where ours scales a matrix;
SOAP's bases of blocks that are not square have columns that mean nothing, and its own test compares the others."""


def moves(kind: Kind, steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """How far our weights and those of the peers are after some steps along one gradient, all in one vector."""
    config = optim_config(kind)
    shards = [shard for shard in make_shards(MOE, Layout()) if shard.logical.trainable]
    own = [shard for shard in shards if route(shard.logical, config).rule == rules_of(kind)[0]]
    set_grads(own, "0", 1e-2)
    before = torch.cat([tensor.view(-1) for tensor in tensors_of(kind, own, config)])
    found = {}
    for name, peer in peers(kind, own, config, lr=route(own[0].logical, config).lr).items():
        for _ in range(steps):
            peer.step()
        found[name] = torch.cat([weight.reshape(-1) for weight in peer.weights]) - before
    optimizer = ShardedOptimizer(own, config, make_groups(Layout()))
    for _ in range(steps):
        optimizer.step(1.0)
    return torch.cat([tensor.view(-1) for tensor in tensors_of(kind, own, config)]) - before, found


@pytest.mark.parametrize("kind", EQUAL)
def test_peers_do_the_same_work(kind: Kind) -> None:
    # SophiaH corrects no bias: after one step its momentum is 1 - beta1 of ours, and all is clipped there.
    steps = 1 if kind == "sophia" else 4
    ours, theirs = moves(kind, steps)
    other, _ = moves(kind, steps + 1)
    limit = 2e-2 if kind == "muon" else 1e-4  # bf16, which every one of them rounds to in another place
    for name in EQUAL[kind]:
        assert float((theirs[name] - ours).norm() / ours.norm()) < limit, name
    # Negative control: a step more shows.
    assert float((other - ours).norm() / ours.norm()) > 2e-2


def run_bench(json_file: str) -> str:
    """`pretrain bench optim --quick` on the tiny model; what it printed."""
    from pretrain.bench import command

    optim.QUICK = TINY
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert command.bench("optim", rounds=1, quick=True, json_file=Path(json_file)) == 0
    return out.getvalue()


def run_with_other_plan() -> str:
    """The refusal of a benchmark whose state does not take what is planned."""
    from pretrain.config.schema import ParallelConfig
    from pretrain.parallel.mesh import mesh_of
    from pretrain.platform import distributed

    original = optim.rank_memory

    def smaller(*arguments):
        planned = original(*arguments)
        return dataclasses.replace(planned, optimizer=planned.optimizer - 4)

    optim.rank_memory = smaller
    with distributed.joined() as device, mesh_of(ParallelConfig(), device) as mesh:
        try:
            optim.measure_optim(TINY, mesh, rounds=1, kinds=["lion"])
        except RuntimeError as error:
            return str(error)
    return ""


def test_every_kind_is_in_the_table_and_takes_the_memory_planned(tmp_path: Path) -> None:
    (printed,) = run_ranks(run_bench, 1, str(tmp_path / "bench.json"))
    results = json.loads((tmp_path / "bench.json").read_text())["optim"]
    assert [result["kind"] for result in results] == list(get_args(Kind))
    for result in results:
        assert f"| {result['kind']} " in printed
        assert result["state_bytes"] == result["planned_bytes"] > 0
        assert set(EQUAL.get(result["kind"], ())) <= set(result["seconds"])
    by_kind = {result["kind"]: result for result in results}
    assert by_kind["adamw"]["state_bytes"] == 8 * by_kind["adamw"]["parameters"]
    assert by_kind["lion"]["state_bytes"] == 4 * by_kind["lion"]["parameters"]
    assert "estimate of curvature" in by_kind["sophia"]["seconds"]
    assert "target 1.05" in printed


def test_memory_other_than_planned_is_refused() -> None:
    (message,) = run_ranks(run_with_other_plan, 1)
    assert message.startswith("lion: the state takes ")


def result_of(**medians: float) -> OptimResult:
    seconds = {name: [Seconds(wall=9.0, cpu=value)] * 3 for name, value in medians.items()}
    return OptimResult("lion", seconds, every_steps=10, parameters=10, state_bytes=40, planned_bytes=40)


def test_shares_and_verdicts() -> None:
    plain = result_of(**{PASSES: 3.0, OURS: 1.0, "peer a": 2.0, "peer b": 0.8})
    assert optim_report.share(plain, "cpu") == 0.25
    assert optim_report.share(plain, "wall") == 0.5
    assert optim_report.verdict([plain], clock="cpu") == "lion: 1.25 of peer b, target 1.05: MISSED"
    with_estimates = result_of(**{PASSES: 3.0, OURS: 1.0, optim.ESTIMATE: 10.0})
    assert optim_report.share(with_estimates, "cpu") == 0.4
    assert optim_report.verdict([with_estimates], clock="cpu") == ""
    alone = result_of(**{PASSES: 3.0, OURS: 2.0, optim.OURS_MATRICES: 1.0, "peer": 1.0})
    assert optim_report.verdict([alone], clock="cpu") == "lion: 1.00 of peer, target 1.05: holds"
    table = optim_report.table(TINY, [alone], clock="cpu")
    assert "| matrices | 1.0000" in table
    assert "| 40.0%     | 4.00" in table
