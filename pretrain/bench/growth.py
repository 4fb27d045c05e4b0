"""What a growth costs: in the job, by way of a checkpoint, at least, and in training steps.

Everything is measured in turn, round by round, by all processes together; a figure is that of the slowest one.
"""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.bench.measure import stopwatch
from pretrain.bench.offline import offline_grower
from pretrain.bench.rates import Rates, measure_rates
from pretrain.bench.workloads import MEDIUM, SMALL, Workload, run_config, write_tokens
from pretrain.checkpoint import Moment, read_checkpoint, write_checkpoint
from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.load import dump_config
from pretrain.config.optim import OptimConfig
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.errors import UserError
from pretrain.growth import live
from pretrain.growth.history import next_growth
from pretrain.growth.live import grow_model, moving_tensors
from pretrain.growth.maps import GrowthPoint, ages
from pretrain.growth.pull import Traffic
from pretrain.growth.transplant import Copying, Target, requests, state_copying, targets_of
from pretrain.metrics.throughput import RunClock
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import build_engine
from pretrain.parallel.mesh import Meshes
from pretrain.plan import make_plan
from pretrain.platform.memory import PeakMemory
from pretrain.restore import restore_or_build
from pretrain.run import Run, TrainState, checkpoint_tensors
from pretrain.run_directory import CHECKPOINTS
from pretrain.train import train_step

GrowOffline = Callable[[Path, Path], float]
"""Grows a checkpoint into a new run directory; returns the seconds."""

FP32_BYTES = 4
GROWTH_STEP = 1
"""The step that the growth is due at; what it costs does not depend on it."""


@dataclass(frozen=True)
class Moved:
    """Bytes that filling the grown model takes on this rank, however it is done."""

    read: int
    """The old state, once."""
    written: int
    """The new entries, once; those of a state that starts at zero are not written."""
    received: int
    """Of the old state, what only other ranks hold."""

    def floor(self, rates: Rates) -> float:
        """Seconds it takes at least, when copies and exchange do not overlap."""
        return (self.read + self.written) / rates.copy + self.received / rates.exchange


@dataclass(frozen=True)
class Cost:
    """One round of one kind of growth, of the rank with the largest value."""

    live: float
    """Wall seconds from the old tensors to a model that is ready to train."""
    round_trip: float
    """Wall seconds to write a checkpoint, grow it offline, build the new model and read it."""
    transplant: float
    """Seconds to fill the new tensors, the main part of `live`, by the clock of `Stopwatch.work`."""
    floor: float
    """Seconds that `transplant` takes at least, by the same clock."""
    both_bytes: float
    """Memory in use at the most until the new model is filled and the old one goes; nan where it is not known."""
    peak_bytes: float
    """The same until the new model is ready, with its gradients."""


@dataclass(frozen=True)
class GrowthResult:
    """One kind of growth."""

    kind: str
    planned_bytes: int
    """What `pretrain plan` says of the memory while both models are there."""
    costs: list[Cost]
    """A round each."""
    steps: list[float]
    """Seconds of a training step of the old model in each round."""

    def of(self, name: str) -> list[float]:
        """One figure of every round."""
        return [getattr(cost, name) for cost in self.costs]


def growth_workload(*, quick: bool) -> Workload:
    """The model that grows: 16 million parameters or 62."""
    return SMALL if quick else MEDIUM


def growth_kinds(processes: int) -> dict[str, dict[str, Any]]:
    """Name -> keys of [[growth]]."""
    found: dict[str, dict[str, Any]] = {
        "depth x2": {"depth": {}},
        "experts x2": {"experts": {"noise": 0.0}},
        "experts x2, noise": {"experts": {}},
        "hidden x2, expert ffn x2": {"hidden": {}, "expert_ffn": {}},
    }
    if processes > 1:
        # Every layer goes to one rank, which held a part of its experts only.
        found["depth x2, new layout"] = {"depth": {}, "parallel": {"expert": 1, "pipeline": processes}}
    return found


def measure_growth(workload: Workload, meshes: Meshes, *, rounds: int) -> list[GrowthResult]:
    """All kinds of growth of one model, interleaved. Collective; the figures are those of rank 0, which has all."""
    processes = dist.get_world_size()
    _check_divides(workload, processes)
    with _shared_folder() as folder:
        base = _config(workload, folder, processes)
        if dist.get_rank() == 0:
            tokens = 2 * rounds * base.batch.tokens_per_step
            write_tokens(folder / "tokens", vocab_size=workload.model.vocab_size, tokens=tokens)
        dist.barrier()
        configs = {name: _with_growth(base, keys) for name, keys in growth_kinds(processes).items()}
        costs: dict[str, list[Cost]] = {name: [] for name in configs}
        steps: list[float] = []
        with (
            restore_or_build(base, meshes, clock := RunClock()) as (run, state),
            offline_grower() if dist.get_rank() == 0 else nullcontext() as grow_offline,
        ):
            clock.begin_steps()
            for number in range(rounds):
                steps.append(_largest([_step_seconds(run, state)], run.ranks)[0])
                for name, config in configs.items():
                    if dist.get_rank() == 0:
                        print(f"growth, round {number + 1} of {rounds}: {name} ...", file=sys.stderr, flush=True)
                    costs[name].append(_measure_once(run, config, folder, grow_offline))
    return [
        GrowthResult(name, _planned_bytes(config, processes), costs[name], steps) for name, config in configs.items()
    ]


def _measure_once(run: Run, config: Config, folder: Path, grow_offline: GrowOffline | None) -> Cost:
    point = next_growth(config, 0, scores={})
    rates = measure_rates(run.meshes.device)
    live_seconds, seen, peak_bytes = _grow_live(run, config, point)
    run.meshes.of(run.config.parallel)
    trip_seconds = _round_trip(run, config, point, folder, grow_offline)
    run.meshes.of(run.config.parallel)
    cost = Cost(live_seconds, trip_seconds, seen.work, seen.moved.floor(rates), seen.both_bytes, peak_bytes)
    return Cost(*_largest(astuple(cost), run.ranks))


def _step_seconds(run: Run, state: TrainState) -> float:
    """A training step. The one before it gets back the memory that others of this round freed."""
    train_step(run, state)
    dist.barrier()
    with stopwatch(run.meshes.device) as watch:
        train_step(run, state)
    return watch.wall


@dataclass
class _Watch:
    """One transplant, as seen from outside."""

    work: float = 0.0
    """Seconds, see `Stopwatch`."""
    moved: Moved = Moved(0, 0, 0)
    both_bytes: float = math.nan
    aside: float = 0.0
    """Wall seconds spent on watching."""


def _grow_live(run: Run, config: Config, point: GrowthPoint) -> tuple[float, _Watch, float]:
    """Grow a copy of the old tensors as a run does. Returns seconds, what the transplant did, and the peak in bytes."""
    stage, device = stages(config)[1].config, run.meshes.device
    old = [replace(tensor, data=tensor.data.clone()) for tensor in moving_tensors(run.engine.shards, run.optimizer)]
    held = sum(tensor.data.nbytes for tensor in old)
    _give_memory_back(device)
    memory = PeakMemory(device)
    dist.barrier()
    with _watched_transplant(device, memory) as seen, stopwatch(device) as watch:
        grow_model(
            [point],
            old,
            stage,
            run.meshes.of(stage.parallel),
            optimizer_state=run.optimizer.state_dict(),
            ranks=run.ranks,
        )
    seen.both_bytes += held
    return watch.wall - seen.aside, seen, held + _extra(memory)


@contextmanager
def _watched_transplant(device: torch.device, memory: PeakMemory) -> Iterator[_Watch]:
    """Time the call of `transplant` inside `grow_model`, count what it has to move, and note the peak so far."""
    seen, real = _Watch(), live.transplant

    def watched(growth: GrowthPoint, old: Sequence[ShardedTensor], new: Sequence[ShardedTensor], **how: Any) -> Traffic:
        with stopwatch(device) as aside:
            seen.moved = moved_bytes(growth, old, new, how["optim"])
            dist.barrier()
        with stopwatch(device) as watch:
            traffic = real(growth, old, new, **how)
        seen.aside, seen.work, seen.both_bytes = aside.wall, watch.work, _extra(memory)
        return traffic

    with mock.patch.object(live, "transplant", watched):
        yield seen


def moved_bytes(
    growth: GrowthPoint, old: Sequence[ShardedTensor], new: Sequence[ShardedTensor], optim: OptimConfig
) -> Moved:
    """What has to be read, written and received to fill `new` on this rank, which holds `old`; all of it fp32."""
    targets = targets_of(growth, new, optim)
    here: dict[str, list[Box]] = {}
    for tensor in old:
        here.setdefault(tensor.key, []).append(Box(tuple(tensor.global_offset), tuple(tensor.local_shape)))
    # Once each, however many targets they have.
    needed = {(request.key, request.box) for target in targets for request in requests(growth, target)}
    absent = 0
    for key, box in needed:
        common = (box.intersect(own) for own in here.get(key, []))
        absent += box.numel - sum(part.numel for part in common if part)
    return Moved(
        read=sum(tensor.data.nbytes for tensor in old),
        written=sum(_written_bytes(growth, target) for target in targets),
        received=absent * FP32_BYTES,
    )


def _written_bytes(growth: GrowthPoint, target: Target) -> int:
    tensor_map = target.tensor_map
    copying = Copying() if target.state is None else state_copying(growth, target.state, tensor_map)
    if copying is None or (copying.old_only and tensor_map.is_new_layer):
        return 0
    numel = 1
    for axis, start, size in zip(tensor_map.axes, target.offset, target.box.shape, strict=True):
        is_new = axis.is_new[start : start + size]
        numel *= int((~is_new).sum()) if copying.old_only else size
    return numel * FP32_BYTES


def _round_trip(run: Run, config: Config, point: GrowthPoint, folder: Path, grow_offline: GrowOffline | None) -> float:
    """Seconds of a checkpoint of the old model, its growth offline, and the new model read from that.

    Less than a user waits: the start of the program that grows it, and of the job that goes on, is not counted.
    """
    stage, device = stages(config)[1].config, run.meshes.device
    source, out = folder / Moment(GROWTH_STEP).name, folder / "grown"
    state = TrainState(step=GROWTH_STEP, optimizer=run.optimizer.state_dict())
    _give_memory_back(device)
    dist.barrier()
    with stopwatch(device) as saving:
        write_checkpoint(
            source,
            checkpoint_tensors(run.engine, run.optimizer),
            step=GROWTH_STEP,
            state=asdict(state),
            config_toml=dump_config(config),
            group=run.ranks.group,
        )
    growing = run.ranks.broadcast(grow_offline and grow_offline(source, out))
    with stopwatch(device) as reading:
        mesh = run.meshes.of(stage.parallel)
        # Nothing to fill it with before it is read.
        engine = build_engine(stage, mesh, fill=lambda shards: None)
        optimizer = ShardedOptimizer(engine.shards, stage.optim, mesh.groups, ages=ages([point]))
        grown = out / CHECKPOINTS / Moment(GROWTH_STEP, grown=True).name
        read_checkpoint(grown, checkpoint_tensors(engine, optimizer), group=run.ranks.group)
        optimizer.load_finished()
    dist.barrier()
    if run.ranks.rank == 0:
        shutil.rmtree(source)
        shutil.rmtree(out)
    return saving.wall + growing + reading.wall


def _extra(memory: PeakMemory) -> float:
    extra = memory.extra_bytes()
    return math.nan if extra is None else extra


def _give_memory_back(device: torch.device) -> None:
    """Free memory goes to the system: a growth gets its memory from there, and peaks count from what is in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """A folder for the time of a `with` block, the same on all ranks of a machine."""
    ranks = Ranks(dist.new_group(backend="gloo"))
    with ExitStack() as stack:
        yield Path(ranks.broadcast(stack.enter_context(tempfile.TemporaryDirectory()) if ranks.rank == 0 else None))
        dist.barrier()


def _largest(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The largest of all ranks' values, on all ranks."""
    largest: list[float] = ranks.broadcast([max(of_all) for of_all in zip(*ranks.gather(list(values)), strict=True)])
    return largest


def _planned_bytes(config: Config, processes: int) -> int:
    growth = make_plan(config, processes).stages[1].growth
    assert growth is not None
    return growth.memory.total


def _check_divides(workload: Workload, processes: int) -> None:
    model = workload.model
    if model.num_experts % processes or 2 * model.num_layers % processes:
        raise UserError(
            f"{processes} processes: bench growth spreads {model.num_experts} experts and then {2 * model.num_layers} "
            "layers over them evenly; use 1, 2, 4 or 8"
        )


def _config(workload: Workload, folder: Path, processes: int) -> Config:
    """A run of the old model, its experts spread over the processes."""
    base = run_config(workload, "bf16", folder)
    batch = base.batch.model_copy(update={"global_batch_size": workload.micro_batch_size * processes})
    parallel = base.parallel.model_copy(update={"expert": processes})
    return base.model_copy(update={"batch": batch, "parallel": parallel})


def _with_growth(base: Config, keys: Mapping[str, Any]) -> Config:
    values = base.model_dump(mode="json", exclude_none=True)
    return Config.model_validate({**values, "growth": [{"at_step": GROWTH_STEP, **keys}]})
