"""Growing a run between two of its steps.

A growth is a transaction: a checkpoint of the old model, then the new one, then its checkpoint. Whenever a run is
killed, the newest checkpoint is either of the old model, and the run grows again, to the same bytes, or of the grown
one, and it goes on.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.checkpoint.steps import Moment
from pretrain.config.stages import describe_rewarm, describe_state, growth_step, stages
from pretrain.data.batches import validation_batches
from pretrain.growth.history import growth_figures, history, next_growth, record_of
from pretrain.growth.live import grow_model, moving_tensors
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.pull import Traffic
from pretrain.growth.scores import add_scores, no_scores, utility_due
from pretrain.model.counts import count_flops
from pretrain.platform.memory import PeakMemory
from pretrain.run import Run, TrainState, open_batches, schedule_of

# Positions of one micro-batch whose logits are compared before and after.
PROBED_POSITIONS = 64


@dataclass(frozen=True)
class Reading:
    """What the model does at one moment."""

    valid_loss: float | None
    """Nats per token; None without validation data."""
    logits: torch.Tensor


def growth_due(run: Run, state: TrainState) -> GrowthPoint | None:
    """The growth that comes before the next step, if one does."""
    done = len(state.growths)
    if done == len(run.written.growth) or growth_step(run.written, run.written.growth[done]) != state.step:
        return None
    return next_growth(run.written, done, scores=state.scores)


def note_scores(run: Run, state: TrainState) -> None:
    """Add this step's gradients to the utility of the experts, when the next growth goes by it. Collective."""
    if utility_due(run.written, len(state.growths), state.step + 1):
        model = run.config.model
        state.scores = state.scores or no_scores(model.moe_layers, model.num_experts)
        add_scores(state.scores, run.engine.shards, model.num_experts)


def grow(run: Run, point: GrowthPoint, state: TrainState) -> None:
    """Grow the model, its optimizer and, if asked to, change the layout; then write a checkpoint. Collective.

    A checkpoint of this step must be durable already: the old model is gone when the new one is filled.
    """
    figures = growth_figures(point, sequence_length=run.config.batch.sequence_length)
    run.event("growing", state, summary=figures["summary"], checkpoint=Moment(state.step).name)
    with run.clock.phase("growth"):
        started = time.monotonic()
        before = _read(run)
        moved_at, memory = time.monotonic(), PeakMemory(run.mesh.device)
        traffic = _replace(run, point, state)
        moved_seconds, extra_bytes = time.monotonic() - moved_at, memory.extra_bytes()
        figures |= _changes(before, _read(run))
        # As JSON, which has no word for numbers that are not finite.
        state.growths[-1]["figures"] = {name: value for name, value in figures.items() if _is_json(value)}
        run.save(state, grown=True)
        run.checkpoints.wait()
        run.report_durable(state)
        cost = {
            "seconds": round(time.monotonic() - started, 3),
            "move_seconds": round(moved_seconds, 3),
            "moved_bytes": traffic.received_bytes,
            "local_bytes": traffic.local_bytes,
        }
        if extra_bytes is not None:
            cost["extra_memory_bytes"] = extra_bytes
        run.event("growth", state, **figures, **cost, checkpoint=Moment(state.step, grown=True).name)
    if run.recorder:
        print(_block(point, figures, cost), flush=True)


def _replace(run: Run, point: GrowthPoint, state: TrainState) -> Traffic:
    """Put the grown model in the place of the old one."""
    stage = stages(run.written)[point.number].config
    counter = run.optimizer.state_dict()
    old = moving_tensors(run.engine.shards, run.optimizer)
    # Only what moves stays: gradients, copies of other ranks' weights and low-precision weights make room.
    del run.engine, run.optimizer
    gc.collect()
    state.growths.append(record_of(point, state.step))
    state.scores = {}
    done = history(run.written, state.growths)
    grown = grow_model(done, old, stage, run.meshes.of(stage.parallel), optimizer_state=counter, ranks=run.ranks)
    run.engine, run.optimizer, run.config = grown.engine, grown.optimizer, stage
    run.schedule = schedule_of(run.written, state)
    run.flops_per_token = count_flops(stage.model, stage.batch.sequence_length).per_token
    run.batches = open_batches(stage, run.mesh, run.train_data, consumed_samples=state.samples)
    return grown.traffic


def _read(run: Run) -> Reading:
    """Validation loss and the logits of one micro-batch, the same one whatever the layout. Collective."""
    batch, device = run.config.batch, run.mesh.device
    data = run.valid_data or run.train_data
    probe = next(iter(validation_batches(data, batch, batches=1, dp_rank=0, dp_size=1)))
    positions = min(PROBED_POSITIONS, batch.sequence_length // (2 * run.config.parallel.context))
    logits = run.engine.logits({name: tensor.to(device) for name, tensor in probe.items()}, positions)
    return Reading(run.valid_loss() if run.valid_data else None, logits.cpu())


def _changes(before: Reading, after: Reading) -> dict[str, float]:
    """What a growth did to what the model computes, for the log."""
    positions = min(before.logits.shape[1], after.logits.shape[1])
    old, new = before.logits[:, :positions], after.logits[:, :positions]
    changes = {"logits_change": float((new - old).abs().max() / old.abs().max())}
    if before.valid_loss is not None and after.valid_loss is not None:
        changes |= {"valid_loss_before": before.valid_loss, "valid_loss_after": after.valid_loss}
    return changes


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _block(point: GrowthPoint, figures: dict[str, Any], cost: dict[str, Any]) -> str:
    """The growth in a few lines for the terminal."""
    loss = "no validation data"
    if "valid_loss_before" in figures:
        loss = f"{figures['valid_loss_before']:.4f} -> {figures['valid_loss_after']:.4f}"
    expected = "function preserved by design" if figures["preserves_function"] else "function not preserved by design"
    moved = (cost["moved_bytes"] + cost["local_bytes"]) / 2**20
    extra = "extra memory not measured"
    if "extra_memory_bytes" in cost:
        extra = f"{cost['extra_memory_bytes'] / 2**20:,.0f} MiB of extra memory"

    def change(name: str, unit: float) -> str:
        return f"{figures[name + '_before'] / unit:,.2f} -> {figures[name + '_after'] / unit:,.2f}"

    return "\n".join(
        [
            f"growth {point.number}: {figures['summary']}",
            f"  parameters   {change('parameters', 1e6)} M, active {change('active', 1e6)} M",
            f"  FLOPs/token  {change('flops_per_token', 1e6)} M",
            f"  valid loss   {loss}",
            f"  logits       changed by {figures['logits_change']:.1e} of the largest ({expected})",
            f"  optimizer    {describe_state(point.config)}",
            f"  rates        learning rate {describe_rewarm(point.config.rewarm)}",
            f"  took         {cost['seconds']:.1f} s, {cost['move_seconds']:.1f} s of it to move {moved:,.1f} MiB "
            f"here; {extra}",
        ]
    )
