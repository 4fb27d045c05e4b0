"""A run: its parts, its state, and how both come back after a restart.

`TrainState` lists everything that must survive one, beside the weights, selection biases and optimizer tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain import run_directory
from pretrain.checkpoint import Checkpoints, read_checkpoint, read_state
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.load import dump_config, load_config
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.data.batches import BatchIterator, validation_batches
from pretrain.data.dataset import VALIDATION_SEED, BlendedDataset, open_blend
from pretrain.data.text_bytes import bytes_per_token
from pretrain.errors import CheckpointError, DataError
from pretrain.growth.history import check_history, history, rewarms
from pretrain.growth.maps import ages
from pretrain.metrics.moe import BalanceWindow
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.throughput import RunClock
from pretrain.model.build import choose_experts_backend
from pretrain.model.counts import count_flops, count_parameters
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import describe_routes
from pretrain.optim.schedule import Schedule, Schedules
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import STATE_PREFIX, split_state_key
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Mesh, Meshes


@dataclass
class TrainState:
    """Where a run stands. JSON values only."""

    step: int = 0
    """Optimizer steps done; skipped ones count, as their data is used up."""
    samples: int = 0
    """Position in the global sample order."""
    tokens: int = 0
    flops: float = 0.0
    skipped_in_a_row: int = 0
    growths: list[dict[str, Any]] = field(default_factory=list)
    """The growths the run has been through, see `growth.history`."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Utility of experts so far, when the next growth goes by it, see `growth.scores`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What its first weights were made of, see `upcycle`; empty where they were drawn."""
    data_fingerprint: str = ""
    """Of the blend that `samples` is a position in."""
    rng: str = ""
    """torch's host generator, base64. Training draws nothing from it; what comes to draw must not repeat itself."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    recorder: dict[str, Any] = field(default_factory=dict)

    def advance(self, config: Config, flops_per_token: int) -> None:
        """Count one global batch as done."""
        self.step += 1
        self.samples += config.batch.global_batch_size
        self.tokens += config.batch.tokens_per_step
        self.flops += float(flops_per_token) * config.batch.tokens_per_step


@dataclass
class Run:
    """The parts of a run on this rank."""

    written: Config
    """The configuration as written, with all growth points."""
    config: Config
    """The same with the model and layout of this stage."""
    meshes: Meshes
    engine: Engine
    optimizer: ShardedOptimizer
    schedule: Schedules
    flops_per_token: int
    """Model FLOPs of training on one token."""
    train_data: BlendedDataset
    valid_data: BlendedDataset | None
    batches: BatchIterator
    checkpoints: Checkpoints
    ranks: Ranks
    clock: RunClock
    recorder: Recorder | None
    """Rank 0 only."""
    valid_bytes_per_token: float | None = None
    """Of the text that validation predicts; None where the datasets do not tell."""
    balance: BalanceWindow = field(default_factory=BalanceWindow)
    durable: SimpleQueue[tuple[Path, float]] = field(default_factory=SimpleQueue)
    """Checkpoints that became durable, with the seconds it took; filled by the thread that writes them."""

    @property
    def mesh(self) -> Mesh:
        """The layout in force."""
        return self.engine.mesh

    def event(self, name: str, state: TrainState, /, **fields: Any) -> None:
        """Write an event, on the rank that does."""
        if self.recorder:
            self.recorder.event(name, step=state.step, **fields)

    def save(self, state: TrainState, *, grown: bool = False) -> None:
        """Write a checkpoint, or begin to when they are asynchronous. `grown`: of this step after its growth.
        Collective."""
        state.optimizer = self.optimizer.state_dict()
        state.clock = self.clock.state_dict()
        state.rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        if self.recorder:
            state.recorder = self.recorder.state_dict()
        tensors = checkpoint_tensors(self.engine, self.optimizer)
        self.checkpoints.save(
            state.step, tensors, state=asdict(state), config_toml=dump_config(self.written), grown=grown
        )

    def valid_loss(self) -> float:
        """Loss on the validation batches, always the same ones, in nats per token. Collective."""
        assert self.valid_data is not None
        config, mesh = self.config, self.mesh
        batches = validation_batches(
            self.valid_data, config.batch, batches=config.eval.batches, dp_rank=mesh.data_rank, dp_size=mesh.data_size
        )
        on_device = ({name: tensor.to(mesh.device) for name, tensor in micro.items()} for micro in batches)
        return float(self.engine.evaluate(on_device, config.eval.batches * self.engine.microbatches))

    def report_durable(self, state: TrainState) -> None:
        """Write an event for each checkpoint that is safe by now."""
        while not self.durable.empty():
            path, seconds = self.durable.get()
            self.event("save", state, checkpoint=path.name, seconds=round(seconds, 3))


def checkpoint_tensors(engine: Engine, optimizer: ShardedOptimizer) -> list[ShardedTensor]:
    """What a checkpoint holds beside the state: weights, selection biases, optimizer tensors."""
    return [shard.sharded() for shard in engine.shards] + optimizer.named_state()


def open_data(config: Config) -> tuple[BlendedDataset, BlendedDataset | None]:
    """Training and validation blends, with the checks that do not read the tokens. Raises DataError."""

    def blend(which: str, seed: int) -> BlendedDataset:
        return open_blend(
            getattr(config.data, which),
            sequence_length=config.batch.sequence_length,
            vocab_size=config.model.vocab_size,
            seed=seed,
            tokenizer=config.data.tokenizer,
        )

    return blend("train", config.run.seed), blend("valid", VALIDATION_SEED) if config.data.valid else None


def open_batches(config: Config, mesh: Mesh, data: BlendedDataset, *, consumed_samples: int) -> BatchIterator:
    """This rank's micro-batches of a layout, from a position in the global sample order on."""
    return BatchIterator(
        data, config.batch, dp_rank=mesh.data_rank, dp_size=mesh.data_size, consumed_samples=consumed_samples
    )


def _valid_bytes_per_token(config: Config, valid_data: BlendedDataset | None) -> float | None:
    if valid_data is None or not config.eval.every_steps:
        return None
    return bytes_per_token(valid_data, config.eval.batches * config.batch.global_batch_size)


def schedule_of(config: Config, state: TrainState) -> Schedules:
    """The learning rates of a run that has been through the growths of `state`."""
    return Schedules(Schedule.from_config(config.schedule, config.total_steps), tuple(rewarms(config, state.growths)))


@contextmanager
def restore_or_build(config: Config, meshes: Meshes, clock: RunClock) -> Iterator[tuple[Run, TrainState]]:
    """The run, brought to the newest valid checkpoint of its directory when there is one. Collective."""
    # Over the CPU: what ranks tell each other here are small host values.
    ranks = Ranks(dist.new_group(backend="gloo"))
    torch.manual_seed(config.run.seed)
    with ExitStack() as stack:
        # Before the directory is made: a missing dataset leaves nothing behind.
        with ranks.together():
            train_data, valid_data = open_data(config)
        is_main = ranks.rank == 0
        with ranks.together():
            if is_main:
                stack.enter_context(run_directory.locked(config.run.directory))
        damaged: list[str] = []
        durable: SimpleQueue[tuple[Path, float]] = SimpleQueue()
        checkpoints = _open_checkpoints(config, durable, damaged)
        newest = checkpoints.latest_valid()
        state = TrainState(data_fingerprint=train_data.fingerprint)
        changed: list[str] = []
        if newest:
            with ranks.together():
                state, changed = _read_state(newest, config, train_data)
        stage = stages(config)[len(state.growths)].config
        mesh = meshes.of(stage.parallel)
        engine = build_engine(stage, mesh)
        entry_ages = ages(history(config, state.growths)) if state.growths else None
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups, ages=entry_ages)
        if newest:
            _restore(newest, state, changed, engine=engine, optimizer=optimizer, ranks=ranks)
        with ranks.together():
            recorder = _recorder(config, state, clock) if is_main else None
            valid_bytes_per_token = _valid_bytes_per_token(config, valid_data) if is_main else None
        run = Run(
            written=config,
            config=stage,
            meshes=meshes,
            engine=engine,
            optimizer=optimizer,
            schedule=schedule_of(config, state),
            flops_per_token=count_flops(stage.model, config.batch.sequence_length).per_token,
            train_data=train_data,
            valid_data=valid_data,
            batches=open_batches(config, mesh, train_data, consumed_samples=state.samples),
            checkpoints=checkpoints,
            ranks=ranks,
            clock=clock,
            recorder=recorder,
            valid_bytes_per_token=valid_bytes_per_token,
            durable=durable,
        )
        with ranks.together():
            if recorder:
                stack.callback(recorder.close)
                _announce(run, state, newest, damaged=damaged, changed=changed)
        yield run, state
        checkpoints.wait()
        run.report_durable(state)


def _open_checkpoints(config: Config, durable: SimpleQueue[tuple[Path, float]], damaged: list[str]) -> Checkpoints:
    """The checkpoints of the run, which tell what became durable and what is damaged. Collective."""
    return Checkpoints(
        config.run.directory / run_directory.CHECKPOINTS,
        config.checkpoint,
        on_durable=lambda path, seconds: durable.put((path, seconds)),
        on_damaged=lambda path, findings: damaged.append(f"{path.name}: {'; '.join(findings)}"),
    )


def _read_state(path: Path, config: Config, train_data: BlendedDataset) -> tuple[TrainState, list[str]]:
    """(state, configuration keys that differ from its own) of a checkpoint that the run can go on from."""
    state = TrainState(**read_state(path))
    _check_resumable(path, state, config, train_data)
    return state, changed_keys(load_config(path / run_directory.CONFIG_FILE), config)


def _restore(
    path: Path,
    state: TrainState,
    changed: Sequence[str],
    *,
    engine: Engine,
    optimizer: ShardedOptimizer,
    ranks: Ranks,
) -> None:
    """Fill weights, optimizer and generator from a checkpoint; `changed` are the keys it was not written with."""
    tensors = checkpoint_tensors(engine, optimizer)
    left_out: tuple[str, ...] = ()
    with ranks.together():
        if optimizer.is_other(state.optimizer):
            # The weights alone; their states stay as they are at the start.
            tensors = [tensor for tensor in tensors if split_state_key(tensor.key)[0] in (None, "master")]
            left_out = (STATE_PREFIX,)
        else:
            optimizer.load_state_dict(state.optimizer)
    try:
        read_checkpoint(path, tensors, leave_out=left_out, group=ranks.group)
    except CheckpointError as error:
        # The tensors that do not fit follow from a few keys.
        causes = [change for change in changed if change.startswith(("model.", "optim.", "run.precision"))]
        raise CheckpointError("; ".join([*causes, str(error)])) from error
    optimizer.load_finished()
    torch.set_rng_state(torch.from_numpy(np.frombuffer(base64.b64decode(state.rng), dtype=np.uint8).copy()))


def _check_resumable(path: Path, state: TrainState, config: Config, train_data: BlendedDataset) -> None:
    if state.data_fingerprint != train_data.fingerprint:
        raise DataError(
            f"data.train: another blend, order or content than that of {path}, so its position {state.samples} means "
            f"other samples; restore the data (and run.seed), or start a new run.directory"
        )
    if state.step > config.total_steps:
        raise CheckpointError(
            f"budget: {config.total_steps} steps, but {path} has done {state.step} already; raise the budget"
        )
    check_history(config, state.growths, step=state.step, scores=state.scores, where=str(path))


def changed_keys(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key two configurations differ in, run.directory aside."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return out

    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "run.directory"]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _recorder(config: Config, state: TrainState, clock: RunClock) -> Recorder:
    recorder = Recorder(
        config.run.directory,
        metrics=config.metrics,
        config=config.model_dump(mode="json"),
        total_steps=config.total_steps,
        restored_step=state.step,
        tracker_id=state.recorder.get("tracker_id"),
    )
    if state.clock:
        clock.load_state_dict(state.clock, last_alive=recorder.last_alive)
    return recorder


def _announce(
    run: Run, state: TrainState, newest: Path | None, *, damaged: Sequence[str], changed: Sequence[str]
) -> None:
    """Write down what starts, and say it on the terminal. Rank 0."""
    config, directory = run.config, run.config.run.directory
    parameters = count_parameters(config.model)
    run_directory.write_atomically(directory / run_directory.CONFIG_FILE, dump_config(run.written))
    run_directory.write_manifest(
        directory,
        world_size=run.mesh.world_size,
        device=str(run.mesh.device),
        parameters={"total": parameters.total, "active": parameters.active},
    )
    for problem in damaged:
        run.event("damaged_checkpoint", state, problem=problem)
    assert run.recorder
    if newest:
        run.event("restart", state, checkpoint=newest.name, changed=list(changed))
        print(f"resumed from {newest} at step {state.step} of {config.total_steps}")
        for change in changed:
            print(f"  changed since: {change}")
        if (
            state.growths
            and state.growths[-1]["step"] == state.step
            and not run.recorder.has_event("growth", step=state.step)
        ):
            # The run was killed between the checkpoint after its growth and the event.
            run.event("growth", state, **state.growths[-1].get("figures", {}), checkpoint=newest.name)
    elif run.recorder.last_step:
        run.event("restart", state, checkpoint=None)
        print(f"no checkpoint: what was logged up to step {run.recorder.last_step} is done again from the start")
    else:
        run.event("start", state)
    print(
        f"{parameters.total / 1e6:,.2f} M parameters, {parameters.active / 1e6:,.2f} M active per token; "
        f"{run.flops_per_token / 1e6:,.1f} MFLOPs per token; "
        f"{config.total_steps} steps of {config.batch.tokens_per_step:,} tokens"
    )
    if config.model.is_moe:
        print(f"experts: {choose_experts_backend(config.model, config.parallel, config.run.precision)}")
    print(describe_routes(logical_tensors(config.model), config.optim))
