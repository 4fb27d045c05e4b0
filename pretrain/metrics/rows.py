"""The rows of `metrics.jsonl`: every field of a run's figures, with its unit and definition."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One optimizer step; rates are means over the steps since the row before."""

    step: int
    """Optimizer steps done, this one included (the first row of a run is step 1); skipped steps count."""
    tokens: int
    """Training tokens consumed so far, over all ranks."""
    flops: float
    """Model FLOPs spent so far, forward and backward, without recomputation."""
    loss: float
    """Mean cross entropy over the global batch, nats per token, without auxiliary losses."""
    lr: float
    """Learning rate of this step (of the AdamW group)."""
    lr_new: Sequence[float] = ()
    """The same of the entries that growth 1, 2, ... of the run brought in."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping; null when it is not finite."""
    skipped: bool = False
    """Whether the update was left out because the loss or gradient was not finite."""
    step_seconds: float
    """Wall time of a step: data wait, forward, backward, update; without evaluation, saving, start-up."""
    data_seconds: float
    """Part of step_seconds spent waiting for data."""
    tokens_per_second: float
    """Over all ranks."""
    model_tflops: float
    """Model TFLOP/s per device."""
    mfu: float | None = None
    """model_tflops / metrics.peak_tflops, when the peak is given."""
    memory_bytes: int
    """Rank 0: most device memory allocated so far (GPU), or resident memory of the process (CPU)."""
    aux_losses: Mapping[str, float] = field(default_factory=dict)
    """Router losses by their configuration key, mean over MoE layers, without coefficient."""
    moe: Mapping[str, Any] = field(default_factory=dict)
    """Balance of the experts, see `moe.balance_figures`."""

    def to_json(self) -> dict[str, Any]:
        """The row as written, with `kind` and the wall-clock `time` (seconds since 1970); empty fields are left out."""
        return _row("train", self)


@dataclass(frozen=True, kw_only=True)
class ValidRow:
    """One validation, after `step` optimizer steps."""

    step: int
    tokens: int
    """Training tokens consumed so far."""
    flops: float
    """Model FLOPs spent on training so far."""
    valid_loss: float
    """Mean cross entropy over the validation batches, nats per token."""
    valid_bits_per_byte: float | None = None
    """valid_loss / ln 2 * (validation tokens / bytes of their text): comparable across tokenizers."""

    def to_json(self) -> dict[str, Any]:
        """The row as written, with `kind` and the wall-clock `time` (seconds since 1970); empty fields are left out."""
        return _row("valid", self)


def _row(kind: str, row: TrainRow | ValidRow) -> dict[str, Any]:
    values = {entry.name: getattr(row, entry.name) for entry in fields(row)}
    present = {name: value for name, value in values.items() if not _is_empty(value)}
    return {"kind": kind, "time": round(time.time(), 3), **present}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | Sequence) and not value)
