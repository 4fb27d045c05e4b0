"""Pictures of the study: where every arm ended, and the way there over tokens and over compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.metrics.drawing import FLOPS, MUTED, TOKENS, colour_of, label_x, legend_below, new_figure, title
from pretrain.studies.arms import ARMS, SMALL, Arm, Family, from_scratch
from pretrain.studies.claims import Losses
from pretrain.studies.results import Point
from pretrain.studies.statistics import spread

TITLES: Mapping[Family, str] = {
    "width": "Residual stream and experts twice as wide",
    "depth": "Twice the layers",
    "experts": "Twice the experts, top-k doubled",
}
SHOWN = (
    SMALL,
    "width-scratch",
    "width-scratch-short",
    "width-copied",
    "width-asymmetric",
    "width-full",
    "width-zero-copy",
)
"""Arms whose curves are drawn; all would hide each other."""
CURVES_FROM = 0.4
"""Share of the tokens from which curves are drawn: a little before the growth."""

Curves = Mapping[str, Sequence[Sequence[Point]]]
"""Arm -> seed -> validations."""


def draw_final_losses(losses: Losses) -> Figure:
    """A panel a family: every seed as a dot, the mean as a bar with the standard deviation."""
    rows = [sum(arm.family == family for arm in ARMS) + 1 for family in TITLES]
    figure, axes = new_figure(len(TITLES), 1, width=9.5, height=0.42 * sum(rows) + 2, sharex=True, height_ratios=rows)
    for ax, family in zip(axes, TITLES, strict=True):
        arms = [arm for arm in ARMS if arm.family in (SMALL, family)]
        _draw_family(ax, arms, losses)
        title(ax, TITLES[family])
        for name in (SMALL, from_scratch(family).name):
            ax.axvline(spread([*losses[name].values()]).mean, color=MUTED, linestyle=":", linewidth=1)
    axes[-1].set_xlabel("final validation loss, nats per token (dots: seeds; bars: mean and standard deviation)")
    return figure


def _draw_family(ax: Axes, arms: Sequence[Arm], losses: Losses) -> None:
    for row, arm in enumerate(arms):
        values = [*losses[arm.name].values()]
        found, colour = spread(values), colour_of(int(arm.grows))
        ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        deviation = None if len(values) < 2 else found.deviation
        ax.errorbar(found.mean, row, xerr=deviation, fmt="|", color=colour, capsize=4, markersize=14)
    ax.set_yticks(range(len(arms)), [arm.label for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)


def draw_curves(curves: Curves) -> Figure:
    """Validation loss of the arms that grow in width, mean over seeds, over tokens and over FLOPs."""
    figure, axes = new_figure(1, 2, width=12, height=5.6, sharey=True)
    arms = [arm for arm in ARMS if arm.name in SHOWN]
    last_tokens = max(point.tokens for arm in arms for point in curves[arm.name][0])
    shown = []
    for index, arm in enumerate(arms):
        points = curves[arm.name]
        mean = np.array([[point.loss for point in seed] for seed in points]).mean(axis=0)
        tokens = np.array([point.tokens for point in points[0]])
        late = tokens >= CURVES_FROM * last_tokens
        shown.append(mean[late])
        # Compute is the same for every seed.
        for ax, xs in zip(axes, (tokens, np.array([point.flops for point in points[0]])), strict=True):
            style = "-" if arm.grows else "--"
            ax.plot(xs[late], mean[late], style, marker=".", color=colour_of(index), label=arm.label)
    lowest, highest = min(map(np.min, shown)), max(map(np.max, shown))
    axes[0].set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    for ax, x in zip(axes, (TOKENS, FLOPS), strict=True):
        # What is drawn begins late: the axis does, too.
        left = min(line.get_xdata()[0] for line in ax.lines)
        label_x(ax, x)
        ax.set_xlim(left=0.95 * left)
    axes[0].set_ylabel("validation loss, nats per token")
    title(axes[0], "Twice as wide from half of the steps on (mean over seeds; dashed: never grown)")
    legend_below(figure, axes[0])
    return figure
