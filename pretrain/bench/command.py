"""`pretrain bench`: measure every workload in every precision, then what a growth costs, then the demonstration; or
what updates or synchronisations cost, which are not among these."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist

from pretrain.bench import decentral_report, growth_report, optim_report, report, variants
from pretrain.bench.decentral import CONFIG_FILE as CONFIG_FILE_7B
from pretrain.bench.decentral import SLOW_LINK, SyncResult, measure_decentral, training_shares
from pretrain.bench.demo import CONFIG_FILE, DemoSpeed, demo_speed
from pretrain.bench.growth import GrowthResult, growth_workload, measure_growth
from pretrain.bench.measure import Result, Timings, take_turns
from pretrain.bench.network import NetworkError
from pretrain.bench.optim import OptimResult, measure_optim, optim_workload
from pretrain.bench.optim_peers import LIBRARY, has_library
from pretrain.bench.stand_ins import optimizer_on_cpu
from pretrain.bench.workloads import Precision, Workload, run_config, workloads_for, write_tokens
from pretrain.config.schema import Config, ParallelConfig
from pretrain.data.batches import BatchIterator
from pretrain.errors import UserError
from pretrain.parallel.engine import Batch
from pretrain.parallel.mesh import Mesh, Meshes, destroy_mesh, mesh_of
from pretrain.platform import distributed
from pretrain.run import open_data

Part = Literal["step", "growth", "optim", "decentral"]

WARMUP = 3
STEP_ROUNDS, GROWTH_ROUNDS, OPTIM_ROUNDS, DECENTRAL_ROUNDS = 9, 3, 5, 5
# Losses of the first step, from the same weights, may differ by rounding: in fp32 that of sums over a vocabulary; in
# bf16 that of activations, 2^-9 each.
LARGEST_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2}


def bench(part: Part | None = None, *, rounds: int | None, quick: bool, json_file: Path | None = None) -> int:
    """Measure one part, or steps, growth and the demo; print the tables, write the JSON; returns the exit code.

    rounds: of each part; None: STEP_ROUNDS, GROWTH_ROUNDS, OPTIM_ROUNDS and DECENTRAL_ROUNDS.
    """
    _check(part, json_file)
    results: list[Result] = []
    growths: list[GrowthResult] = []
    optimizers: list[OptimResult] = []
    synced: list[SyncResult] = []
    with distributed.joined() as device:
        if device.type == "cpu":
            # Its CPU time is then the work done, whoever else is on the machine.
            torch.set_num_threads(1)
        machine = report.machine(device)
        _say(report.describe(machine))
        if part in (None, "step"):
            results = _bench_steps(device, rounds=rounds or STEP_ROUNDS, quick=quick)
        if part in (None, "growth"):
            growths = _bench_growth(device, rounds=rounds or GROWTH_ROUNDS, quick=quick)
        if part == "optim":
            optimizers = _bench_optim(device, rounds=rounds or OPTIM_ROUNDS, quick=quick)
        if part == "decentral":
            synced = _bench_decentral(rounds=rounds or DECENTRAL_ROUNDS, quick=quick)
        is_main = dist.get_rank() == 0
    demo = demo_speed() if part in (None, "step") and not quick and CONFIG_FILE.exists() else None
    if demo:
        print(f"\n{report.demo_line(demo)}")
    if json_file and is_main:
        found = _as_json(machine, results, growths, optimizers, synced, demo)
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _check(part: Part | None, json_file: Path | None) -> None:
    processes = distributed.world_size()
    if processes > 1 and part != "growth":
        raise UserError(f"{processes} processes: only `bench growth` measures several; start it without a launcher")
    if json_file and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.parent}; make it, or give another file")


def _say(text: str) -> None:
    """Print, on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def _bench_steps(device: torch.device, *, rounds: int, quick: bool) -> list[Result]:
    """The training step beside its peers."""
    if not _has_transformers():
        _say("transformers is not installed, so not compared with: pip install transformers")
    results = []
    with mesh_of(ParallelConfig(), device) as mesh:
        for workload in workloads_for(device)[: 1 if quick else None]:
            for precision in get_args(Precision):
                print(f"measuring {workload.name} {precision} ...", file=sys.stderr, flush=True)
                results.append(measured(workload, precision, mesh, rounds=rounds))
                _say(f"\n{report.result_table(results[-1], device)}")
    _say(f"\n{report.verdict(results, device)}")
    return results


def _bench_growth(device: torch.device, *, rounds: int, quick: bool) -> list[GrowthResult]:
    """Growth beside its floor and the round trip."""
    workload = growth_workload(quick=quick)
    meshes = Meshes(device)
    try:
        # What a run prints would come between the lines of the table.
        with contextlib.redirect_stdout(io.StringIO()):
            results = measure_growth(workload, meshes, rounds=rounds)
    finally:
        destroy_mesh()
    _say(f"\n{growth_report.table(workload, results, processes=dist.get_world_size())}")
    _say(f"\n{growth_report.verdict(results)}")
    return results


def _bench_optim(device: torch.device, *, rounds: int, quick: bool) -> list[OptimResult]:
    """The update of every kind of optimizer beside its peers."""
    if not has_library():
        _say(f"{LIBRARY} is not installed, so not compared with: pip install {LIBRARY}")
    workload = optim_workload(device, quick=quick)
    with mesh_of(ParallelConfig(), device) as mesh:
        results = measure_optim(workload, mesh, rounds=rounds)
    clock = "wall" if device.type == "cuda" else "cpu"
    _say(f"\n{optim_report.table(workload, results, clock=clock)}")
    _say(f"\n{optim_report.verdict(results, clock=clock)}")
    return results


def _bench_decentral(*, rounds: int, quick: bool) -> list[SyncResult]:
    """Synchronisation on loopback and on a slow link, and by calculation that of the 7B."""
    results = measure_decentral(rounds=rounds, quick=quick)
    _say(f"\n{decentral_report.tables(results)}")
    try:
        slow = measure_decentral(rounds=rounds, quick=quick, link=SLOW_LINK)
    except NetworkError as error:
        _say(f"\nno figures over {SLOW_LINK}: {error}")
    else:
        _say(f"\n{decentral_report.tables(slow)}")
        results += slow
    _say(f"\n{decentral_report.verdict(results)}")
    if CONFIG_FILE_7B.exists():
        _say(f"\n{decentral_report.share_table(training_shares(CONFIG_FILE_7B))}")
    return results


def measured(workload: Workload, precision: Precision, mesh: Mesh, *, rounds: int) -> Result:
    """Time all variants on a workload, after checking that they compute the same losses."""
    count = WARMUP + rounds
    with tempfile.TemporaryDirectory() as folder, optimizer_on_cpu(), contextlib.ExitStack() as stack:
        config = run_config(workload, precision, Path(folder))
        tokens = count * workload.tokens_per_step
        write_tokens(Path(folder) / "tokens", vocab_size=workload.model.vocab_size, tokens=tokens)
        # What a run prints would come between the lines of the table.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        steps = {variants.OURS: stack.enter_context(variants.ours(config, mesh)), **_peers(config, mesh, count)}
        losses = {name: [step() for _ in range(WARMUP)] for name, step in steps.items()}
        check_equal_work(losses, precision)
        seconds = take_turns(steps, rounds=rounds, device=mesh.device)
    return Result(workload, precision, {name: Timings(losses[name], seconds[name]) for name in steps})


def _peers(config: Config, mesh: Mesh, steps: int) -> dict[str, variants.Step]:
    weights = variants.initial_weights(config, mesh)
    peers = {
        variants.BARE: variants.bare_megatron(config, mesh, _batches(config, mesh, steps)),
        variants.STOCK: variants.stock_megatron(config, mesh, _batches(config, mesh, steps), weights),
    }
    if _has_transformers():
        from pretrain.bench.huggingface import qwen3_moe  # noqa: PLC0415 (it is not among what a run needs)

        peers[variants.TRANSFORMERS] = qwen3_moe(config, mesh, _batches(config, mesh, steps), weights)
    return peers


def _has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _batches(config: Config, mesh: Mesh, steps: int) -> Iterator[Batch]:
    """The batches our run reads, on the device before the clock starts."""
    data, _ = open_data(config)
    read = islice(BatchIterator(data, config.batch), steps)
    return iter([{name: tensor.to(mesh.device) for name, tensor in batch.items()} for batch in read])


def check_equal_work(losses: Mapping[str, Sequence[float]], precision: Precision) -> None:
    """Raise RuntimeError unless all first losses agree: what is timed would not be the same computation."""
    limit = LARGEST_DIFFERENCE[precision]
    ours = losses[variants.OURS][0]
    for name, (first, *_) in losses.items():
        if not abs(first - ours) <= limit:  # A nan fails, too.
            raise RuntimeError(f"{name} starts at loss {first}, {variants.OURS} at {ours}: they differ by > {limit}")


def _as_json(
    machine: dict[str, str],
    results: Sequence[Result],
    growths: Sequence[GrowthResult],
    optimizers: Sequence[OptimResult],
    synced: Sequence[SyncResult],
    demo: DemoSpeed | None,
) -> dict[str, object]:
    """Everything measured, for programs: every loss and the seconds of every round."""
    return {
        "machine": machine,
        "results": [
            {
                "workload": result.workload.name,
                "shape": result.workload.describe(),
                "tokens_per_step": result.workload.tokens_per_step,
                "precision": result.precision,
                "timings": {name: asdict(timing) for name, timing in result.timings.items()},
            }
            for result in results
        ],
        "growth": [asdict(growth) for growth in growths],
        "optim": [asdict(optimizer) for optimizer in optimizers],
        "decentral": [result.as_json() for result in synced],
        "demo": asdict(demo) if demo else None,
    }
