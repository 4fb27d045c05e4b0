"""The report of the study of decentralized training in words and tables, every one of them computed from the runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.metrics.formats import count, duration
from pretrain.model.counts import count_parameters
from pretrain.studies.decentral.arms import CENTRAL, LOST, MERGE_COEFFICIENT, MERGE_SHARE, Arm
from pretrain.studies.decentral.claims import EQUAL_SHARE, judge
from pretrain.studies.decentral.results import Outcome, Study
from pretrain.studies.evidence import claims_json, claims_table, json_number, plus_minus, summary_of
from pretrain.studies.report import OPTIMIZERS
from pretrain.studies.statistics import finite_spread, spread
from pretrain.tuning.markdown import table

NONE = "-"
KIB = 1024
GAPS_PICTURE, CURVES_PICTURE, COSTS_PICTURE = "gaps.png", "curves.png", "costs.png"
ABSENCE_PICTURE = "absence.png"

HOW_TO_READ = f"""\
*Here*: the mean over seeds of what the second column names, positive where it speaks for the claim, and in brackets its
95 % confidence interval (Student's t); runs of one seed have the same weights at the start and the same data in the
same order. *Reproduced* and *not reproduced* need the whole interval on one side of zero or, where a margin is named,
within or outside +- it. All else is *not resolved*: the noise of these seeds hides it. Losses are in nats per token.
An arm is as good as another one if it is less than {EQUAL_SHARE:.0%} of the central loss above it. The verdicts are
not corrected for their number."""

LIMITS = """\
What limits it: a model of a few hundred thousand parameters, a few hundred steps at a learning rate that was chosen for
the central run, one corpus that the sites share out at random, sites that are processes of one machine. The papers
train for ten thousand times as many tokens, with a rate that moves a weight far less between two rounds: a gap here
says how much it costs to drift apart early and fast, not what remains at scale. DiLoCo's outer step and momentum are
those of its paper, and were not tuned for so few rounds."""

ROUTING = """\
Similarity: cosine of the gate matrices of two experts of a layer in the final model, mean over pairs and layers.
Entropy: of the load of the experts over log E, 1 is even; fullest: load of the fullest expert over the mean; both are
means over layers, sites and the last logged steps. Dead: experts without a token lately, at the site with the most."""


def markdown(study: Study) -> str:
    """README.md of the study."""
    paper, own = judge(study)
    parts = [
        "# Does decentralized training work?",
        _setting(study),
        "## What the paper claims, and what is seen",
        summary_of(paper, len(study.seeds)),
        claims_table(paper),
        "## What we claim",
        summary_of(own, len(study.seeds)),
        claims_table(own),
        HOW_TO_READ,
        LIMITS,
        "## Losses",
        _losses_table(study),
        f"![Gaps]({GAPS_PICTURE})",
        f"![Curves]({CURVES_PICTURE})",
        "## Bytes and memory",
        _costs_table(study),
        COSTS,
        f"![Costs]({COSTS_PICTURE})",
        "## Time",
        _time_table(study),
        _time_text(study),
        "## Experts",
        _experts_table(study),
        ROUTING,
    ]
    if LOST in study.outcomes:
        parts += ["## A site that is lost and comes back", _absence_text(study), f"![Absence]({ABSENCE_PICTURE})"]
    return "\n\n".join(parts) + "\n"


def _setting(study: Study) -> str:
    base, machine = study.base, "; ".join(f"{name} {value}" for name, value in study.machine.items())
    parameters = count_parameters(base.model)
    runs = sum(map(len, study.outcomes.values()))
    return (
        f"Written by\n\n    {shlex.join(study.command)}\n\non {machine}.\n\n{runs} runs; seeds "
        f"{', '.join(map(str, study.seeds))}. A mixture of experts ({count(parameters.total)} parameters, "
        f"{count(parameters.active)} active; {base.model.num_experts} experts, {base.model.top_k} for each token) on "
        f"the sources of Python's standard library: {base.total_steps} steps of {base.batch.tokens_per_step:,} tokens "
        f"over all sites together, in the same order for all. {OPTIMIZERS[base.optim.kind]}, peak {base.optim.lr:g} "
        f"after {base.schedule.warmup_steps} steps, then {base.schedule.kind}, the same for every arm. H: steps "
        f"between rounds. Each site of two takes half of every batch, each of four a quarter. Merging follows every "
        f"round of the first {MERGE_SHARE:.0%} of the steps, with a coefficient that falls from {MERGE_COEFFICIENT:g} "
        "to zero. DiLoCo: full replicas, outer Nesterov momentum; SPES: every site trains its own experts, the rest is "
        "averaged."
    )


def _pm(study: Study, arm: str, figure: str = "loss") -> str:
    return plus_minus(finite_spread(study.by_seed(arm, figure)))


def _losses_table(study: Study) -> str:
    rows = [
        [
            arm.label,
            _pm(study, arm.name),
            NONE if arm.name == CENTRAL else plus_minus(finite_spread(study.gaps(arm.name))),
            _pm(study, arm.name, "bits_per_byte"),
        ]
        for arm in study.arms
    ]
    return (
        table(["arm", "loss", "gap to central", "bits/byte"], rows)
        + "\n\nOf the model that all sites have after the last round: mean over seeds +- standard deviation of one "
        "seed."
    )


COSTS = """\
Bytes are payload, in KiB: measured at site 0, and by `pretrain plan`; of a round of all sites without a merge, to which
no site comes back. State: weights and optimizer state that a site
keeps, in its last checkpoint and by the plan; memory: that and the gradients of what it trains, by the plan. The
central run exchanges gradients at every step if it is spread over machines; here it is one process, and sends none."""


def _costs_table(study: Study) -> str:
    head = ["arm", "a round", "by the plan", "in all", "rounds", "state", "by the plan", "memory"]
    rows = []
    for arm in study.arms:
        one = study.outcomes[arm.name][0]
        sent = [_kib(one.bytes_per_round), _kib(one.planned_bytes_per_round), _kib(one.sent_bytes)]
        if arm.name == CENTRAL:
            sent = [NONE] * 3
        sizes = [_kib(one.state_bytes), _kib(one.planned_state_bytes), _kib(one.memory_bytes)]
        rows.append([arm.label, *sent, str(len(one.rounds)), *sizes])
    return table(head, rows)


def _kib(value: float) -> str:
    return f"{value / KIB:,.1f}"


def _time_table(study: Study) -> str:
    rows = []
    for arm in study.arms:
        found = study.outcomes[arm.name]
        sync, wait, total = (
            spread([getattr(one, name) for one in found]).mean for name in ("sync_seconds", "wait_seconds", "seconds")
        )
        rounds = len(found[0].rounds)
        each = f"{sync / rounds:.3f}" if rounds else NONE
        rows.append([arm.label, each, f"{sync:.1f}", f"{wait:.1f}", f"{total:.0f}"])
    return table(["arm", "s a round", "s in rounds", "s waiting for sites", "s in all"], rows)


def _time_text(study: Study) -> str:
    core_seconds = sum(one.seconds * arm.sites for arm in study.arms for one in study.outcomes[arm.name])
    return (
        f"Means over seeds, at site 0; {duration(core_seconds)} over all runs and processes. Several processes shared "
        "the cores, with those of other work, too: these are no measurements of what a synchronisation costs."
    )


def _experts_table(study: Study) -> str:
    figures = (("similarity", "{:.3f}"), ("entropy", "{:.3f}"), ("fullest", "{:.2f}"), ("dead_experts", "{:.1f}"))
    rows = [
        [arm.label, *(form.format(finite_spread(study.by_seed(arm.name, name)).mean) for name, form in figures)]
        for arm in study.arms
    ]
    return table(["arm", "similarity", "entropy", "fullest", "dead"], rows)


def _absence_text(study: Study) -> str:
    task = study.tasks[LOST]
    lines = [
        f"Site {task.lost_site} of {task.arm.sites} is ended by SIGKILL and started again while the others train. It "
        "goes on from its last checkpoint, takes over the weights of the others at the first round that it is back "
        "for, and begins its optimizer anew; its experts stay as they were meanwhile.",
        "",
    ]
    for one in study.outcomes[LOST]:
        back = f"back for the round after step {one.returned}" if one.returned else "not back before the end"
        away = f"after steps {_stretch(one.away)} ({len(one.away)} of {len(one.rounds)})" if one.away else "none"
        lines.append(f"- Seed {one.seed}: rounds without it: {away}; {back}; loss {one.loss:.4f}.")
    return "\n".join(lines)


def _stretch(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])


def to_json(study: Study) -> dict[str, Any]:
    """results.json: every figure that the report is made from, and the verdicts."""
    paper, own = judge(study)
    return {
        "command": shlex.join(study.command),
        "machine": dict(study.machine),
        "steps": study.base.total_steps,
        "tokens_per_step": study.base.batch.tokens_per_step,
        "lr": study.base.optim.lr,
        "arms": {arm.name: _arm_json(arm, study.outcomes[arm.name]) for arm in study.arms},
        "claims": {"paper": claims_json(paper), "own": claims_json(own)},
    }


def _arm_json(arm: Arm, found: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "label": arm.label,
        "sites": arm.sites,
        "steps_between_rounds": arm.interval,
        "seeds": [_outcome_json(one) for one in found],
    }


def _outcome_json(one: Outcome) -> Mapping[str, Any]:
    derived = ("sent_bytes", "bytes_per_round", "sync_seconds", "wait_seconds")
    values = {name: value for name, value in vars(one).items() if name != "rounds"}
    values |= {name: getattr(one, name) for name in derived}
    numbers = {name: json_number(value) if isinstance(value, float) else value for name, value in values.items()}
    rounds = [
        {"step": each.step, "members": each.members, "losses": each.losses, "merged": each.merged}
        for each in one.rounds
    ]
    return numbers | {"rounds": rounds}
