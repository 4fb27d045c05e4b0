"""Pictures of the study of optimizers: final losses, and ranks on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.metrics.drawing import MUTED, colour_of, legend_below, new_figure, title
from pretrain.studies.optimizers.cases import LONGEST, MOE, Case, Curve, Study
from pretrain.studies.optimizers.claims import MIDWAY, flip_pair
from pretrain.studies.statistics import spread

FLIP_FROM = 0.25
"""Share of the steps from which the losses on the way are drawn; before it they fall too steeply to tell apart."""


def compared(study: Study) -> dict[str, list[Case]]:
    """Cell -> the case of every optimizer that counts there."""
    cells = [cell.name for cell in study.sweep.cells]
    found = {
        cell: [study.best(name, cell) for name in study.descents if Case(name, cell) in study.losses] for cell in cells
    }
    return found | {MOE: [Case(one.optimizer, MOE) for one in study.moe]}


def draw_losses(study: Study) -> Figure:
    """A panel a cell: every seed as a dot, the mean as a bar with the standard deviation."""
    cells = compared(study)
    rows = [len(cases) + 1 for cases in cells.values()]
    figure, axes = new_figure(len(cells), 1, width=8.5, height=0.4 * sum(rows) + 1.5, height_ratios=rows)
    for ax, (cell, cases) in zip(axes, cells.items(), strict=True):
        for row, case in enumerate(cases):
            _draw_seeds(
                ax, row, study.losses[case], colour_of([*study.descents].index(case.optimizer.partition("-")[0]))
            )
        ax.set_yticks(range(len(cases)), [case.optimizer for case in cases])
        ax.set_ylim(len(cases) - 0.5, -0.5)
        title(ax, cell)
    axes[-1].set_xlabel("final validation loss, nats per token (dots: seeds; bars: mean and standard deviation)")
    return figure


def _draw_seeds(ax: Axes, row: int, losses: Mapping[int, float], colour: str) -> None:
    values = [loss for loss in losses.values() if math.isfinite(loss)]
    ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.45, markersize=5)
    if values:
        found = spread(values)
        deviation = None if len(values) < 2 else found.deviation
        ax.errorbar(found.mean, row, xerr=deviation, fmt="|", color=colour, capsize=4, markersize=14)


def draw_flip(study: Study) -> Figure:
    """Losses on the way of the two runs that are compared midway, and their difference; thin lines are seeds."""
    figure, (left, right) = new_figure(1, 2, width=11, height=4.8)
    adamw, muon = flip_pair(study)
    for case in (adamw, muon):
        index = [*study.descents].index(case.optimizer)
        _draw_curves(left, study.curves[case], colour_of(index), f"{case.optimizer}, {case.variant}")
    differences = {
        seed: [(share, loss - dict(curve)[share]) for share, loss in study.curves[muon][seed]]
        for seed, curve in study.curves[adamw].items()
        if seed in study.curves[muon]
    }
    _draw_curves(right, differences, colour_of(2), "muon less adamw")
    right.axhline(0, color=MUTED, linewidth=1)
    for ax in (left, right):
        ax.axvline(MIDWAY, color=MUTED, linestyle=":", linewidth=1)
        ax.set_xlabel("share of the steps")
    left.set_ylabel("validation loss, nats per token")
    title(left, f"On the way at {LONGEST}")
    title(right, "Muon less AdamW (below 0: Muon is ahead)")
    legend_below(figure, left)
    return figure


def _draw_curves(ax: Axes, curves: Mapping[int, Curve], colour: str, label: str) -> None:
    """Seeds as thin lines, their mean as a thick one."""
    late = [np.array([point for point in curve if point[0] >= FLIP_FROM]) for curve in curves.values()]
    for points in late:
        ax.plot(points[:, 0], points[:, 1], color=colour, alpha=0.35, linewidth=0.8)
    if late:
        mean = np.mean(late, axis=0)
        ax.plot(mean[:, 0], mean[:, 1], color=colour, marker=".", label=label)
