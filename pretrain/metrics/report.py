"""The report on one or several runs: pictures, a table as Markdown, a summary for the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pretrain.errors import RunDirectoryError
from pretrain.metrics.formats import count, duration, flop_count
from pretrain.metrics.history import History, read_histories, series
from pretrain.metrics.plot_moe import draw_moe
from pretrain.metrics.plot_sites import draw_sites
from pretrain.metrics.plots import draw_loss, draw_lr_and_grad_norm, draw_throughput
from pretrain.metrics.sites import site_lines, site_runs, with_sites

NONE = "-"


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.md`, `loss.png`, `throughput.png`, `lr_gradnorm.png` and, when any run has experts, `moe.png`; for
    a run whose sites have met `sites.png`, for several `sites_1.png` and so on.

    The directory of a run with sites stands for those of all its sites. Returns the folder: `out`, or `report` in the
    run, or `report` beside several runs. Raises RunDirectoryError for a folder that is no run, has no rows, or cannot
    be written to.
    """
    run_dirs = with_sites(run_dirs)
    histories = read_histories(run_dirs)
    folder = out or _default_folder(run_dirs)
    pictures: dict[str, Figure] = {
        "loss.png": draw_loss(histories),
        "throughput.png": draw_throughput(histories),
        "lr_gradnorm.png": draw_lr_and_grad_norm(histories),
    }
    if any(history.is_moe for history in histories):
        pictures["moe.png"] = draw_moe(histories)
    runs = site_runs(histories)
    for number, run in enumerate(runs):
        pictures[f"sites_{number + 1}.png" if len(runs) > 1 else "sites.png"] = draw_sites(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(folder / name, facecolor="white")
        (folder / "report.md").write_text(_markdown(histories, list(pictures)))
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: the report cannot be written ({error.strerror}): free space or pick another folder"
        ) from error
    return folder


def summary(run_dirs: Sequence[Path]) -> str:
    """The tables of the report as aligned lines: a figure a line and a run a column; then a growth a line, if any.
    Raises as `write_report`."""
    histories = read_histories(with_sites(run_dirs))
    growths = _growth_table(histories, GROWTH_SUMMARY)
    return "\n\n".join(_aligned(table) for table in (_table(histories), growths) if table)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def _default_folder(run_dirs: Sequence[Path]) -> Path:
    if len(run_dirs) == 1:
        return run_dirs[0] / "report"
    return Path(os.path.commonpath([path.resolve().parent for path in run_dirs])) / "report"


def _markdown(histories: Sequence[History], pictures: Sequence[str]) -> str:
    tables = [
        _markdown_table(table) for table in (_table(histories), _growth_table(histories, list(GROWTH_FIELDS))) if table
    ]
    images = [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join([f"# {', '.join(history.name for history in histories)}", *tables, NOTES, *images]) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


NOTES = """\
Losses are mean cross entropies in nats per token; bits per byte do not depend on the tokenizer. In the picture of the
loss, training curves in bits per byte use the tokens per byte of the validation text, and are approximate. FLOPs are
those of the model, forward and backward, without recomputation. Goodput is the time in training steps that were kept
over the wall time of the run, restarts included. Of a run that has grown, parameters and the median of tokens/s are
those of the model after its last growth."""


def _final_loss(history: History) -> str:
    """Mean of the last 2 % of rows, at least 10: a single step is noise."""
    losses = series(history.train, "loss")[-max(10, len(history.train) // 50) :]
    return f"{np.nanmean(losses):.3f}" if np.isfinite(losses).any() else NONE


def _best_valid(history: History) -> str:
    losses = series(history.valid, "valid_loss")
    if not np.isfinite(losses).any():
        return NONE
    best = history.valid[int(np.nanargmin(losses))]
    bits = best.get("valid_bits_per_byte")
    return f"{best['valid_loss']:.3f} at step {best['step']:,}" + ("" if bits is None else f" ({bits:.3f} bits/byte)")


def _baseline(history: History) -> str:
    event = history.last_event("baselines") or {}
    parts = [
        f"{name} {event[f'{name}_bits_per_byte']:.3f}"
        for name in ("unigram", "bigram")
        if f"{name}_bits_per_byte" in event
    ]
    return f"{', '.join(parts)} bits/byte" if parts else NONE


def _parameters(history: History) -> str:
    """Of the model as it is now."""
    if growths := history.events_in_force("growth"):
        return f"{count(growths[-1]['parameters_after'])} / {count(growths[-1]['active_after'])}"
    parameters = history.manifest.get("parameters", {})
    if "total" not in parameters:
        return NONE
    return f"{count(parameters['total'])} / {count(parameters.get('active', parameters['total']))}"


def _goodput(history: History) -> str:
    event = history.last_event("goodput")
    if event is None:
        return NONE
    wall, seconds = event["wall_seconds"], event["seconds"]
    causes = sorted((name for name in seconds if name != "step"), key=seconds.__getitem__, reverse=True)
    rest = ", ".join(f"{name} {seconds[name] / wall:.1%}" for name in causes if seconds[name] >= 0.001 * wall)
    return f"{event['goodput']:.1%}" + (f" ({rest})" if rest else "")


def _median_rate(history: History) -> str:
    return f"{np.nanmedian(series(history.latest_train, 'tokens_per_second')):,.0f}"


FIELDS: dict[str, Callable[[History], str]] = {
    "parameters, total / active": _parameters,
    "steps": lambda history: f"{history.train[-1]['step']:,}",
    "tokens": lambda history: count(history.train[-1]["tokens"]),
    "model FLOPs": lambda history: flop_count(history.train[-1]["flops"]),
    "final training loss": _final_loss,
    "best validation": _best_valid,
    "baselines": _baseline,
    "tokens/s, median": _median_rate,
    "wall time": lambda history: duration(history.wall_seconds),
    "goodput": _goodput,
    "restarts": lambda history: str(len(history.restarts)),
    "skipped steps": lambda history: str(len(history.events_in_force("skip"))),
}


def _table(histories: Sequence[History]) -> list[list[str]]:
    """Lines of cells: the names of the runs, then a figure a line."""
    names = ["", *(history.name for history in histories)]
    lines = [[field, *map(figure, histories)] for field, figure in FIELDS.items()]
    return [names, *lines, *site_lines(histories)]


GROWTH_FIELDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "grown after step": lambda event: f"{event['step']:,}",
    "what grew": lambda event: str(event["summary"]),
    "parameters": lambda event: _change(event, "parameters", count),
    "active": lambda event: _change(event, "active", count),
    "FLOPs/token": lambda event: _change(event, "flops_per_token", flop_count),
    "validation loss": lambda event: _change(event, "valid_loss", "{:.3f}".format),
    "logits changed by": lambda event: _given(event, "logits_change", "{:.1%}".format),
    "seconds": lambda event: _given(event, "seconds", "{:.1f}".format),
    "optimizer state": lambda event: str(event["state"]),
}


# What fits a terminal.
GROWTH_SUMMARY = ("grown after step", "what grew", "parameters", "validation loss", "seconds")


def _growth_table(histories: Sequence[History], fields: Sequence[str]) -> list[list[str]]:
    """Lines of cells: a head, then each growth in force of each run; empty when no run has grown."""
    names = [history.name for history in histories for _ in history.events_in_force("growth")]
    events = [event for history in histories for event in history.events_in_force("growth")]
    if not events:
        return []
    table = [list(fields), *([GROWTH_FIELDS[field](event) for field in fields] for event in events)]
    if len(histories) == 1:
        return table
    return [[name, *line] for name, line in zip(["run", *names], table, strict=True)]


def _change(event: dict[str, Any], key: str, text: Callable[[float], str]) -> str:
    before, after = _given(event, f"{key}_before", text), _given(event, f"{key}_after", text)
    return NONE if before == after == NONE else f"{before} -> {after}"


def _given(event: dict[str, Any], key: str, text: Callable[[float], str]) -> str:
    """A dash for a figure that was not taken, is not finite, or went with a process that was killed."""
    value = event.get(key)
    return NONE if value is None else text(value)
