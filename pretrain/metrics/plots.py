"""The pictures of a report: loss, throughput, learning rate. Each takes the histories of one or several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pretrain.metrics.drawing import (
    COLOURS,
    FLOPS,
    GROWTH_LINE,
    MUTED,
    STEP,
    TOKENS,
    XAxis,
    colour_of,
    growth_breaks,
    label_x,
    legend_below,
    mark_growth,
    new_figure,
    smooth,
    title,
)
from pretrain.metrics.formats import count
from pretrain.metrics.history import History, listed, series


class Scale(NamedTuple):
    """The unit losses are drawn in."""

    label: str
    factors: tuple[float, ...]
    """Per run: loss in nats per token times this is the loss in the unit."""

    @property
    def is_bits(self) -> bool:
        return self.label.startswith("bits")


def draw_loss(histories: Sequence[History]) -> Figure:
    """Training and validation loss, with baselines, growth points, restarts and skipped steps.

    One run of one size: a single panel over steps and tokens. Otherwise a panel each for steps, tokens and FLOPs.
    """
    alone = len(histories) == 1
    plain = alone and not histories[0].events_in_force("growth")
    xs = (STEP,) if plain else (STEP, TOKENS, FLOPS)
    figure, grid = new_figure(1, len(xs), width=9.5 if plain else 16, height=5.6, sharey=True, squeeze=False)
    axes = grid[0]
    scale = _scale(histories)
    limits = _loss_limits(histories, scale)
    for ax, x in zip(axes, xs, strict=True):
        for index, history in enumerate(histories):
            colour = colour_of(index)
            _loss_curves(ax, history, x=x, factor=scale.factors[index], colour=colour, alone=alone)
            _event_marks(ax, history, x=x, colour=MUTED if alone else colour, bottom=limits[0], words=alone)
        ax.set_ylim(limits)
        label_x(ax, x)
    if scale.is_bits:
        _baselines(axes, histories)
        if max(scale.factors) / min(scale.factors) < 1.001:
            _nats_on_the_right(axes[-1], scale.factors[0])
    if plain:
        _tokens_on_top(axes[0], histories[0])
    axes[0].set_ylabel(f"loss, {scale.label}")
    if alone:
        title(axes[0], f"Loss of {histories[0].name}", pad=12)
    else:
        key = "lines: training, dots: validation, triangles: restarts, crosses: skipped steps"
        title(axes[0], f"Loss of {len(histories)} runs ({key})", pad=12)
        legend_below(figure, axes[0])
    return figure


def draw_throughput(histories: Sequence[History]) -> Figure:
    """Tokens per second over all ranks, and model TFLOP/s per device."""
    figure, axes = new_figure(2, 1, width=9.5, height=6.4, sharex=True)
    keys, texts = ("tokens_per_second", "model_tflops"), ("Tokens per second, all ranks", "Model TFLOP/s per device")
    for index, history in enumerate(histories):
        steps = series(history.train, "step")
        for ax, key in zip(axes, keys, strict=True):
            values = series(history.train, key)
            ax.plot(steps, values, color=colour_of(index), alpha=0.25, linewidth=0.8)
            ax.plot(steps, smooth(values, breaks=growth_breaks(history)), color=colour_of(index), label=history.name)
        mark_growth(axes, history, colour=MUTED if len(histories) == 1 else colour_of(index))
    for ax, key, text in zip(axes, keys, texts, strict=True):
        middle = count(float(np.nanmedian(series(histories[0].latest_train, key))))
        since = " since the last growth" if histories[0].events_in_force("growth") else ""
        title(ax, f"{text} (median{since} {middle})" if len(histories) == 1 else text)
        ax.set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(count))
    label_x(axes[1], STEP)
    if len(histories) > 1:
        legend_below(figure, axes[0])
    return figure


def draw_lr_and_grad_norm(histories: Sequence[History]) -> Figure:
    """Learning rate, and gradient norm before clipping (logarithmic)."""
    figure, axes = new_figure(2, 1, width=9.5, height=6.4, sharex=True)
    alone = len(histories) == 1
    for index, history in enumerate(histories):
        colour = colour_of(index)
        steps, norms = series(history.train, "step"), series(history.train, "grad_norm")
        _lr_lines(axes[0], history, colour=colour, alone=alone)
        axes[1].plot(steps, norms, color=colour, alpha=0.25, linewidth=0.8)
        logs = np.log(norms, out=np.full(len(norms), np.nan), where=norms > 0)
        axes[1].plot(steps, np.exp(smooth(logs, breaks=growth_breaks(history))), color=colour)
        mark_growth(axes, history, colour=MUTED if alone else colour)
    dotted = not alone and any("lr_new" in row for history in histories for row in history.train)
    title(axes[0], f"Learning rate{' (dotted: of entries that a growth brought in)' if dotted else ''}")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    title(axes[1], "Gradient norm before clipping (thin: each step, thick: running geometric mean)")
    if any((series(history.train, "grad_norm") > 0).any() for history in histories):  # else there is nothing to scale
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_minor_locator(NullLocator())
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    label_x(axes[1], STEP)
    if len(histories) > 1:
        legend_below(figure, axes[0])
    return figure


def _lr_lines(ax: Axes, history: History, *, colour: str, alone: bool) -> None:
    """The learning rate, and those of the entries that each growth brought in, where they have their own."""
    steps, new = series(history.train, "step"), listed(history.train, "lr_new")
    ax.plot(steps, series(history.train, "lr"), color=colour, label="entries from the start" if alone else history.name)
    for index, values in enumerate(new):
        if alone:
            ax.plot(steps, values, color=colour_of(index + 1), label=f"entries that growth {index + 1} brought in")
        else:
            ax.plot(steps, values, color=colour, linestyle=":")
    if alone and len(new):
        ax.legend(frameon=False)


def _scale(histories: Sequence[History]) -> Scale:
    """Bits per byte if every run has validated so, else nats per token. The factor of a run is that of its own
    validation set (tokens per byte / ln 2): exact for validation, an approximation for the training curve."""
    factors = []
    for history in histories:
        ratio = series(history.valid, "valid_bits_per_byte") / series(history.valid, "valid_loss")
        if not np.isfinite(ratio).any():
            return Scale("nats per token", (1.0,) * len(histories))
        factors.append(float(np.nanmedian(ratio)))
    return Scale("bits per byte", tuple(factors))


def _loss_limits(histories: Sequence[History], scale: Scale) -> tuple[float, float]:
    """Lower and upper end: the baselines and all but the first 2 % of the curves, which would flatten the rest."""
    values: list[float] = [value for _, value in _baseline_values(histories)] if scale.is_bits else []
    for history, factor in zip(histories, scale.factors, strict=True):
        curve = smooth(series(history.train, "loss") * factor, breaks=growth_breaks(history))
        values += [*curve[len(curve) // 50 :], *series(history.valid, "valid_loss") * factor]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    pad = 0.06 * (max(finite) - min(finite)) or 0.1
    return min(finite) - 1.5 * pad, max(finite) + pad


def _loss_curves(ax: Axes, history: History, *, x: XAxis, factor: float, colour: str, alone: bool) -> None:
    at, loss = series(history.train, x.key), series(history.train, "loss") * factor
    curve = smooth(loss, breaks=growth_breaks(history))
    ax.plot(at, loss, color=colour, alpha=0.18, linewidth=0.8)
    ax.plot(at, curve, color=colour, linewidth=1.8, label=history.name)
    dots, valid = series(history.valid, x.key), series(history.valid, "valid_loss") * factor
    dot_colour = COLOURS[1] if alone else colour
    ax.plot(dots, valid, "o", color=dot_colour, markersize=5, markeredgecolor="white", zorder=4)
    if alone:
        # Apart from each other, whichever of the two is lower.
        above = len(valid) > 0 and valid[-1] >= curve[-1]
        _end_label(ax, at[-1], curve[-1], f"training {curve[-1]:.2f}", colour=colour, above=not above)
        if len(valid):
            _end_label(ax, dots[-1], valid[-1], f"validation {valid[-1]:.2f}", colour=dot_colour, above=above)


def _end_label(ax: Axes, x: float, y: float, text: str, *, colour: str, above: bool) -> None:
    if math.isfinite(y):
        _note(
            ax, text, (x, y), offset=(0, 8 if above else -8), colour=colour, ha="right", va="bottom" if above else "top"
        )


def _event_marks(ax: Axes, history: History, *, x: XAxis, colour: str, bottom: float, words: bool) -> None:
    steps, at = series(history.train, "step"), series(history.train, x.key)
    for event in history.events_in_force("growth"):
        where = float(np.interp(event["step"], steps, at))
        ax.axvline(where, color=colour, **GROWTH_LINE)
        # Left of its line, but for one so early that the words would leave the panel.
        offset, side = (-3, "right") if where > 0.05 * at[-1] else (3, "left")
        options = {"ha": side, "va": "top", "rotation": 90}
        _note(ax, event["summary"], (where, 0.98), offset=(offset, 0), colour=colour, share_y=True, **options)
    for word, height, marker, events in (
        ("restart", 6, "^", history.restarts),
        ("skipped", 20 if history.restarts else 6, "x", history.events_in_force("skip")),  # clear of the other word
    ):
        if events:
            places = np.interp([event["step"] for event in events], steps, at)
            ax.plot(places, np.full(len(events), bottom), marker, color=colour, markersize=6, clip_on=False, zorder=5)
            if words:
                _note(ax, word, (places[0], bottom), offset=(0, height), colour=colour, ha="center", va="bottom")


def _note(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    *,
    offset: tuple[float, float],
    colour: str,
    share_y: bool = False,
    **options: Any,
) -> None:
    """Small text on a white ground, `offset` points from `at`; with `share_y` the y of `at` is a share of the axis."""
    ax.annotate(
        text,
        at,
        xycoords=("data", "axes fraction" if share_y else "data"),
        xytext=offset,
        textcoords="offset points",
        fontsize=10,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        **options,
    )


def _baseline_values(histories: Sequence[History]) -> list[tuple[str, float]]:
    """Distinct (name, bits per byte) over all runs."""
    found: dict[tuple[str, float], None] = {}
    for history in histories:
        event = history.last_event("baselines") or {}
        for name in ("unigram", "bigram"):
            if f"{name}_bits_per_byte" in event:
                found[name, round(event[f"{name}_bits_per_byte"], 3)] = None
    return list(found)


def _baselines(axes: Sequence[Axes], histories: Sequence[History]) -> None:
    for name, value in _baseline_values(histories):
        for ax in axes:
            ax.axhline(value, color=MUTED, linestyle=":", linewidth=1.4, zorder=1)
        right_end = axes[0].get_xlim()[1]
        text = f"{name} baseline {value:.2f}"
        _note(axes[0], text, (right_end, value), offset=(-4, 3), colour=MUTED, ha="right", va="bottom")


def _tokens_on_top(ax: Axes, history: History) -> None:
    last = history.train[-1]
    per_step = last["tokens"] / last["step"]
    top = ax.secondary_xaxis("top", functions=(_times(per_step), _times(1 / per_step)))
    top.xaxis.set_major_formatter(FuncFormatter(count))
    top.set_xlabel(TOKENS.label, color=MUTED)
    top.tick_params(colors=MUTED)
    top.spines["top"].set_visible(False)


def _nats_on_the_right(ax: Axes, factor: float) -> None:
    right = ax.secondary_yaxis("right", functions=(_times(1 / factor), _times(factor)))
    right.set_ylabel("nats per token", color=MUTED)
    right.tick_params(colors=MUTED)
    right.spines["right"].set_visible(False)


def _times(factor: float) -> Any:
    return lambda values: values * factor
