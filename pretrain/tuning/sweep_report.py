"""The report of a sweep: README.md, results.json and pictures, every figure computed from its trials."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pretrain.run_directory import write_atomically
from pretrain.tuning.descent import Descent
from pretrain.tuning.ledger import LEDGER_FILE, Ledger, Row
from pretrain.tuning.markdown import table
from pretrain.tuning.phases import Check, Fit, Tuning
from pretrain.tuning.sweep_file import Cell, Sweep
from pretrain.tuning.sweep_pictures import draw_fits, draw_near_optimal, draw_one_off, draw_progress

REPORT_FILE, RESULTS_FILE = "README.md", "results.json"
NONE = "-"


def write_report(sweep: Sweep, tunings: Sequence[Tuning], ledger: Ledger, *, finished: bool) -> str:
    """Write the report into the sweep's directory; returns its summary. Cells whose search has not ended are left
    out."""
    out = sweep.written.directory
    pictures = _draw(sweep, tunings)
    for name, figure in pictures.items():
        figure.savefig(out / name, facecolor="white")
    write_atomically(out / RESULTS_FILE, json.dumps(to_json(sweep, tunings, ledger), indent=1) + "\n")
    write_atomically(out / REPORT_FILE, markdown(sweep, tunings, ledger, pictures=list(pictures), finished=finished))
    return f"{_best_losses(sweep, tunings)}\n\nsee: {out / REPORT_FILE}"


def markdown(
    sweep: Sweep, tunings: Sequence[Tuning], ledger: Ledger, *, pictures: Sequence[str], finished: bool
) -> str:
    """README.md of the sweep."""
    parts = [
        f"# Sweep {sweep.file.stem}",
        _setting(sweep, ledger, finished=finished),
        "## Best losses",
        _best_losses(sweep, tunings),
        _noise(sweep, tunings, ledger),
    ]
    for tuning in tunings:
        if tuning.searches:
            parts += [f"## {tuning.optimizer}", _best_settings(sweep, tuning)]
        if tuning.sensitivity:
            parts.append(_sensitivity(tuning))
        parts += [_law(law) for law in tuning.fits.values()]
        parts += [_verdict(cell, tuning.checks[cell.name]) for cell in sweep.cells if cell.name in tuning.checks]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += ["## Failed trials", _failures(ledger)]
    return "\n\n".join(parts) + "\n"


def _setting(sweep: Sweep, ledger: Ledger, *, finished: bool) -> str:
    written = sweep.written
    cells = table(
        ["cell", "phase", "non-embedding parameters", "tokens", "ratio"],
        [
            [cell.name, str(cell.phase), f"{cell.model_size:,}", f"{cell.tokens:,}", f"{cell.ratio:.3g}"]
            for cell in sweep.cells
        ],
    )
    state = (
        ""
        if finished
        else "\n\n**Not finished**: only searches that have ended are shown. Give the command again to go on."
    )
    return (
        f"    pretrain sweep {sweep.file}\n\n{len(ledger.rows)} trials ({LEDGER_FILE}), seeds "
        f"{', '.join(map(str, written.seeds))}; losses are final validation losses in nats per token, means over "
        f"seeds. A change was accepted when it lowered the loss by more than {written.threshold:g}; within "
        f"{written.margin:g} of the best counts as optimal.{state}\n\n{cells}"
    )


def _best_losses(sweep: Sweep, tunings: Sequence[Tuning]) -> str:
    searched = sweep.cells_of(1, 2)
    rows = [[tuning.optimizer, *(_loss(tuning, cell) for cell in searched)] for tuning in tunings]
    return table(["optimizer", *(cell.name for cell in searched)], rows)


def _loss(tuning: Tuning, cell: Cell) -> str:
    found = tuning.searches.get(cell.name)
    return f"{found.loss:.4f} ({len(found.losses)} tried)" if found else NONE


def _noise(sweep: Sweep, tunings: Sequence[Tuning], ledger: Ledger) -> str:
    """Whether the thresholds exceed what seeds change."""
    deviation, written = seed_deviation(tunings, ledger), sweep.written
    if deviation is None:
        return (
            "**One seed only**: what another one changes is not known, so whether the threshold and the margin exceed "
            "it is not, either. Give several seeds before differences of this size are believed."
        )
    of_mean = deviation / math.sqrt(len(written.seeds))
    # Two means differ by sqrt(2) as much as one varies.
    enough = written.threshold > math.sqrt(2) * of_mean
    verdict = "more than that" if enough else "**not more than that: raise it, or give more seeds**"
    return (
        f"Standard deviation over seeds, of the best configurations: {deviation:.2g}; of a difference of two means of "
        f"{len(written.seeds)} seeds: {math.sqrt(2) * of_mean:.2g}. The threshold, {written.threshold:g}, is {verdict}."
    )


def seed_deviation(tunings: Sequence[Tuning], ledger: Ledger) -> float | None:
    """Standard deviation of a loss over seeds, pooled over the best configurations; None when there is one seed."""
    variances = []
    for tuning in tunings:
        for cell, found in tuning.searches.items():
            losses = [row.loss for row in _rows_of(ledger, tuning.optimizer, cell, dict(found.best))]
            if len(losses) > 1:
                variances.append(statistics.variance(losses))
    return math.sqrt(statistics.fmean(variances)) if variances else None


def _rows_of(ledger: Ledger, optimizer: str, cell: str, settings: Mapping[str, Any]) -> list[Row]:
    wanted = (optimizer, cell, settings)
    return [row for row in ledger.rows.values() if (row.optimizer, row.cell, row.settings) == wanted]


def _best_settings(sweep: Sweep, tuning: Tuning) -> str:
    keys = list(sweep.written.optimizer[tuning.optimizer].grid)
    rows = []
    for cell in sweep.cells:
        if found := tuning.searches.get(cell.name):
            best = dict(found.best)
            at_end = [
                f"`{key}`" for key in keys if _at_end(best[key], sweep.written.optimizer[tuning.optimizer].grid[key])
            ]
            rows.append([cell.name, f"{found.loss:.4f}", *(str(best[key]) for key in keys), ", ".join(at_end) or NONE])
    return table(["cell", "loss", *(f"`{key}`" for key in keys), "at an end of its grid"], rows)


def _at_end(value: Any, values: Sequence[Any]) -> bool:
    """Whether a better value may lie beyond the grid."""
    numbers = [entry for entry in values if isinstance(entry, int | float) and not isinstance(entry, bool)]
    return len(numbers) == len(values) > 2 and value in (min(numbers), max(numbers))


def _sensitivity(tuning: Tuning) -> str:
    rows = [
        [f"`{key}`", "**sensitive**" if found.sensitive else "insensitive", ", ".join(map(str, found.values))]
        for key, found in tuning.sensitivity.items()
    ]
    return (
        "Insensitive: one value is near-optimal in every cell of phase 1. Sensitive: none is; the fewest values that "
        f"serve all of them.\n\n{table(['hyperparameter', '', 'values'], rows)}"
    )


def _law(law: Fit) -> str:
    a, b, g, d = law.law.a, law.law.b, law.law.g, law.law.d
    fitted = f"`{law.key}` = {a:.3g} N^{b:.3g} C^{g:.3g} + {d:.3g}, fitted to {len(law.points)} cells"
    if not law.law.warning:
        return f"{fitted}."
    text = f"{fitted}. **Warning**: {law.law.warning}."
    if law.logs is not None and law.uses_logs:
        size, ratio = law.logs.slopes
        text += (
            f" Predictions are those of a law in logarithms instead: exponents {size:.2f} of N and {ratio:.2f} of C."
        )
    return text


def _verdict(cell: Cell, check: Check) -> str:
    losses = ", ".join(f"x{factor:g}: {loss:.4f}" for factor, loss in check.losses.items())
    said = ", ".join(f"`{key}` {value:.4g} -> {dict(check.settings)[key]}" for key, value in check.predicted.items())
    verdict = "**stood**" if check.stood else "**did not stand**"
    return (
        f"Prediction for {cell.name}: {said or 'nothing is sensitive, so as in the nearest cell'} (law -> nearest "
        f"value of the grid). It {verdict}: losses by factor on the learning rate {losses}; a difference counts from "
        f"{check.threshold:g} on."
    )


def _failures(ledger: Ledger) -> str:
    failed = [row for row in ledger.rows.values() if row.reason]
    rows = [[row.key, row.optimizer, row.cell, str(row.seed), _one_line(row)] for row in failed]
    return table(["trial", "optimizer", "cell", "seed", "settings: reason"], rows) if rows else "None."


def _one_line(row: Row) -> str:
    values = ", ".join(f"{key} = {value}" for key, value in row.settings.items())
    return f"{values}: {row.reason}".replace("|", "/")


def _searches(sweep: Sweep, tuning: Tuning, *phases: int) -> dict[str, Descent]:
    """Searches that have ended, in the order of the cells."""
    return {cell.name: tuning.searches[cell.name] for cell in sweep.cells_of(*phases) if cell.name in tuning.searches}


def _draw(sweep: Sweep, tunings: Sequence[Tuning]) -> dict[str, Figure]:
    """Pictures by file name."""
    pictures = {}
    ended = {tuning.optimizer: _searches(sweep, tuning, 1, 2) for tuning in tunings if tuning.searches}
    if ended:
        pictures["progress.png"] = draw_progress(ended)
    for tuning in tunings:
        name, grid = tuning.optimizer, sweep.written.optimizer[tuning.optimizer].grid
        if name in ended:
            pictures[f"one-off-{name}.png"] = draw_one_off(ended[name], grid)
        if tuning.sensitivity:
            first = _searches(sweep, tuning, 1)
            pictures[f"near-optimal-{name}.png"] = draw_near_optimal(first, grid, sweep.written.margin)
        if tuning.fits:
            pictures[f"fit-{name}.png"] = draw_fits(tuning.fits, sweep.cells, tuning.checks)
    return pictures


def to_json(sweep: Sweep, tunings: Sequence[Tuning], ledger: Ledger) -> dict[str, Any]:
    """results.json: what was found, by optimizer and cell."""
    return {
        "threshold": sweep.written.threshold,
        "margin": sweep.written.margin,
        "seeds": list(sweep.written.seeds),
        "seed_deviation": seed_deviation(tunings, ledger),
        "trials": len(ledger.rows),
        "cells": {
            cell.name: {"phase": cell.phase, "model_size": cell.model_size, "tokens": cell.tokens, "ratio": cell.ratio}
            for cell in sweep.cells
        },
        "optimizers": {tuning.optimizer: _tuning_json(sweep, tuning) for tuning in tunings},
    }


def _tuning_json(sweep: Sweep, tuning: Tuning) -> dict[str, Any]:
    return {
        "best": {
            cell: {
                "loss": found.loss,
                "settings": dict(found.best),
                "tried": len(found.losses),
                "baselines": len(found.baselines),
            }
            for cell, found in _searches(sweep, tuning, 1, 2).items()
        },
        "sensitive": {
            key: {"sensitive": found.sensitive, "values": list(found.values)}
            for key, found in tuning.sensitivity.items()
        },
        "fits": {
            key: {
                **{name: getattr(law.law, name) for name in ("a", "b", "g", "d", "identifiable", "warning")},
                "exponents_in_logarithms": list(law.logs.slopes) if law.logs else None,
            }
            for key, law in tuning.fits.items()
        },
        "checks": {
            cell: {
                "predicted": dict(check.predicted),
                "settings": dict(check.settings),
                # JSON has no word for infinity.
                "losses": {f"{f:g}": loss if math.isfinite(loss) else None for f, loss in check.losses.items()},
                "stood": check.stood,
            }
            for cell, check in tuning.checks.items()
        },
    }
