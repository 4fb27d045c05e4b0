"""What the pictures share: style, colours, axes, smoothing, number formats.

Colours are Okabe and Ito's (distinct for colour-blind readers, https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pretrain.metrics.formats import count, flop_count, whole
from pretrain.metrics.history import History, Series, series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MUTED = "#666666"
GROWTH_LINE: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.dpi": 130,
}


class XAxis(NamedTuple):
    """What a curve is drawn over: a field of the rows and the words below the axis."""

    key: str
    label: str


STEP = XAxis("step", "optimizer steps")
TOKENS = XAxis("tokens", "training tokens")
FLOPS = XAxis("flops", "training compute, FLOP")


def new_figure(rows: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure in our style, `width` x `height` inches, and its axes as matplotlib's `subplots` returns them. No
    global state of matplotlib is used, so that it may be called beside anything else."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def colour_of(index: int) -> str:
    """Colour of the run with this number; an eighth run starts again with the first colour."""
    return COLOURS[index % len(COLOURS)]


def smooth(values: Series, *, breaks: Sequence[int] = ()) -> Series:
    """Running mean over about a fortieth of the values, centred, leaving out NaN. The window narrows towards the start,
    where a lopsided one would bend a falling curve; it is cut off at the end; and it never reaches across an index in
    `breaks` (where the model grew)."""
    radius = max(1, len(values) // 80)
    finite = np.isfinite(values)
    # Sums of the first n values, so that a window's sum is a difference.
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    edges = np.array([0, *breaks, len(values)])
    segment = np.searchsorted(edges, index, side="right") - 1
    reach = np.minimum(radius, index - edges[segment])
    first, end = index - reach, np.minimum(index + reach + 1, edges[segment + 1])
    number = counts[end] - counts[first]
    return np.divide(sums[end] - sums[first], number, out=np.full(len(values), np.nan), where=number > 0)


def growth_breaks(history: History) -> list[int]:
    """Indices of the training rows that are the first after a growth."""
    steps = series(history.train, "step")
    found = {int(np.searchsorted(steps, event["step"], side="right")) for event in history.events_in_force("growth")}
    return sorted(found - {0, len(steps)})


def mark_growth(axes: Sequence[Axes], history: History, *, colour: str = MUTED) -> None:
    """A vertical line at each growth, for axes over steps."""
    for event in history.events_in_force("growth"):
        for ax in axes:
            ax.axvline(event["step"], color=colour, **GROWTH_LINE)


def label_x(ax: Axes, x: XAxis) -> None:
    """Name and number format of an x axis that starts at zero."""
    ax.set_xlabel(x.label)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x is STEP, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter({STEP: whole, TOKENS: count, FLOPS: flop_count}[x]))


def title(ax: Axes, text: str, **options: Any) -> None:
    """Left-aligned title of a panel."""
    ax.set_title(text, loc="left", **options)


def legend_below(figure: Figure, ax: Axes) -> None:
    """The legend of `ax` below the whole figure."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
