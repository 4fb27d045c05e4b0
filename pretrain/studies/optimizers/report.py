"""The report of the study of optimizers in words and tables, every one of them computed from the runs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from pretrain.errors import UserError
from pretrain.metrics.formats import duration
from pretrain.studies.evidence import claims_json, claims_table, interval, json_number, plus_minus, summary_of
from pretrain.studies.optimizers.cases import (
    FIRST,
    FULL,
    HALF,
    LARGE_DECAY,
    LONGEST,
    MOE,
    SCALED,
    SMALL_DECAY,
    START,
    UNDERTUNED,
    Case,
    Study,
    noise_of,
)
from pretrain.studies.optimizers.claims import EQUAL_SHARE, judge, lower_rate, mean_speed_ups
from pretrain.studies.optimizers.pictures import compared
from pretrain.studies.optimizers.protocol import TUNING_SEED
from pretrain.studies.optimizers.sensitive import OneOff, one_offs, sensitive_rates
from pretrain.studies.statistics import finite_spread
from pretrain.tuning.markdown import table
from pretrain.tuning.sensitivity import Value
from pretrain.tuning.speedup import SizeSpeedUps
from pretrain.tuning.speedup_command import table as speed_up_table

NONE = "-"
LOSSES_PICTURE, SPEED_UP_PICTURE, FLIP_PICTURE = "losses.png", "speedup.png", "rank_flip.png"

HOW_TO_READ = f"""\
*Here*: the mean over seeds of what the second column names, positive where it speaks for the claim, and in brackets its
95 % confidence interval (Student's t); cases of one seed share their data and their order. *Reproduced* and *not
reproduced* need the whole interval on one side of zero or, where a margin is named, within or outside +- it
({EQUAL_SHARE:.0%} of what Muon gains over AdamW there). All else is *not resolved*: the noise of these seeds hides it.
The verdicts are not corrected for their number."""

LIMITS = """\
What limits it: models of 30 to 110 thousand parameters and a few hundred to a thousand steps, on one corpus, at one
batch size. Only the first cell was searched in full, from one start, by a method that sees one hyperparameter at a time
and with one seed; everywhere else two learning rates were tried, so that a better one may lie beyond. Speed-ups count
tokens, not time, and are larger here than where models are trained for long. AdamW, NAdamW, Lion and SOAP have a
warm-up and a cosine, Muon no warm-up and a straight line, as each wants: ranks on the way are those of the schedules,
too."""


def markdown(study: Study) -> str:
    """README.md of the study."""
    return (
        "\n\n".join(
            [
                "# Which optimizer, and how well tuned?",
                _setting(study),
                "## What holds here",
                summary(study),
                claims_table(judge(study)),
                HOW_TO_READ,
                LIMITS,
                "## Final losses",
                _losses_table(study),
                _single_cases(study),
                f"![Final losses]({LOSSES_PICTURE})",
                "## Token speed-ups over AdamW",
                *_speed_up_parts(study),
                "## Noise and thresholds",
                _noise_text(study),
                "## Tuned hyperparameters",
                _tuned_table(study),
                "## What matters",
                _sensitivity_text(study),
                _sensitivity_table([*one_offs(study)]),
                "## Learning rates over data and size",
                _rates_text(study),
                _rates_table(study),
                "## Ranks on the way",
                f"![Ranks on the way]({FLIP_PICTURE})",
                "## Mixture of experts",
                _moe_text(study),
                _moe_table(study),
            ]
        )
        + "\n"
    )


def _setting(study: Study) -> str:
    machine = "; ".join(f"{name} {value}" for name, value in study.machine.items())
    cells = table(
        ["cell", "non-embedding parameters", "tokens", "tokens per 20 parameters"],
        [[cell.name, f"{cell.model_size:,}", f"{cell.tokens:,}", f"{cell.ratio:.3g}"] for cell in study.sweep.cells],
    )
    return (
        f"Written by\n\n    {shlex.join(study.command)}\n\non {machine}.\n\n{study.runs} runs, "
        f"{duration(study.core_seconds)} of one core in all; seeds {', '.join(map(str, study.seeds))}, and "
        f"{TUNING_SEED} for tuning. Losses are final validation losses in nats per token, on the same batches for all; "
        f"text: the sources of Python's standard library.\n\n{cells}"
    )


def summary(study: Study) -> str:
    """What holds here, in a few lines."""
    return summary_of(judge(study), len(study.seeds))


def _loss(study: Study, case: Case) -> str:
    found = finite_spread(study.losses[case])
    failed = len(study.losses[case]) - found.seeds
    return plus_minus(found) + (f" ({failed} failed)" if failed and found.seeds else "")


def _losses_table(study: Study) -> str:
    cells = compared(study)
    dense = [cell.name for cell in study.sweep.cells]
    rows = []
    for name in study.descents:
        found = {cell: next((case for case in cells[cell] if case.optimizer == name), None) for cell in dense}
        rows.append([name, *(_loss(study, case) if case else NONE for case in found.values())])
    return (
        table(["optimizer", *dense], rows) + "\n\nMean over seeds +- standard deviation of one seed; beyond the first "
        "cell, of the better of two learning rates."
    )


def _single_cases(study: Study) -> str:
    """Cases that put one finding to the test, beside the tuned optimizer."""
    cases = [
        Case("adamw", FIRST, UNDERTUNED),
        Case("adamw"),
        Case("lion", FIRST, SMALL_DECAY),
        Case("lion", FIRST, LARGE_DECAY),
    ]
    return table([f"at {FIRST}", "loss"], [[f"{case.optimizer}, {case.variant}", _loss(study, case)] for case in cases])


def speed_ups_of(study: Study) -> SizeSpeedUps | str:
    """Speed-ups from mean losses, or why there are none."""
    try:
        return mean_speed_ups(study)
    except UserError as error:
        return str(error)


def _speed_up_parts(study: Study) -> Iterator[str]:
    size = speed_ups_of(study)
    if isinstance(size, str):
        yield f"None: {size}."
        return
    yield "```\n" + speed_up_table(size) + "\n```"
    noise = noise_of(study.losses) / math.sqrt(len(study.seeds))
    share = size.curve.resolution(size.largest_ratio, noise)
    yield (
        "From mean losses. A star: AdamW's curve is extrapolated there. The curve has as many parameters as points, so "
        f"it goes through them whatever their noise: {noise:.2g} in a mean, which is what seeds change, moves a "
        f"speed-up at {size.largest_ratio:.3g}x by {share:.0%}."
    )
    yield f"![Speed-ups]({SPEED_UP_PICTURE})"


def _noise_text(study: Study) -> str:
    written = study.sweep.written
    rows = [[case.optimizer, _loss(study, case)] for case in study.losses if case.variant == START]
    source = (
        "D1 is the standard deviation, from seed to seed, of the difference of two first guesses with the same seed, "
        "pooled over all pairs; D2 is twice as much."
        if noise_of(study.losses)
        else "Both are those of the study's file: one seed tells nothing of noise."
    )
    return (
        f"In the search a change was accepted when it lowered the loss by more than D1 = {written.threshold:.3g}; "
        f"within D2 = {written.margin:.3g} of the best counts as optimal (3e-3 and 6.4e-3 in arXiv 2509.02046, for "
        f"models a thousand times as large). {source}\n\n{table([f'first guess at {FIRST}', 'loss'], rows)}"
    )


def _tuned_table(study: Study) -> str:
    rows = []
    for name, descent in study.descents.items():
        best = ", ".join(f"`{key}` {_value(value)}" for key, value in descent.best)
        lr, grid = study.sweep.written.optimizer[name].lr, study.sweep.written.optimizer[name].grid
        at_end = dict(descent.best)[lr] in (min(grid[lr]), max(grid[lr]))
        rows.append([name, best, str(len(descent.losses)), f"{descent.loss:.4f}", "**yes**" if at_end else NONE])
    head = ["optimizer", f"best at {FIRST}", "tried", f"loss with seed {TUNING_SEED}", "rate at an end of its grid"]
    return table(head, rows)


def _sensitivity_text(study: Study) -> str:
    rates = sensitive_rates(study)
    words = [
        f"{name} {'sensitive' if one.sensitive else 'insensitive'} ({', '.join(f'{float(v):g}' for v in one.values)})"
        for name, one in rates.items()
    ]
    return (
        f"How the loss at {FIRST} changes when one hyperparameter alone leaves the last baseline of the search. It "
        "matters when some value costs more than D2. The learning rate over all cells, sensitive when no value is "
        f"within D2 of the best in every cell: {'; '.join(words) or NONE}."
    )


def _sensitivity_table(found: Sequence[OneOff]) -> str:
    rows = [
        [
            one.optimizer,
            f"`{one.key}`",
            _value(one.best),
            ", ".join(f"{_value(value)}: {_change(change)}" for value, change in one.changes.items()),
            "**matters**" if one.matters else NONE,
        ]
        for one in found
    ]
    return table(["optimizer", "hyperparameter", "baseline", "other values: change of the loss", ""], rows)


def _value(value: Value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _change(change: float) -> str:
    return f"{change:+.4f}" if math.isfinite(change) else "failed"


def _rates_text(study: Study) -> str:
    rows = []
    for cell in study.sweep.cells[1:]:
        found = [finite_spread(lower_rate(study, cell.name, name)) for name in SCALED]
        rows.append([cell.name, *map(interval, found)])
    return (
        f"Beyond {FIRST}, each of these was trained with its best rate there and with half of it. What halving gains "
        f"in a cell, less what it gains at {FIRST}:\n\n" + table(["cell", *SCALED], rows)
    )


def _rates_table(study: Study) -> str:
    rows = []
    for name in SCALED:
        for variant in (FULL, HALF):
            cases = [Case(name, cell.name, variant) for cell in study.sweep.cells]
            rate = dict(study.settings[cases[0]])[study.sweep.written.optimizer[name].lr]
            rows.append([name, _value(rate), *(_loss(study, case) for case in cases)])
    return table(["optimizer", "rate", *(cell.name for cell in study.sweep.cells)], rows)


def _moe_text(study: Study) -> str:
    sweeps = "; ".join(
        f"{one.optimizer} " + ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in one.rates.items())
        for one in study.moe
    )
    return (
        f"As many active parameters and tokens as {FIRST}, with 8 experts of which 2 see a token. Hyperparameters as "
        f"tuned at {FIRST}, with the best of three learning rates (loss with seed {TUNING_SEED} by rate: {sweeps})."
    )


def _moe_table(study: Study) -> str:
    names = {"adamw": "AdamW", "muon": "Muon, routers on AdamW", "muon-router": "Muon, routers on Muon"}
    rows = [[names[one.optimizer], f"{one.best:g}", _loss(study, Case(one.optimizer, MOE))] for one in study.moe]
    return table(["mixture of experts", "rate", "loss"], rows)


def to_json(study: Study) -> dict[str, Any]:
    """results.json: every figure that the report is made from, and the verdicts. What is infinite or no number is
    null."""
    return {
        "command": shlex.join(study.command),
        "machine": dict(study.machine),
        "runs": study.runs,
        "core_seconds": round(study.core_seconds),
        "threshold": study.sweep.written.threshold,
        "margin": study.sweep.written.margin,
        "cells": {
            cell.name: {"model_size": cell.model_size, "tokens": cell.tokens, "ratio": cell.ratio}
            for cell in study.sweep.cells
        },
        "cases": [
            {
                **case._asdict(),
                "settings": dict(study.settings[case]),
                "losses": {str(seed): json_number(loss) for seed, loss in by_seed.items()},
            }
            for case, by_seed in study.losses.items()
        ],
        "searches": {
            name: [{"settings": dict(one), "loss": json_number(loss)} for one, loss in descent.losses.items()]
            for name, descent in study.descents.items()
        },
        "moe_rates": {
            one.optimizer: {f"{rate:g}": json_number(loss) for rate, loss in one.rates.items()} for one in study.moe
        },
        "on_the_way": [
            {
                **case._asdict(),
                "curves": {str(seed): [list(point) for point in curve] for seed, curve in by_seed.items()},
            }
            for case, by_seed in study.curves.items()
            if case.cell == LONGEST
        ],
        "claims": claims_json(judge(study)),
    }
