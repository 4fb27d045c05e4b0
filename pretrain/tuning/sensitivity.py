"""Which hyperparameters have to be tuned anew at another size, from the near-optimal trials of several cells.

A cell is one model size with one number of tokens. Its near-optimal set holds the trials whose loss is below the best
loss plus a margin. A hyperparameter is insensitive if one of its values occurs in the near-optimal sets of all cells,
and sensitive otherwise (arXiv 2509.02046, phase II).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Value = float | int | str | bool


@dataclass(frozen=True)
class Trial:
    """One finished run of a cell."""

    settings: Mapping[str, Value]
    """Every hyperparameter that was tuned, by its key."""
    loss: float
    """Final validation loss, nats per token; inf or NaN when it diverged."""


@dataclass(frozen=True)
class Sensitivity:
    """What is known of one hyperparameter."""

    key: str
    sensitive: bool
    values: tuple[Value, ...]
    """The one value that serves all cells; or else the fewest values of which every cell has one that serves it."""


def near_optimal(trials: Iterable[Trial], margin: float) -> list[Trial]:
    """The trials with a loss below the best plus `margin`, the best first. Empty when none is finite."""
    finite = sorted((trial for trial in trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss)
    return [trial for trial in finite if trial.loss < finite[0].loss + margin or trial is finite[0]]


def find_sensitive(cells: Mapping[str, Sequence[Trial]], margin: float) -> dict[str, Sensitivity]:
    """What the trials of all cells say of every hyperparameter, by key.

    Where several values, or sets of values of one size, would serve, those with the lowest losses are named.

    Args:
        cells: trials by name of the cell; all set the same keys.
        margin: nats above the best loss of a cell that still count as optimal (published: 6.4e-3). It must exceed what
            another seed changes.

    Raises:
        ValueError: no cells, a cell without a finite loss, or trials that set different keys.
    """
    if not cells:
        raise ValueError("no cells: sensitivity needs the trials of at least one")
    near = {name: near_optimal(trials, margin) for name, trials in cells.items()}
    if empty := [name for name, trials in near.items() if not trials]:
        raise ValueError(f"cells without a trial that finished with a finite loss: {', '.join(empty)}")
    keys = next(iter(near.values()))[0].settings.keys()
    if any(trial.settings.keys() != keys for trials in cells.values() for trial in trials):
        raise ValueError(f"not all trials set the same keys ({', '.join(keys)})")
    return {key: _judge(key, [_gaps(trials, key) for trials in near.values()]) for key in keys}


def _gaps(trials: Sequence[Trial], key: str) -> dict[Value, float]:
    """Value -> how far the best of a cell's near-optimal trials with it is above the best of the cell."""
    gaps: dict[Value, float] = {}
    for trial in trials:
        gaps.setdefault(trial.settings[key], trial.loss - trials[0].loss)
    return gaps


def _judge(key: str, cells: Sequence[Mapping[Value, float]]) -> Sensitivity:
    """The smallest set of values that covers all cells; tried out, since grids have few values."""
    values = list(dict.fromkeys(value for gaps in cells for value in gaps))
    for number in range(1, len(values) + 1):
        covering = [
            chosen
            for chosen in itertools.combinations(values, number)
            if all(any(value in gaps for value in chosen) for gaps in cells)
        ]
        if covering:
            return Sensitivity(key, number > 1, min(covering, key=lambda chosen: _cost(chosen, cells)))
    raise AssertionError("all values together cover every cell")


def _cost(chosen: Sequence[Value], cells: Sequence[Mapping[Value, float]]) -> float:
    """Nats above the best, summed over cells, when each takes the best of its values among the chosen."""
    return sum(min(gaps[value] for value in chosen if value in gaps) for gaps in cells)
