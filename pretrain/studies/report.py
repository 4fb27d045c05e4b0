"""The report of the study in words and tables, every one of them computed from the runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config.schema import Config
from pretrain.data.baselines import Baselines
from pretrain.metrics.formats import count, flop_count
from pretrain.model.counts import count_flops, count_parameters
from pretrain.studies.arms import ARMS, EIGHTHS, SMALL, SWEEP_SHARE, Arm, Family, arm_named, from_scratch, growth_step
from pretrain.studies.claims import LOCKED_DISTANCE, MARGIN_SHARE, Judged, Losses, judge
from pretrain.studies.pictures import TITLES
from pretrain.studies.results import Outcome
from pretrain.studies.statistics import Spread, difference, gap_closed, spread
from pretrain.tuning.markdown import table

NONE = "-"
Sweep = Mapping[Family, Mapping[float, float]]
"""Size -> peak learning rate -> validation loss."""
FINAL_PICTURE, CURVES_PICTURE = "final_loss.png", "curves.png"


@dataclass(frozen=True)
class Study:
    """All that the report tells of."""

    base: Config
    """The small model's configuration."""
    configs: Mapping[str, Config]
    """Arm -> configuration of its first seed."""
    outcomes: Mapping[str, Sequence[Outcome]]
    sweep: Sweep
    """What the sweep of the peak learning rate came to, at a share of the steps."""
    baselines: Baselines
    command: Sequence[str]
    """Words that repeat the study."""
    machine: Mapping[str, str]
    """What it ran on: name -> value."""

    @property
    def losses(self) -> Losses:
        """Final validation losses: arm -> seed -> nats per token."""
        return {name: {one.seed: one.loss for one in found} for name, found in self.outcomes.items()}

    @property
    def seeds(self) -> list[int]:
        return [one.seed for one in self.outcomes[SMALL]]


def markdown(study: Study) -> str:
    """README.md of the study."""
    judged = judge(study.losses)
    return (
        "\n\n".join(
            [
                "# Does growth work?",
                _setting(study),
                "## What holds here",
                summary(study),
                _claims_table(judged),
                HOW_TO_READ,
                *[part for family in TITLES for part in (f"## {TITLES[family]}", _family_table(study, family))],
                COLUMNS,
                f"![Final losses]({FINAL_PICTURE})",
                f"![Curves]({CURVES_PICTURE})",
                "## Learning rates",
                _sweep_text(study),
                _sweep_table(study.sweep),
                "## Do copies stay copies?",
                _twins_text(study),
                _twins_table(study),
            ]
        )
        + "\n"
    )


HOW_TO_READ = f"""\
*Difference* is the second arm's final validation loss less the first's, in nats per token, by seed: arms of one seed
share their data and, if they grow, the run before the growth. In brackets stands its 95 % confidence interval
(Student's t). *Reproduced* and *not reproduced* need the whole interval on one side: of zero for an order; for
equality, within or outside +- the margin, {MARGIN_SHARE:.0%} of the gap between the small model and the final size from
scratch. All else is *not resolved*: the noise of these seeds hides it. The verdicts are not corrected for their
number."""

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon on hidden matrices, AdamW on the rest"}
"""Optimizers that the study's model may have, in words."""

COLUMNS = """\
Losses: mean over seeds +- standard deviation of one seed, at the end, on the same validation batches for all. Gap
closed: share of the way from the small model to the final size from scratch, by seed. FLOPs: model FLOPs of all
training, what came before a growth included. Growth: mean validation loss right before and right after."""


def _setting(study: Study) -> str:
    base, small = study.base, study.outcomes[SMALL][0]
    at = growth_step(base, next(arm for arm in ARMS if arm.grows))
    machine = "; ".join(f"{name} {value}" for name, value in study.machine.items())
    return "\n".join(
        [
            "Written by",
            "",
            f"    {shlex.join(study.command)}",
            "",
            f"on {machine}.",
            "",
            f"A small mixture of experts ({_size(base)}) on the sources of Python's standard library: {small.steps:,} "
            f"steps of {base.batch.tokens_per_step:,} tokens, {count(small.tokens)} in all; seeds "
            f"{', '.join(map(str, study.seeds))}. It grows after step {at:,}, where nothing else is said, and goes on "
            f"with its data, schedule and peak learning rate. {OPTIMIZERS[base.optim.kind]}, {base.schedule.kind} to "
            f"{base.schedule.min_lr_ratio:.0%} of the peak. A bigram model of the same tokens reaches "
            f"{study.baselines.bigram_nats_per_token:.3f} nats per token "
            f"({study.baselines.bigram_bits_per_byte:.3f} bits per byte), a unigram model "
            f"{study.baselines.unigram_nats_per_token:.3f}.",
        ]
    )


def _sweep_text(study: Study) -> str:
    """Where the peaks come from, and a warning where the best of them is the last that was tried."""
    at_edge = [
        _size_name(family) for family, found in study.sweep.items() if best_rate(found) in (min(found), max(found))
    ]
    warning = f" Best at an end of what was tried, so that a better one may lie beyond: {', '.join(at_edge)}."
    return (
        f"Validation loss after {SWEEP_SHARE:.0%} of the steps, with a schedule of that length and another seed, by "
        "peak learning rate. The arms from scratch have the best peak of their size; whatever grows has that of the "
        f"small model throughout.{warning if at_edge else ''}"
    )


def _sweep_table(sweep: Sweep) -> str:
    rates = sorted({rate for found in sweep.values() for rate in found})
    rows = [[_size_name(family), *(_swept_loss(found, rate) for rate in rates)] for family, found in sweep.items()]
    return table(["size", *(f"{rate:g}" for rate in rates)], rows)


def _swept_loss(found: Mapping[float, float], rate: float) -> str:
    if rate not in found:
        return NONE
    return f"**{found[rate]:.4f}**" if rate == best_rate(found) else f"{found[rate]:.4f}"


def best_rate(found: Mapping[float, float]) -> float:
    """The peak learning rate with the lowest loss. `found`: rate -> loss."""
    return min(found, key=found.__getitem__)


def _size_name(family: Family) -> str:
    return TITLES[family].lower() if family in TITLES else "small model"


def _size(config: Config) -> str:
    parameters = count_parameters(config.model)
    flops = count_flops(config.model, config.batch.sequence_length).per_token
    return f"{count(parameters.total)} parameters, {count(parameters.active)} active, {flop_count(flops)} FLOPs a token"


def summary(study: Study) -> str:
    """What holds here, in a few lines."""
    judged, lines = judge(study.losses), []
    for verdict in ("reproduced", "not reproduced", "not resolved"):
        texts = [f"{one.claim.text} ({_family(one)})" for one in judged if one.verdict == verdict]
        lines.append(f"- **{verdict.capitalize()}** ({len(texts)} of {len(judged)}): {'; '.join(texts) or 'none'}.")
    closed = _gap_closed(study.losses, "width-full")
    lines.append(f"- Share of the gap between the small and the wide model that the full method closes: {closed}.")
    if len(study.seeds) < 2:
        lines.append("- One seed has no spread: nothing can be resolved.")
    return "\n".join(lines)


def _family(one: Judged) -> str:
    return one.claim.first.partition("-")[0]


def _claims_table(judged: Sequence[Judged]) -> str:
    rows = []
    for one in judged:
        relation = "equal to" if one.claim.equal else "below"
        limit = f", margin {one.margin:.4f}" if one.margin is not None else ""
        low, high = one.second_minus_first.interval
        rows.append(
            [
                f"{one.claim.text}: `{one.claim.first}` {relation} `{one.claim.second}`",
                f"{one.second_minus_first.mean:+.4f} [{low:+.4f}, {high:+.4f}]{limit}",
                f"**{one.verdict}**",
            ]
        )
    return table(["claim of the papers", "difference", "here"], rows)


def _family_table(study: Study, family: Family) -> str:
    head = ["arm", "", "loss", "bits/byte", "gap closed", "FLOPs", "growth"]
    return table(head, [_row(study, arm) for arm in ARMS if arm.family in (SMALL, family)])


def _row(study: Study, arm: Arm) -> list[str]:
    found = study.outcomes[arm.name]
    before, after = _mean_of(found, "loss_before"), _mean_of(found, "loss_after")
    return [
        f"`{arm.name}`",
        arm.label,
        _plus_minus(spread([one.loss for one in found])),
        f"{spread([one.bits_per_byte for one in found]).mean:.3f}",
        NONE if arm.family == SMALL else _gap_closed(study.losses, arm.name),
        f"{found[0].flops:.3g}",
        NONE if before is None else f"at {arm.eighth}/{EIGHTHS}: {before:.3f} -> {after:.3f}",
    ]


def _gap_closed(losses: Losses, arm: str) -> str:
    scratch = losses[from_scratch(arm_named(arm).family).name]
    if any(scratch[seed] >= loss for seed, loss in losses[SMALL].items()):
        return NONE  # With some seed the final size is no better than the small one: there is no gap to close.
    return _percent(gap_closed(losses[SMALL], scratch, losses[arm]))


def _mean_of(found: Sequence[Outcome], name: str) -> float | None:
    values = [getattr(one, name) for one in found]
    return None if None in values else spread(values).mean


def _twins_text(study: Study) -> str:
    """Which arms ended with copies that are copies still."""
    locked = [name for name, distance in _distances(study).items() if distance < LOCKED_DISTANCE]
    free = [name for name, distance in _distances(study).items() if distance >= LOCKED_DISTANCE]
    return "\n".join(
        [
            "Cosine of the old half of each grown tensor with its new half, and the norm of their difference over that "
            "of the old",
            "half, in the last layer at the end; the seed in which they are most apart. Halves nearer than "
            f"{LOCKED_DISTANCE:g} count as copies still: "
            f"{', '.join(f'`{name}`' for name in locked) or 'none'}. Apart: "
            f"{', '.join(f'`{name}`' for name in free) or 'none'}.",
        ]
    )


def _distances(study: Study) -> dict[str, float]:
    """Arm -> largest distance of twins in any tensor and seed, of the arms that have twins."""
    return {
        name: max(pair.distance for one in found for pair in one.twins.values())
        for name, found in study.outcomes.items()
        if found[0].twins
    }


def _twins_table(study: Study) -> str:
    rows = []
    for name, found in study.outcomes.items():
        for tensor in found[0].twins:
            pair = max((one.twins[tensor] for one in found), key=lambda twins: twins.distance)
            short = tensor.partition(".mlp.")[2]
            rows.append([f"`{name}`", f"`{short}`", f"{pair.cosine:.6f}", f"{pair.distance:.2e}"])
    return table(["arm", "tensor", "cosine", "distance"], rows)


def _plus_minus(found: Spread) -> str:
    return f"{found.mean:.4f}" + (f" +- {found.deviation:.4f}" if found.seeds > 1 else "")


def _percent(found: Spread) -> str:
    return f"{found.mean:.0%}" + (f" +- {found.deviation:.0%}" if found.seeds > 1 else "")


def to_json(study: Study) -> dict[str, Any]:
    """results.json: every figure that the report is made from, and the verdicts."""
    return {
        "command": shlex.join(study.command),
        "machine": dict(study.machine),
        "steps": study.base.total_steps,
        "tokens_per_step": study.base.batch.tokens_per_step,
        "bigram_nats_per_token": study.baselines.bigram_nats_per_token,
        "unigram_nats_per_token": study.baselines.unigram_nats_per_token,
        "sweep": {size: {f"{rate:g}": loss for rate, loss in found.items()} for size, found in study.sweep.items()},
        "arms": {arm.name: _arm_json(study, arm) for arm in ARMS},
        "claims": [
            {
                "first": one.claim.first,
                "second": one.claim.second,
                "equal": one.claim.equal,
                "text": one.claim.text,
                "difference": one.second_minus_first.mean,
                # JSON has no word for an interval without end: one seed tells nothing of it.
                "interval": list(one.second_minus_first.interval) if one.second_minus_first.seeds > 1 else None,
                "margin": one.margin,
                "verdict": one.verdict,
            }
            for one in judge(study.losses)
        ],
    }


def _arm_json(study: Study, arm: Arm) -> dict[str, Any]:
    config = study.configs[arm.name]
    return {
        "label": arm.label,
        "lr": config.optim.lr,
        "parameters": count_parameters(config.model).total,
        "seeds": [_outcome_json(one) for one in study.outcomes[arm.name]],
        "less_than_small": difference(study.losses[arm.name], study.losses[SMALL]).mean,
    }


def _outcome_json(one: Outcome) -> dict[str, Any]:
    values = {name: value for name, value in vars(one).items() if name != "twins"}
    return values | {"twins": {tensor: vars(pair) for tensor, pair in one.twins.items()}}
