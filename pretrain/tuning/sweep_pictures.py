"""Pictures of a sweep: loss over each hyperparameter, progress, near-optimal values, and the laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.metrics.drawing import MUTED, colour_of, legend_below, new_figure, title
from pretrain.metrics.formats import count
from pretrain.tuning.descent import Descent, Grid, changed
from pretrain.tuning.phases import Check, Fit
from pretrain.tuning.sensitivity import Trial, near_optimal
from pretrain.tuning.sweep_file import Cell

COLUMNS = 4
"""Panels in a row."""
MOST_ABOVE_BEST = 0.3
"""Nats above the best loss of all that are drawn; a diverged run would flatten everything else."""

Searches = Mapping[str, Descent]
"""Cell -> its coordinate descent."""


def draw_one_off(searches: Searches, grid: Grid) -> Figure:
    """A panel a hyperparameter: loss when it alone moves off the last baseline, a line a cell."""
    figure, axes = _panels(len(grid))
    for ax, (key, values) in zip(axes, grid.items(), strict=False):
        labels = [str(value) for value in values]
        for index, (cell, found) in enumerate(searches.items()):
            losses = [found.losses.get(changed(found.baseline, {key: value}), math.nan) for value in values]
            shown = [loss if loss <= found.loss + MOST_ABOVE_BEST else math.nan for loss in losses]
            ax.plot(range(len(values)), shown, marker="o", color=colour_of(index), label=cell)
        ax.set_xticks(range(len(values)), labels)
        title(ax, key)
    axes[0].set_ylabel("final validation loss")
    legend_below(figure, axes[0])
    return figure


def draw_progress(by_optimizer: Mapping[str, Searches]) -> Figure:
    """A panel an optimizer: excess of the best loss so far over the final one, by configurations tried."""
    figure, axes = _panels(len(by_optimizer))
    for ax, (optimizer, searches) in zip(axes, by_optimizer.items(), strict=False):
        for index, (cell, found) in enumerate(searches.items()):
            best = np.minimum.accumulate([*found.losses.values()]) - found.loss
            ax.step(range(1, len(best) + 1), best, where="post", color=colour_of(index), label=cell)
        ax.set_xlabel("configurations tried")
        title(ax, optimizer)
    axes[0].set_ylabel("best loss so far, above the final best")
    legend_below(figure, axes[0])
    return figure


def draw_near_optimal(searches: Searches, grid: Grid, margin: float) -> Figure:
    """A row a cell, a column a value: filled where the value occurs in the cell's near-optimal set."""
    columns = [(key, value) for key, values in grid.items() for value in values]
    figure, ax = new_figure(1, 1, width=2 + 0.42 * len(columns), height=1.9 + 0.4 * len(searches))
    for row, found in enumerate(searches.values()):
        near = near_optimal([Trial(dict(one), loss) for one, loss in found.losses.items()], margin)
        for column, (key, value) in enumerate(columns):
            occurs = any(trial.settings[key] == value for trial in near)
            ax.plot(
                column, row, "s", markersize=11, color=_key_colour(grid, key), fillstyle="full" if occurs else "none"
            )
    ax.set_xticks(range(len(columns)), [f"{_short(key)} {value}" for key, value in columns], rotation=90)
    ax.set_yticks(range(len(searches)), list(searches))
    ax.set_ylim(len(searches) - 0.5, -0.5)
    ax.grid(visible=False)
    title(ax, f"Values within {margin:g} of the best")
    return figure


def draw_fits(fits: Mapping[str, Fit], cells: Sequence[Cell], checks: Mapping[str, Check]) -> Figure:
    """A panel a law: best values over model size, a colour a data ratio; lines: the law; stars: predicted and tried.

    `cells`: all of the sweep.
    """
    figure, axes = _panels(len(fits))
    by_ratio: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda one: (one.ratio, one.model_size)):
        by_ratio.setdefault(f"{cell.ratio:.3g}x", []).append(cell)
    sizes = sorted({cell.model_size for cell in cells})
    for ax, (key, law) in zip(axes, fits.items(), strict=False):
        for index, (label, there) in enumerate(by_ratio.items()):
            colour = colour_of(index)
            points = [point for point in law.points if f"{point.ratio:.3g}x" == label]
            ax.plot([p.model_size for p in points], [p.value for p in points], "o", color=colour, label=label)
            ax.plot(sizes, [law.predict(size, there[0].ratio) for size in sizes], color=colour, linewidth=1)
            for cell in there:
                if cell.name in checks:
                    ax.plot(cell.model_size, float(dict(checks[cell.name].settings)[key]), "*", color=colour, ms=14)
        ax.set_xscale("log")
        ax.set_xticks(sizes, [count(size) for size in sizes])
        ax.minorticks_off()
        if min(point.value for point in law.points) > 0:
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:.3g}")
        ax.set_xlabel("non-embedding parameters")
        title(ax, key + (" (law in logarithms)" if law.uses_logs else ""))
    legend_below(figure, axes[0])
    return figure


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, in rows."""
    columns = min(number, COLUMNS)
    rows = -(-number // columns)
    # Wide enough for the legend below, too.
    width = max(6.5, 3.4 * columns + 0.6)
    figure, axes = new_figure(rows, columns, width=width, height=3.1 * rows + 0.8, squeeze=False)
    flat = list(axes.flat)
    for ax in flat[number:]:
        ax.set_visible(False)
    return figure, flat[:number]


def _key_colour(grid: Grid, key: str) -> str:
    """Neighbouring keys differ in colour."""
    return colour_of(0) if list(grid).index(key) % 2 == 0 else MUTED


def _short(key: str) -> str:
    """Without its section."""
    return key.partition(".")[2]
