"""The picture of how evenly experts are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pretrain.metrics.drawing import (
    MUTED,
    STEP,
    colour_of,
    growth_breaks,
    label_x,
    legend_below,
    mark_growth,
    new_figure,
    smooth,
    title,
)
from pretrain.metrics.history import History, listed, series

# Rows averaged for the load of each expert at the end of a run.
LAST_ROWS = 20
LINES = (
    ("moe.max_violation_mean", "Fullest expert over the mean, minus 1 (mean of layers)"),
    ("moe.entropy_mean", "Entropy of the load (1: even, mean of layers)"),
    ("moe.dead_experts_total", "Dead experts (all layers)"),
    ("moe.bias_spread_max", "Spread of selection biases (largest of layers)"),
)


def draw_moe(histories: Sequence[History]) -> Figure:
    """Balance over the run as curves; for a single run also, as maps, the fullest expert of each layer over time and
    the load of each expert at the end. Dense runs among the histories are left out."""
    moe = [(history, colour_of(index)) for index, history in enumerate(histories) if history.is_moe]
    only = moe[0][0] if len(moe) == 1 else None
    lines = [(key, text) for key, text in LINES if any(np.isfinite(series(h.train, key)).any() for h, _ in moe)]
    maps = 1 if only else 0
    rows = maps + (len(lines) + 1) // 2
    figure, axes = new_figure(rows, 2, width=13, height=3.4 * rows + 0.6, squeeze=False)
    if only:
        loads = [row["moe"]["load"] for row in only.train if "load" in row.get("moe", {})]
        if loads:
            _load_at_the_end(figure, axes[0][1], loads[-LAST_ROWS:])
        else:  # too many experts for the rows to hold each
            axes[0][1].remove()
            axes[0][0].set_subplotspec(axes[0][0].get_gridspec()[0, :])
        _fullest_over_time(figure, axes[0][0], only)
    panels = axes[maps:].flatten()
    for ax, (key, text) in zip(panels, lines, strict=False):
        _curves(ax, moe, key)
        title(ax, text)
    for unused in panels[len(lines) :]:
        unused.set_axis_off()
    if len(histories) > 1:
        legend_below(figure, panels[0])
    return figure


def _curves(ax: Axes, histories: Sequence[tuple[History, str]], key: str) -> None:
    for history, colour in histories:
        steps, values = series(history.train, "step"), series(history.train, key)
        if key == "moe.dead_experts_total":
            ax.step(steps, values, where="post", color=colour, label=history.name)
        else:
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, smooth(values, breaks=growth_breaks(history)), color=colour, label=history.name)
        mark_growth([ax], history, colour=MUTED if len(histories) == 1 else colour)
    if key == "moe.entropy_mean":
        ax.set_ylim(top=1.005)
    else:
        ax.set_ylim(bottom=0)
    if key == "moe.dead_experts_total":
        ax.set_ylim(top=max(1.0, ax.get_ylim()[1]))  # a scale of whole experts when none is dead, too
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    label_x(ax, STEP)


def _fullest_over_time(figure: Figure, ax: Axes, history: History) -> None:
    rows = [row for row in history.train if "moe" in row]
    steps, fullest = series(rows, "step"), 1 + listed(rows, "moe.max_violation")
    # Each cell reaches from the row before to its own step.
    edges = np.concatenate([[0.0], steps])
    top = max(2.0, float(np.nanmax(fullest)))
    image = ax.pcolormesh(
        edges, np.arange(len(fullest) + 1) - 0.5, fullest, cmap="viridis", norm=LogNorm(1, top), rasterized=True
    )
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if tick <= top]
    bar = figure.colorbar(image, ax=ax, label="load of the fullest expert / mean", ticks=FixedLocator(ticks))
    _plain_ticks(bar)
    ax.grid(False)
    ax.set_ylabel("MoE layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    label_x(ax, STEP)
    title(ax, "Fullest expert of each layer")


def _load_at_the_end(figure: Figure, ax: Axes, loads: Sequence[Sequence[Sequence[float]]]) -> None:
    last = [np.array(load, dtype=np.float64) for load in loads]
    mean = np.mean([load for load in last if load.shape == last[-1].shape], axis=0)  # those after the last growth
    # Zero has no logarithm; everything below a quarter has the darkest colour, dead experts have a panel of their own.
    image = ax.imshow(np.maximum(mean, 0.25), cmap="PuOr_r", norm=LogNorm(0.25, 4), aspect="auto", origin="lower")
    ticks = FixedLocator([0.25, 0.5, 1, 2, 4])
    bar = figure.colorbar(image, ax=ax, label="load / mean of the layer", extend="both", ticks=ticks)
    _plain_ticks(bar)
    ax.grid(False)
    ax.set_xlabel("expert")
    ax.set_ylabel("MoE layer")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    title(ax, f"Load of each expert, mean of the last {len(last)} rows")


def _plain_ticks(bar: object) -> None:
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # type: ignore[attr-defined]
    bar.ax.yaxis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]
