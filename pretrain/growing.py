"""Growing a run between two of its steps.

A growth is a transaction: a checkpoint of the old model, then the new one, then its checkpoint. Whenever a run is
killed, the newest checkpoint is either of the old model, and the run grows again, to the same bytes, or of the grown
one, and it goes on.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.checkpoint.steps import Moment
from pretrain.config.stages import describe_growth, growth_step, preserves_function, stages
from pretrain.data.batches import validation_batches
from pretrain.errors import CheckpointError
from pretrain.growth.history import history, next_growth, record_of
from pretrain.growth.live import grow_model, moving_tensors
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.pull import Traffic
from pretrain.growth.scores import add_scores, no_scores, utility_due
from pretrain.model.counts import count_flops, count_parameters
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
    """The growth that comes before the next step, if one does. Raises CheckpointError when it cannot be done."""
    done = len(state.growths)
    if done == len(run.written.growth) or growth_step(run.written, run.written.growth[done]) != state.step:
        return None
    return _next(run, state)


def note_scores(run: Run, state: TrainState) -> None:
    """Add this step's gradients to the utility of the experts, when the next growth goes by it. Collective."""
    if utility_due(run.written, len(state.growths), state.step + 1):
        model = run.config.model
        state.scores = state.scores or no_scores(model.moe_layers, model.num_experts)
        add_scores(state.scores, run.engine.shards, model.num_experts)
        state.scored_steps += 1


def grow(run: Run, point: GrowthPoint, state: TrainState) -> None:
    """Grow the model, its optimizer and, if asked to, change the layout; then write a checkpoint. Collective.

    A checkpoint of this step must be durable already: the old model is gone when the new one is filled.
    """
    with run.clock.phase("growth"):
        started, memory = time.monotonic(), PeakMemory(run.mesh.device)
        before = _read(run)
        moved_at = time.monotonic()
        traffic = _replace(run, point, state)
        moved_seconds, extra_bytes = time.monotonic() - moved_at, memory.extra_bytes()
        after = _read(run)
        figures = _figures(run, point, before, after)
        state.growths[-1]["figures"] = figures
        run.save(state, grown=True)
        run.checkpoints.wait()
        run.report_durable(state)
        cost = {
            "seconds": round(time.monotonic() - started, 3),
            "move_seconds": round(moved_seconds, 3),
            "extra_memory_bytes": extra_bytes,
            "moved_bytes": traffic.received_bytes,
            "local_bytes": traffic.local_bytes,
        }
        run.event("growth", state, **figures, **cost, checkpoint=Moment(state.step, grown=True).name)
    if run.recorder:
        print(_block(point, figures, cost), flush=True)


def _next(run: Run, state: TrainState) -> GrowthPoint:
    done = len(state.growths)
    experts = run.written.growth[done].experts
    if experts and experts.utility and state.scored_steps == 0:
        raise CheckpointError(
            f"growth[{done}].experts.utility: the run has not measured its experts in the {experts.utility.steps} "
            f"steps before step {state.step}; go on from an older checkpoint, or grow later"
        )
    return next_growth(run.written, done, scores=state.scores)


def _replace(run: Run, point: GrowthPoint, state: TrainState) -> Traffic:
    """Put the grown model in the place of the old one."""
    stage = stages(run.written)[point.number].config
    counter = run.optimizer.state_dict()
    old = moving_tensors(run.engine.shards, run.optimizer)
    # Only what moves stays: gradients, copies of other ranks' weights and low-precision weights make room.
    del run.engine, run.optimizer
    gc.collect()
    state.growths.append(record_of(point, state.step))
    state.scores, state.scored_steps = {}, 0
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


def _figures(run: Run, point: GrowthPoint, before: Reading, after: Reading) -> dict[str, Any]:
    """What a growth did, for the log."""
    positions = min(before.logits.shape[1], after.logits.shape[1])
    old, new = before.logits[:, :positions], after.logits[:, :positions]
    length = run.config.batch.sequence_length
    small, large = count_parameters(point.before), count_parameters(point.after)
    return {
        "summary": describe_growth(point.before, point.config),
        "preserves_function": preserves_function(point.config),
        "parameters_before": small.total,
        "parameters_after": large.total,
        "active_before": small.active,
        "active_after": large.active,
        "flops_per_token_before": count_flops(point.before, length).per_token,
        "flops_per_token_after": count_flops(point.after, length).per_token,
        "valid_loss_before": before.valid_loss,
        "valid_loss_after": after.valid_loss,
        "logits_change": float((new - old).abs().max() / old.abs().max()),
        "state": point.config.optimizer_state,
    }


def _block(point: GrowthPoint, figures: dict[str, Any], cost: dict[str, Any]) -> str:
    """The growth in a few lines for the terminal."""
    kept = {
        "asymmetric": "old entries keep their state, new ones start at zero",
        "reset": "starts at zero, the step count too",
        "copy": "new entries have a copy of their source's state",
        "exact": "new entries have their source's state, scaled",
    }[point.config.optimizer_state]
    rewarm = point.config.rewarm
    if rewarm:
        kept += f"; {rewarm.entries} entries re-warm to {rewarm.ratio:g} x in {rewarm.steps} steps"
    loss = "no validation data"
    if figures["valid_loss_before"] is not None:
        loss = f"{figures['valid_loss_before']:.4f} -> {figures['valid_loss_after']:.4f}"
    expected = "function preserved by design" if figures["preserves_function"] else "function not preserved by design"
    moved = (cost["moved_bytes"] + cost["local_bytes"]) / 2**20

    def change(name: str, unit: float) -> str:
        return f"{figures[name + '_before'] / unit:,.2f} -> {figures[name + '_after'] / unit:,.2f}"

    return "\n".join(
        [
            f"growth {point.number}: {figures['summary']}",
            f"  parameters   {change('parameters', 1e6)} M, active {change('active', 1e6)} M",
            f"  FLOPs/token  {change('flops_per_token', 1e6)} M",
            f"  valid loss   {loss}",
            f"  logits       changed by {figures['logits_change']:.1e} of the largest ({expected})",
            f"  optimizer    {kept}",
            f"  took         {cost['seconds']:.1f} s, {cost['move_seconds']:.1f} s of it to move {moved:,.1f} MiB "
            f"here; {cost['extra_memory_bytes'] / 2**20:,.0f} MiB of extra memory",
        ]
    )
