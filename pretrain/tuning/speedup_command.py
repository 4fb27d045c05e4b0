"""`pretrain speedup`: token speed-ups over a baseline, of finished runs or of the published losses."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pretrain.config.load import load_config
from pretrain.config.published import data_ratio, published
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.errors import RunDirectoryError, UserError
from pretrain.metrics.drawing import MUTED, colour_of, legend_below, new_figure, title
from pretrain.metrics.formats import count
from pretrain.metrics.history import History, read_histories
from pretrain.model.counts import count_parameters
from pretrain.run_directory import CONFIG_FILE
from pretrain.tuning.speedup import THRESHOLD, Result, SizeSpeedUps, SpeedUp, speed_ups

logger = logging.getLogger(__name__)

PICTURE = "speedup.png"
NOTES = """\
1x is 20 tokens per non-embedding parameter (of a mixture of experts, those active per token). A speed-up counts
tokens, not time. * the baseline would need less or more data than any of its runs had: its curve is extrapolated.
never: its curve does not fall that far."""


def speedup(run_dirs: Sequence[Path], *, baseline: str, out: Path, as_json: bool, use_published: bool) -> int:
    """Print the speed-ups, as a table or JSON, and draw them to `out`; returns the exit code. Raises UserError."""
    if bool(run_dirs) == use_published:
        raise UserError("give run directories, or --published for the published losses, and not both")
    results = published_results() if use_published else read_results(run_dirs)
    sizes = speed_ups(results, baseline=baseline)
    picture = _save(draw(sizes), out)
    if as_json:
        print(json.dumps([to_json(size) for size in sizes], indent=2))
    else:
        print("\n\n".join([*map(table, sizes), NOTES]) + f"\npicture: {picture}")
    return 0


def published_results() -> list[Result]:
    """The best losses of arXiv 2509.02046."""
    return [
        Result(cell.kind, cell.model_size, cell.ratio, cell.loss)
        for cells in published().values()
        for cell in cells
        if cell.loss is not None
    ]


def read_results(run_dirs: Sequence[Path]) -> list[Result]:
    """The final validation losses of finished runs; those that are not finite are left out, and named in the log.

    Raises RunDirectoryError for a folder that is no run, and for a run that is not finished or was not validated then.
    """
    results = [_result(history) for history in read_histories(run_dirs)]
    return [result for result in results if result is not None]


def _result(history: History) -> Result | None:
    path = history.directory / CONFIG_FILE
    if not path.exists():
        raise RunDirectoryError(f"{history.directory}: no {CONFIG_FILE} in it: give the directory of a run")
    config = load_config(path)
    done, steps = history.train[-1]["step"], config.total_steps
    if done < steps:
        raise RunDirectoryError(
            f"{history.directory}: not finished, at step {done:,} of {steps:,}: go on with it, or leave it out"
        )
    last = history.valid[-1] if history.valid else {"step": 0}
    if last["step"] < done:
        raise RunDirectoryError(f"{history.directory}: no validation at its end: set eval.every_steps for such runs")
    if last["valid_loss"] is None or not math.isfinite(last["valid_loss"]):
        logger.warning("%s: diverged, left out", history.directory)
        return None
    size = model_size(config)
    return Result(config.optim.kind, size, data_ratio(last["tokens"], size), last["valid_loss"])


def model_size(config: Config) -> int:
    """Non-embedding parameters that are active per token, of the model that a run ends with."""
    return count_parameters(stages(config)[-1].config.model).active_non_embedding


def table(size: SizeSpeedUps) -> str:
    """Speed-ups at one model size: an optimizer a line, a data ratio a column."""
    curve = size.curve
    ratios = sorted({row.ratio for row in size.rows})
    cells = {(row.optimizer, row.ratio): row for row in size.rows}
    names = list(dict.fromkeys(row.optimizer for row in size.rows))
    lines = [["speed-up", *(f"{ratio:.3g}x" for ratio in ratios)]]
    lines += [[name, *(_cell(cells.get((name, ratio))) for ratio in ratios)] for name in names]
    width = max(len(line[0]) for line in lines)
    share = curve.resolution(size.largest_ratio, THRESHOLD)
    return "\n".join(
        [
            f"{count(size.model_size)} parameters; {_formula(size)}",
            *("  ".join([line[0].ljust(width), *(cell.rjust(6) for cell in line[1:])]) for line in lines),
            f"an error of {THRESHOLD:g} in a loss at {size.largest_ratio:.3g}x changes its speed-up by {share:.1%}",
        ]
    )


def _formula(size: SizeSpeedUps) -> str:
    curve = size.curve
    law = f"L = {curve.a:.3f} D^-{curve.b:.3f} + {curve.c:.3f}"
    fitted = f"{curve.ratios[0]:.3g}x to {curve.ratios[-1]:.3g}x"
    return f"{size.baseline}: {law} from {fitted}, off by up to {curve.residual:.2g}"


def _cell(row: SpeedUp | None) -> str:
    """A speed-up; a star where the curve is extrapolated, `never` where the baseline does not get there."""
    if row is None:
        return "-"
    if not math.isfinite(row.factor):
        return "never"
    return f"{row.factor:.2f}{'*' if row.extrapolated else ' '}"


def to_json(size: SizeSpeedUps) -> dict[str, Any]:
    """Plain numbers; null for what is infinite."""
    curve = size.curve
    return {
        "model_size": size.model_size,
        "baseline": size.baseline,
        "curve": {"a": curve.a, "b": curve.b, "c": curve.c, "ratios": curve.ratios, "residual": curve.residual},
        "threshold": THRESHOLD,
        "resolution": curve.resolution(size.largest_ratio, THRESHOLD),
        "rows": [
            {
                "optimizer": row.optimizer,
                "ratio": row.ratio,
                "loss": row.loss,
                "effective_ratio": row.effective_ratio if math.isfinite(row.effective_ratio) else None,
                "speed_up": row.factor if math.isfinite(row.factor) else None,
                "extrapolated": row.extrapolated,
            }
            for row in size.rows
        ],
    }


def draw(sizes: Sequence[SizeSpeedUps]) -> Figure:
    """A column a model size: losses with the baseline's curve above, speed-ups below."""
    figure, axes = new_figure(
        2, len(sizes), width=max(7.0, 4.2 * len(sizes)), height=8.0, sharex="col", sharey="row", squeeze=False
    )
    names = list(dict.fromkeys(row.optimizer for size in sizes for row in size.rows))
    for column, size in enumerate(sizes):
        above, below = axes[0][column], axes[1][column]
        _draw_size(above, below, size, names)
        title(above, f"{count(size.model_size)} parameters")
        below.set_xlabel("tokens per 20 parameters")
    title(axes[1][0], f"speed-up (grey: an error of {THRESHOLD:g} in a loss)")
    axes[0][0].set_ylabel("final validation loss, nats per token")
    axes[1][0].set_ylabel(f"tokens of {sizes[0].baseline} per token")
    # The size at which the most optimizers were run names them.
    legend_below(figure, max((column[0] for column in axes.T), key=lambda ax: len(ax.lines)))
    return figure


def _draw_size(above: Axes, below: Axes, size: SizeSpeedUps, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        rows = [row for row in size.rows if row.optimizer == name]
        style: dict[str, Any] = {
            "color": colour_of(index),
            "marker": "osv^"[index // 7],
            "markersize": 5,
            "label": name,
        }
        ratios = [row.ratio for row in rows]
        if rows:
            above.plot(ratios, [row.loss for row in rows], linestyle="none", **style)
            below.plot(ratios, [row.factor for row in rows], **style)
    curve = size.curve
    fitted = np.geomspace(curve.ratios[0], curve.ratios[-1], 100)
    above.plot(fitted, [curve.loss(ratio) for ratio in fitted], color=MUTED, zorder=1)
    shares = np.array([curve.resolution(ratio, THRESHOLD) for ratio in fitted])
    below.fill_between(fitted, 1 - shares, 1 + shares, color=MUTED, alpha=0.2, linewidth=0)
    above.set_xscale("log", base=2)
    above.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:.3g}x"))
    above.xaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / PICTURE, facecolor="white")
    except OSError as error:
        raise RunDirectoryError(
            f"--out {out}: cannot be written ({error.strerror}): free space or pick another folder"
        ) from error
    return out / PICTURE
