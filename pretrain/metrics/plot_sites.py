"""The picture of a run of several sites: their losses, what rounds cost, how alike experts are, and who was there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from pretrain.metrics.drawing import MUTED, STEP, colour_of, label_x, new_figure, smooth, title
from pretrain.metrics.formats import byte_count
from pretrain.metrics.history import Series, series
from pretrain.metrics.sites import Role, SiteRun, role, sent_bytes

ROLES: dict[Role, tuple[str, str]] = {
    "member": ("#cfe8f6", "took part"),
    "moved": ("#56B4E9", "came from an earlier step"),
    "stale": ("#E69F00", "came back after missing rounds"),
    "absent": ("#D55E00", "absent"),
}
"""Colour in the strip chart, and what it means."""
MERGED = "#000000"
"""Colour of what belongs to all sites together."""


def draw_sites(run: SiteRun) -> Figure:
    """Panels over steps: loss of each site and of their common weights, bytes and time of rounds, similarity of
    experts where the events have it, and a strip for each site."""
    rounds = run.rounds
    alike = [event for event in rounds if event.get("similarity")]
    height = 7.6 + 0.32 * len(run.numbers)
    figure, axes = new_figure(3, 2, width=13, height=height, height_ratios=[3.4, 3.0, 0.9 + 0.32 * len(run.numbers)])
    _losses(axes[0][0], run)
    _seconds(axes[1][0], run)
    _sent(axes[1][1], run)
    if alike:
        _similarity(axes[0][1], alike)
    else:
        axes[0][1].remove()
        axes[0][0].set_subplotspec(axes[0][0].get_gridspec()[0, :])
    axes[2][1].remove()
    strip = axes[2][0]
    strip.set_subplotspec(strip.get_gridspec()[2, :])
    _strip(strip, run)
    last = max(history.train[-1]["step"] for history in run.sites.values())
    for ax in figure.axes:
        label_x(ax, STEP)
        ax.set_xlim(0, last * 1.01)
    return figure


def _losses(ax: Axes, run: SiteRun) -> None:
    curves = []
    for site, history in run.sites.items():
        steps, losses = series(history.train, "step"), series(history.train, "loss")
        away = gaps(steps)
        curve = smooth(losses, breaks=away)
        curves += [*curve[len(curve) // 50 :]]
        for values, alpha, width in ((losses, 0.15, 0.8), (curve, 1.0, 1.5)):
            # No line across the steps that a site has not seen.
            line = np.insert(steps, away, np.nan), np.insert(values, away, np.nan)
            ax.plot(*line, color=colour_of(site), alpha=alpha, linewidth=width)
        ax.lines[-1].set_label(f"site {site}")
    merged = common_losses(run)
    if merged:
        ax.plot(*zip(*merged, strict=True), "o", color=MERGED, markersize=5, markeredgecolor="white", zorder=4)
        ax.plot([], [], "o", color=MERGED, markersize=5, label="validation after a round, all sites")
    # Without the first 2 %, which would flatten the rest.
    finite = [value for value in (*curves, *(loss for _, loss in merged)) if np.isfinite(value)] or [0.0]
    pad = 0.06 * (max(finite) - min(finite)) or 0.1
    ax.set_ylim(min(finite) - pad, max(finite) + pad)
    ax.set_ylabel("nats per token")
    ax.legend(frameon=False, fontsize=10, ncols=1 if len(run.sites) < 5 else 2)
    title(ax, "Training loss of each site, and of what they have in common")


def gaps(steps: Series) -> list[int]:
    """Indices of the rows before which a site was away: some steps have no row, and others did them."""
    between = np.diff(steps)
    return [int(index) + 1 for index in np.flatnonzero(between > 1.5 * np.median(between))] if len(between) else []


def common_losses(run: SiteRun) -> list[tuple[int, float]]:
    """(step, validation loss) of the weights that rounds have left, which all members have alike."""
    after = {event["step"] for event in run.rounds}
    found: dict[int, float] = {}
    for history in run.sites.values():
        for step, loss in zip(series(history.valid, "step"), series(history.valid, "valid_loss"), strict=True):
            if int(step) in after and np.isfinite(loss):
                found.setdefault(int(step), float(loss))
    return sorted(found.items())


def _similarity(ax: Axes, events: Sequence[dict[str, Any]]) -> None:
    steps = [event["step"] for event in events]
    layers = [event["similarity"].values() for event in events]
    mean = [np.mean([layer["mean"] for layer in found]) for found in layers]
    largest = [max(layer["largest"] for layer in found) for found in layers]
    ax.plot(steps, largest, "o-", color=colour_of(1), markersize=4, label="most alike pair of all layers")
    ax.plot(steps, mean, "o-", color=colour_of(0), markersize=4, label="mean over pairs and layers")
    for done, marker, text in ((True, "D", "merged"), (False, "x", "merge given up")):
        at = [
            (step, value) for step, value, event in zip(steps, mean, events, strict=True) if event.get("merged") is done
        ]
        if at:
            ax.plot(*zip(*at, strict=True), marker, color=MERGED, markersize=6, label=text, linestyle="none", zorder=4)
    ax.set_ylim(min(0.0, *mean), max(1.08 * max(largest), 0.02))
    ax.legend(frameon=False, fontsize=10)
    title(ax, "Cosine of the gate matrices of two experts, before a merge")


def _seconds(ax: Axes, run: SiteRun) -> None:
    rounds = {event["round"]: event["step"] for event in run.rounds}
    for site, history in run.sites.items():
        mine = {event["round"]: event for event in history.events_in_force("sync")}
        for key, line, inside in (("seconds", "o-", colour_of(site)), ("wait_seconds", "o:", "white")):
            values = [mine[number][key] if number in mine else np.nan for number in rounds]
            style: dict[str, Any] = {"color": colour_of(site), "markersize": 3, "linewidth": 1.2}
            ax.plot(list(rounds.values()), values, line, markerfacecolor=inside, **style)
    ax.plot([], [], "o-", color=MUTED, markersize=3, label="exchanging and checking")
    ax.plot([], [], "o:", color=MUTED, markersize=3, markerfacecolor="white", label="waiting for the others")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds a round")
    ax.legend(frameon=False, fontsize=10)
    title(ax, "Time of each round")


def _sent(ax: Axes, run: SiteRun) -> None:
    for site, history in run.sites.items():
        sent = sent_bytes(history)
        if sent:
            ax.step(*zip(*sent, strict=True), where="post", color=colour_of(site), linewidth=1.5)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(byte_count))
    title(ax, "Sent to other sites so far, by rank 0 of each site")


def _strip(ax: Axes, run: SiteRun) -> None:
    """A row for each site, the first at the top; a cell reaches from the round before to its own."""
    rounds, numbers = run.rounds, run.numbers
    names = list(ROLES)
    cells = np.array([[names.index(role(site, event)) for event in rounds] for site in numbers])
    edges = [0, *(event["step"] for event in rounds)]
    colours = ListedColormap([colour for colour, _ in ROLES.values()])
    ax.pcolormesh(
        edges,
        np.arange(len(numbers) + 1) - 0.5,
        cells,
        cmap=colours,
        vmin=-0.5,
        vmax=len(names) - 0.5,
        edgecolors="white",
        linewidth=1.0 if len(rounds) <= 100 else 0.0,
    )
    ax.grid(False)
    ax.invert_yaxis()
    ax.set_yticks(range(len(numbers)), [f"site {site}" for site in numbers])
    keys: list[Artist] = [Patch(color=colour, label=text) for colour, text in ROLES.values()]
    handed = sorted({e["step"] for history in run.sites.values() for e in history.events_in_force("handover")})
    if handed:
        places = [len(numbers) - 0.5] * len(handed)
        keys += ax.plot(
            handed, places, "^", color=MERGED, markersize=7, clip_on=False, zorder=5, label="experts change owner"
        )
    ax.legend(handles=keys, frameon=False, fontsize=10, ncols=len(keys), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    title(ax, "Who was there")
