"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from pretrain.config.rules import check, check_runnable
from pretrain.config.schema import Config
from pretrain.errors import ConfigError, UserError
from pretrain.growing import grow, growth_due, note_scores
from pretrain.metrics.rows import TrainRow, ValidRow
from pretrain.metrics.throughput import RunClock, memory_bytes, rates
from pretrain.optim.routing import check_routes
from pretrain.optim.sharded import StepResult
from pretrain.parallel.engine import Batch
from pretrain.parallel.mesh import Meshes, forget_mesh
from pretrain.parallel.probe import probe_passes
from pretrain.parallel.routing_stats import (
    aux_losses,
    copy_selection_biases,
    expert_load,
    reset_routing_stats,
    restore_selection_biases,
    selection_bias,
)
from pretrain.platform import distributed
from pretrain.restore import restore_or_build
from pretrain.run import Run, TrainState
from pretrain.signals import DONE, REQUEUE, graceful_stop
from pretrain.syncing import meeting, round_is_due


def train(config: Config) -> int:
    """Train to the end of the budget, or to a request to stop; returns the exit code.

    Goes on from the newest valid checkpoint of the run directory. Call on every process of the job.
    """
    clock = RunClock()
    with (
        started(config) as meshes,
        graceful_stop() as stop,
        restore_or_build(config, meshes, clock) as (run, state),
    ):
        saved = moment(state)  # before sites meet, which may bring a round that is in no checkpoint, or later steps
        with meeting(run, state, lambda: stop.signal is not None) as after_step:
            clock.begin_steps()
            while state.step < config.total_steps and not stop.agree(run.mesh.device):
                if point := growth_due(run, state):
                    if saved != moment(state):
                        save(run, state)
                    run.checkpoints.wait()
                    grow(run, point, state)
                    saved = moment(state)
                after_step(train_step(run, state))
                if is_due(config.eval.every_steps, state, config):
                    log_evaluation(run, state)
                if is_due(config.checkpoint.every_steps, state, config):
                    saved = save(run, state)
            if saved != moment(state) or state.step == 0:
                save(run, state)
            is_finished = state.step >= config.total_steps and not round_is_due(config, state)
            run.event("finished" if is_finished else "stopped", state, signal=stop.signal)
            run.event("goodput", state, **clock.goodput())
            return DONE if is_finished else REQUEUE


def moment(state: TrainState) -> tuple[int, int | None]:
    """What tells two checkpoints of a run apart: the step, and the step of the last round with other sites."""
    return state.step, state.decentral.get("round_step")


@contextmanager
def started(config: Config) -> Iterator[Meshes]:
    """This process as part of the job, with everything the configuration can tell checked; layouts end with it."""
    problems = check(config, distributed.world_size()) or check_routes(config)
    problems += check_runnable(config)
    if problems:
        raise ConfigError(problems)
    with distributed.joined() as device:
        meshes = Meshes(device)
        try:
            yield meshes
        except BaseException:
            # Other ranks may be anywhere: nothing that they would have to do, too.
            forget_mesh()
            raise
        meshes.close()


def is_due(every_steps: int, state: TrainState, config: Config) -> bool:
    """Whether something that happens every so many steps (0: never), and at the end, happens after this one."""
    return every_steps > 0 and (state.step % every_steps == 0 or state.step == config.total_steps)


def train_step(run: Run, state: TrainState) -> float:
    """Train on one global batch and log it; returns its loss. Collective."""
    batch = next_batch(run)
    estimate_curvature(run, state, batch)
    reset_routing_stats(run.engine)
    biases = copy_selection_biases(run.engine)
    loss = float(run.engine.forward_backward(iter(batch)))
    note_scores(run, state)
    result = run.optimizer.step(run.schedule.lr_ratio(state.step + 1), run.schedule.newer(state.step + 1))
    state.advance(run.config, run.flops_per_token)
    if result.skipped:
        restore_selection_biases(run.engine, biases)
    note_skip(run, state, result)
    run.clock.end_step(kept=not result.skipped)
    log_step(run, state, loss, result)
    return loss


def estimate_curvature(run: Run, state: TrainState, batch: Sequence[Batch]) -> None:
    """Where the optimizer wants it, show it the gradients around the weights before it moves them. Collective."""
    if run.optimizer.wants_curvature:
        with probe_passes(run.engine, batch) as backward:
            curvature = run.optimizer.estimate_curvature(backward, seed=run.config.run.seed)
        run.event("curvature", state, **asdict(curvature))


def next_batch(run: Run) -> list[Batch]:
    """This rank's micro-batches of the next global batch, on the device."""
    with run.clock.phase("data"):
        batch = [next(run.batches) for _ in range(run.engine.microbatches)]
        return [{name: tensor.to(run.mesh.device) for name, tensor in micro.items()} for micro in batch]


def note_skip(run: Run, state: TrainState, result: StepResult) -> None:
    """Count steps skipped in a row; give up when there are too many. All ranks see the same result."""
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
    if result.skipped:
        run.event("skip", state, grad_norm=str(result.grad_norm))
    limit = run.config.optim.max_skipped_steps
    if state.skipped_in_a_row > limit:
        run.event("diverged", state)
        raise UserError(
            f"optim.max_skipped_steps = {limit}: step {state.step} is the {state.skipped_in_a_row}th in a row with a "
            f"gradient that is not finite; lower optim.lr, lengthen schedule.warmup_steps, or go back to an earlier "
            f"checkpoint"
        )


def log_step(run: Run, state: TrainState, loss: float, result: StepResult) -> None:
    """Move the progress line and, when one is due, write a row. Collective."""
    config, clock = run.config, run.clock
    last = clock.last_step_seconds
    if run.recorder:
        run.recorder.step(
            state.step,
            loss=loss,
            step_seconds=last,
            tokens_per_second=config.site_tokens_per_step / last,
            skipped=result.skipped,
        )
    run.report_durable(state)
    if state.step % config.metrics.log_every_steps and state.step != config.total_steps:
        return
    moe = {}
    if config.model.is_moe:
        load = expert_load(run.engine, config.model)
        moe = run.balance.add(load, bias=selection_bias(run.engine, config.model))
    losses = aux_losses(run.engine, config.model)
    figures = rates(
        clock.take_interval(),
        tokens_per_step=config.site_tokens_per_step,
        flops_per_step=float(run.flops_per_token) * config.site_tokens_per_step,
        devices=run.mesh.world_size,
        peak_tflops=config.metrics.peak_tflops,
    )
    if run.recorder:
        run.recorder.train(
            TrainRow(
                step=state.step,
                tokens=state.tokens,
                flops=state.flops,
                loss=loss,
                lr=config.optim.lr * run.schedule.lr_ratio(state.step),
                lr_new=[config.optim.lr * ratio for ratio in run.schedule.newer(state.step)],
                grad_norm=result.grad_norm,
                skipped=result.skipped,
                memory_bytes=memory_bytes(run.mesh.device),
                aux_losses=losses,
                moe=moe,
                **figures,
            )
        )


def log_evaluation(run: Run, state: TrainState) -> None:
    """Loss on the validation batches, always the same ones. Collective."""
    if run.valid_data is None:
        return
    with run.clock.phase("eval"):
        loss = run.valid_loss()
    if run.recorder:
        bytes_per_token = run.valid_bytes_per_token
        run.recorder.valid(
            ValidRow(
                step=state.step,
                tokens=state.tokens,
                flops=state.flops,
                valid_loss=loss,
                valid_bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
            )
        )


def save(run: Run, state: TrainState) -> tuple[int, int | None]:
    """Write a checkpoint; returns its moment."""
    with run.clock.phase("save"):
        run.save(state)
    run.report_durable(state)
    return moment(state)
