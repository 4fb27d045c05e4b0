"""How a run begins: built anew, or brought to the newest valid checkpoint of its directory."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
import torch.distributed as dist

from pretrain import run_directory
from pretrain.checkpoint import Checkpoints, read_checkpoint, read_state
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.load import changed_keys, dump_config, load_config
from pretrain.config.ownership import trained_experts
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.data.dataset import BlendedDataset
from pretrain.data.text_bytes import bytes_per_token
from pretrain.decentral.outer import Nesterov
from pretrain.errors import CheckpointError, DataError
from pretrain.growth.history import check_history
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.throughput import RunClock
from pretrain.model.build import choose_experts_backend
from pretrain.model.counts import count_flops, count_parameters
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import describe_routes
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import STATE_PREFIX, split_state_key
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Meshes
from pretrain.run import (
    NO_ROUNDS,
    Run,
    TrainState,
    checkpoint_tensors,
    entry_ages,
    open_batches,
    open_data,
    outer_of,
    schedule_of,
)

# Keys that decide which tensors a checkpoint has, and how much of them.
SHAPING = ("model.", "optim.", "run.precision", "decentral.kind", "decentral.site")


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
                stack.enter_context(run_directory.locked(config.site_directory))
        damaged: list[str] = []
        durable: SimpleQueue[tuple[Path, float]] = SimpleQueue()
        checkpoints = _open_checkpoints(config, durable, damaged)
        newest = checkpoints.latest_valid()
        state = TrainState(data_fingerprint=train_data.fingerprint, decentral=NO_ROUNDS if config.decentral else {})
        changed: list[str] = []
        if newest:
            with ranks.together():
                state, changed = _read_state(newest, config, train_data)
        stage = stages(config)[len(state.growths)].config
        mesh = meshes.of(stage.parallel)
        engine = build_engine(stage, mesh, trained=trained_experts(stage, state.decentral.get("dropped", ())))
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups, ages=entry_ages(config, state))
        outer = outer_of(stage, optimizer)
        if newest:
            _restore(newest, state, changed, engine=engine, optimizer=optimizer, outer=outer, ranks=ranks)
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
            outer=outer,
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
        config.site_directory / run_directory.CHECKPOINTS,
        config.checkpoint,
        on_durable=lambda path, seconds: durable.put((path, seconds)),
        on_damaged=lambda path, findings: damaged.append(f"{path.name}: {'; '.join(findings)}"),
    )


def _read_state(path: Path, config: Config, train_data: BlendedDataset) -> tuple[TrainState, list[str]]:
    """(state, configuration keys that differ from its own) of a checkpoint that the run can go on from."""
    state = TrainState(**read_state(path))
    if config.decentral:
        state.decentral = NO_ROUNDS | state.decentral
    _check_resumable(path, state, config, train_data)
    return state, changed_keys(load_config(path / run_directory.CONFIG_FILE), config)


def _restore(
    path: Path,
    state: TrainState,
    changed: Sequence[str],
    *,
    engine: Engine,
    optimizer: ShardedOptimizer,
    outer: Nesterov | None,
    ranks: Ranks,
) -> None:
    """Fill weights, optimizer and generator from a checkpoint; `changed` are the keys it was not written with."""
    has_outer = outer is not None and state.decentral["outer"]
    tensors = checkpoint_tensors(engine, optimizer, outer if has_outer else None)
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
        causes = [change for change in changed if change.startswith(SHAPING)]
        raise CheckpointError("; ".join([*causes, str(error)])) from error
    optimizer.load_finished()
    if outer and not has_outer:
        outer.begin_again()
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
    _check_outer(path, state, config)
    check_history(config, state.growths, step=state.step, scores=state.scores, where=str(path))


def _check_outer(path: Path, state: TrainState, config: Config) -> None:
    """An outer optimizer that the checkpoint has not begins at its weights, which must be those of all sites."""
    decentral = config.decentral
    if decentral is None or decentral.outer_rule == "average" or state.decentral["outer"]:
        return
    if state.decentral["round_step"] != state.step:
        raise CheckpointError(
            f'decentral.outer = "{decentral.outer}": an outer optimizer begins at weights that all sites have in '
            f'common, and {path} was written between rounds; go on with "average" to a checkpoint of a round '
            f"(checkpoint.every_steps a multiple of decentral.sync_every_steps), and change it there"
        )


def _valid_bytes_per_token(config: Config, valid_data: BlendedDataset | None) -> float | None:
    if valid_data is None or not config.eval.every_steps:
        return None
    return bytes_per_token(valid_data, config.eval.batches * config.batch.global_batch_size)


def _recorder(config: Config, state: TrainState, clock: RunClock) -> Recorder:
    recorder = Recorder(
        config.site_directory,
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
    config, directory = run.config, run.config.site_directory
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
