"""Pictures of the study of decentralized training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.metrics.drawing import MUTED, STEP, colour_of, label_x, legend_below, new_figure, title
from pretrain.studies.decentral.arms import CENTRAL, INTERVALS, LOST, Arm
from pretrain.studies.decentral.results import Outcome, Study
from pretrain.studies.statistics import spread

MIB = 1 << 20
_METHODS = ("central", "diloco", "spes", "merge", "average", "four", "four-lost")


def _colour(arm: Arm) -> str:
    """Of the method."""
    method = arm.name if arm.name in _METHODS else arm.name.partition("-")[0]
    return colour_of(_METHODS.index(method))


def draw_gaps(study: Study) -> Figure:
    """Final loss above that of the central run: every seed as a dot, the mean as a bar with the standard deviation."""
    arms = [arm for arm in study.arms if arm.name != CENTRAL]
    figure, ax = new_figure(1, 1, width=9, height=0.5 * len(arms) + 1.5)
    for row, arm in enumerate(arms):
        values = [*study.gaps(arm.name).values()]
        found = spread(values)
        ax.plot(values, [row] * len(values), "o", color=_colour(arm), alpha=0.45, markersize=6)
        deviation = None if len(values) < 2 else found.deviation
        ax.errorbar(found.mean, row, xerr=deviation, fmt="|", color=_colour(arm), capsize=4, markersize=16)
    ax.axvline(0, color=MUTED, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(arms)), [arm.label for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xlabel(
        "final validation loss less that of the central run, nats per token\n"
        "(dots: seeds; bars: mean and standard deviation)"
    )
    title(ax, "Gap to central training at equal tokens")
    return figure


def draw_curves(study: Study) -> Figure:
    """Validation loss right after rounds, mean over seeds; a panel for each interval between rounds."""
    intervals = [steps for steps in INTERVALS if any(arm.interval == steps for arm in study.arms)]
    figure, axes = new_figure(1, len(intervals), width=5.5 * len(intervals), height=5, sharey=True, squeeze=False)
    for ax, interval in zip(axes[0], intervals, strict=True):
        for arm in study.arms:
            if arm.name == CENTRAL or arm.interval == interval:
                _draw_curve(ax, study.outcomes[arm.name], arm, arm.label.rpartition(",")[0] or arm.label)
        label_x(ax, STEP)
        title(ax, f"A round every {interval} steps")
    axes[0][0].set_ylabel("validation loss, nats per token (mean over seeds)")
    legend_below(figure, axes[0][0])
    return figure


def _draw_curve(ax: Axes, outcomes: Sequence[Outcome], arm: Arm, label: str) -> None:
    steps = [step for step, _ in outcomes[0].curve]
    mean = np.mean([[loss for _, loss in one.curve] for one in outcomes], axis=0)
    style = "--" if arm.loses_a_site else "-"
    ax.plot(steps, mean, style, marker=".", color=_colour(arm), label=label)


def draw_costs(study: Study) -> Figure:
    """Bytes that a site sends in the whole run, and memory of a site by the plan."""
    figure, (left, right) = new_figure(1, 2, width=12, height=0.45 * len(study.arms) + 1.8, sharey=True)
    rows = range(len(study.arms))
    first = [study.outcomes[arm.name][0] for arm in study.arms]
    colours = [_colour(arm) for arm in study.arms]
    left.barh(rows, [one.sent_bytes / MIB for one in first], color=colours)
    left.set_xlabel("sent by a site in the whole run, MiB")
    right.barh(rows, [one.memory_bytes / MIB for one in first], color=colours)
    right.set_xlabel("weights, gradients and optimizer state of a site, MiB")
    left.set_yticks(rows, [arm.label for arm in study.arms])
    left.set_ylim(len(study.arms) - 0.5, -0.5)
    title(left, "Communication")
    title(right, "Memory")
    return figure


def draw_absence(study: Study) -> Figure:
    """The run that loses a site, with the first seed: who was in which round, and the training losses of the sites."""
    rounds = study.outcomes[LOST][0].rounds
    sites = study.tasks[LOST].arm.sites
    figure, (top, bottom) = new_figure(2, 1, width=9, height=6, sharex=True, height_ratios=[3, 1.2])
    for site in range(sites):
        there = [(one.step, one.losses[site]) for one in rounds if one.losses.get(site) is not None]
        steps, losses = [step for step, _ in there], [loss for _, loss in there]
        top.plot(steps, losses, marker=".", color=colour_of(site), label=f"site {site}")
        present = [one.step for one in rounds if site in one.members]
        absent = [one.step for one in rounds if site not in one.members]
        bottom.plot(present, [site] * len(present), "s", color=colour_of(site), markersize=8)
        bottom.plot(absent, [site] * len(absent), "x", color=MUTED, markersize=8)
    top.set_ylabel("training loss since\nthe last round, nats per token")
    top.legend(frameon=False)
    title(top, "A site that is killed and comes back (first seed)")
    bottom.set_yticks(range(sites), [f"site {site}" for site in range(sites)])
    bottom.set_ylim(sites - 0.5, -0.5)
    label_x(bottom, STEP)
    title(bottom, "Who took part in the round after a step (x: absent)")
    return figure
