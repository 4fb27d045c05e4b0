"""What others found when they tuned these optimizers: settings by model size and number of tokens (published.toml).

The cells are of dense models of 134M to 1.2B non-embedding parameters. For another run, `suggest` names the nearest one
and says when it is far: a place to start a sweep from, not a replacement for one.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_FILE = Path(__file__).with_name("published.toml")
TOKENS_PER_PARAMETER = 20
"""Training tokens per non-embedding parameter at ratio 1 (Chinchilla, as the study counts it)."""
FAR = 2.0
"""Beyond the published sizes or ratios by more than this factor is far: it is the step from one cell to the next."""

Value = float | int | str | bool


@dataclass(frozen=True)
class Cell:
    """The best settings of one optimizer at one model size and number of tokens."""

    kind: str
    """As in optim.kind."""
    size: str
    """Name of the model size, such as "300m"."""
    model_size: int
    """Non-embedding parameters."""
    ratio: int
    """Tokens over TOKENS_PER_PARAMETER times model_size."""
    settings: Mapping[str, Value]
    """By dotted configuration key."""
    loss: float | None
    """Final validation loss, nats per token; None where it is not comparable with the other kinds'."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return int(self.settings["batch.global_batch_size"]) * int(self.settings["batch.sequence_length"])

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return TOKENS_PER_PARAMETER * self.model_size * self.ratio // self.batch_tokens


@dataclass(frozen=True)
class Suggestion:
    """The published cell nearest to a run."""

    cell: Cell
    warnings: tuple[str, ...]
    """Where the run is far from all that was published, a line each; none when it is within or close to it."""


@functools.cache
def published() -> Mapping[str, tuple[Cell, ...]]:
    """Kind of optimizer -> its cells, by size and ratio."""
    data = tomllib.loads(DATA_FILE.read_text(encoding="utf-8"))
    return {
        kind: tuple(_cell(kind, table, row, data) for row in table["cells"]) for kind, table in data["kinds"].items()
    }


def _cell(kind: str, table: Mapping[str, Any], row: list[Any], data: Mapping[str, Any]) -> Cell:
    """One row of a table, with what holds for all of them."""
    settings = dict(zip(table["columns"], row, strict=True)) | table["all"]
    size, ratio, loss = settings.pop("size"), settings.pop("ratio"), settings.pop("loss", None)
    if "rest_lr_ratio" in settings:
        # Six digits: 0.2 * 0.016 is 0.0032, without the rounding of the product.
        settings["optim.lr"] = float(f"{settings.pop('rest_lr_ratio') * settings[f'optim.{kind}.lr']:.6g}")
    settings["batch.sequence_length"] = data["sequence_length"]
    return Cell(kind, size, data["sizes"][size], ratio, settings, loss)


def data_ratio(tokens: float, model_size: float) -> float:
    """Training tokens over TOKENS_PER_PARAMETER times the non-embedding parameters."""
    return tokens / (TOKENS_PER_PARAMETER * model_size)


def suggest(kind: str, model_size: float, ratio: float) -> Suggestion:
    """The nearest published cell of this kind, by the logarithms of size and ratio.

    Args:
        kind: as in optim.kind.
        model_size: non-embedding parameters.
        ratio: see `data_ratio`.

    Raises:
        KeyError: nothing is published for this kind.
    """
    cells = published()[kind]
    nearest = min(
        cells, key=lambda cell: math.hypot(math.log(cell.model_size / model_size), math.log(cell.ratio / ratio))
    )
    sizes, ratios = {cell.model_size: cell.size for cell in cells}, {cell.ratio: f"{cell.ratio}x" for cell in cells}
    warnings = [
        *_far(model_size, sizes, what="model", words=("smaller", "larger")),
        *_far(ratio, ratios, what="data ratio", words=("lower", "higher")),
    ]
    return Suggestion(nearest, tuple(warnings))


def _far(value: float, known: Mapping[int, str], *, what: str, words: tuple[str, str]) -> Iterator[str]:
    """How a value lies outside of what is known, in words, if by more than a factor of FAR."""
    low, high = min(known), max(known)
    factor, word, edge = max((low / value, words[0], low), (value / high, words[1], high))
    if factor > FAR:
        shown = f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"
        place = f"the {what} is {shown} times {word} than any tuned ({known[edge]})"
        yield f"{place}: a place to start a sweep from, no more"


def update_size(scale: str, hidden_size: int) -> float:
    """Spectral norm of the update that an orthogonalised [hidden, hidden] matrix gets at learning rate 1, by
    optim.muon.scale."""
    return {"keller_jordan": 1.0, "spectral": 1.0, "moonshot": 0.2 * math.sqrt(hidden_size)}[scale]


def rescaled(settings: Mapping[str, Value], kind: str, *, scale: str, hidden_size: int) -> dict[str, Value]:
    """Published settings of muon or scion for another scale of the update, exact for square matrices.

    The learning rate changes so that updates stay as they are: lr_keller_jordan = 0.2 sqrt(hidden) lr_moonshot. Decay
    is multiplied by that rate, so that `optim.weight_decay` changes the other way. It then no longer suits what decays
    and is not a hidden matrix (output layer, router): that keeps its own learning rate.
    """
    factor = update_size(str(settings[f"optim.{kind}.scale"]), hidden_size) / update_size(scale, hidden_size)
    lr, decay = float(settings[f"optim.{kind}.lr"]), float(settings["optim.weight_decay"])
    changed: dict[str, Value] = {
        f"optim.{kind}.lr": lr * factor,
        "optim.weight_decay": decay / factor,
        f"optim.{kind}.scale": scale,
    }
    return {**settings, **changed}
