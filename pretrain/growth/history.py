"""The growths a run has been through: what its checkpoints note of them, and whether a configuration agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.checkpoint.steps import Moment
from pretrain.config.growth import GrowthConfig
from pretrain.config.schema import Config
from pretrain.config.stages import describe_growth, growth_step, preserves_function, stages
from pretrain.errors import CheckpointError
from pretrain.growth.maps import GrowthPoint, share_copies
from pretrain.growth.scores import Scores
from pretrain.model.counts import count_flops, count_parameters
from pretrain.model.logical import logical_tensors
from pretrain.optim.schedule import Rewarm

Record = Mapping[str, Any]
"""JSON of one growth that is done: `step`, `parent` (name of the checkpoint before), `growth` (its configuration),
`copies` (MoE layer -> copies of each expert, where they were chosen by utility), `model` (as grown, in full); a run and
`pretrain grow` add `figures`, the fields of its event that are known when the checkpoint is written."""


def record_of(point: GrowthPoint, step: int) -> dict[str, Any]:
    """What a checkpoint notes of a growth after `step` steps."""
    return {
        "step": step,
        "parent": Moment(step).name,
        "growth": _dump(point.config),
        "copies": {str(layer): list(counts) for layer, counts in point.copies.items()},
        "model": point.after.model_dump(mode="json"),
    }


def growth_figures(point: GrowthPoint, *, sequence_length: int) -> dict[str, Any]:
    """Fields of the event that are known without doing the growth."""
    small, large = count_parameters(point.before), count_parameters(point.after)
    return {
        "summary": describe_growth(point.before, point.config),
        "preserves_function": preserves_function(point.config),
        "parameters_before": small.total,
        "parameters_after": large.total,
        "active_before": small.active,
        "active_after": large.active,
        "flops_per_token_before": count_flops(point.before, sequence_length).per_token,
        "flops_per_token_after": count_flops(point.after, sequence_length).per_token,
        "state": point.config.optimizer_state,
    }


def history(config: Config, records: Sequence[Record]) -> tuple[GrowthPoint, ...]:
    """The growths that are done, in order."""
    run = stages(config)
    return tuple(
        GrowthPoint(
            number=number,
            config=config.growth[number - 1],
            before=run[number - 1].config.model,
            after=run[number].config.model,
            copies={int(layer): counts for layer, counts in record["copies"].items()},
        )
        for number, record in enumerate(records, start=1)
    )


def next_growth(config: Config, done: int, *, scores: Mapping[str, Sequence[float]]) -> GrowthPoint:
    """Growth number `done` + 1. `scores`: MoE layer -> utility of each expert, for growths that go by it.

    Raises ValueError, before anything has changed, for a tensor that growth has no map for.
    """
    run, growth = stages(config), config.growth[done]
    utility = growth.experts.utility if growth.experts else None
    copies = {}
    if utility and growth.experts:
        copies = {
            int(layer): share_copies(values, growth.experts.factor, utility.max_copies)
            for layer, values in scores.items()
        }
    point = GrowthPoint(done + 1, growth, run[done].config.model, run[done + 1].config.model, copies)
    for tensor in logical_tensors(point.after):
        point.tensor_map(tensor)
    return point


def rewarms(config: Config, records: Sequence[Record]) -> list[Rewarm | None]:
    """The learning-rate curves that the growths so far began."""
    found: list[Rewarm | None] = []
    for growth, record in zip(config.growth, records, strict=False):
        rewarm = growth.rewarm
        found.append(
            Rewarm(
                step=record["step"],
                ratio=rewarm.ratio,
                steps=rewarm.steps,
                start=rewarm.start,
                all_entries=rewarm.entries == "all",
            )
            if rewarm
            else None
        )
    return found


def check_history(config: Config, records: Sequence[Record], *, step: int, scores: Scores, where: str) -> None:
    """Whether a checkpoint, named `where`, can go on under a configuration. Raises CheckpointError.

    It must have been grown by the configuration's own growth points so far, and not be past the next one; if that is
    due now and goes by the utility of experts, it must have measured them.
    """
    if len(records) > len(config.growth):
        raise CheckpointError(
            f"growth: {len(config.growth)} points, but {where} has grown {len(records)} times already; list the "
            "points of its own configuration, or go back to an older checkpoint"
        )
    for index, (growth, record) in enumerate(zip(config.growth, records, strict=False)):
        now, then = _dump(growth), record["growth"]
        changed = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key) and key != "parallel"]
        if changed:
            changes = ", ".join(f"{key}: {then.get(key)} -> {now.get(key)}" for key in changed)
            raise CheckpointError(
                f"growth[{index}]: {where} has been through it already, with other keys ({changes}); restore them, or "
                "go back to an older checkpoint"
            )
    if len(records) < len(config.growth):
        growth = config.growth[len(records)]
        due = growth_step(config, growth)
        if due == step and growth.experts and growth.experts.utility and not scores:
            steps = growth.experts.utility.steps
            raise CheckpointError(
                f"growth[{len(records)}].experts.utility: {where} has not measured its experts in the {steps} steps "
                f"before it; train them with this growth in the configuration, or grow later"
            )
        if due < step:
            raise CheckpointError(
                f"growth[{len(records)}]: due at step {due}, but {where} is at step {step} and has not been through "
                f"it; grow at step {step} or later, or go back to an older checkpoint"
            )


def _dump(growth: GrowthConfig) -> dict[str, Any]:
    return growth.model_dump(mode="json", exclude_none=True)
