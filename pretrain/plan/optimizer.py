"""The optimizer of a run beside the published settings that are nearest to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config.published import Cell, Value, data_ratio, rescaled, suggest
from pretrain.config.schema import Config, ModelConfig
from pretrain.model.counts import count_parameters


@dataclass(frozen=True)
class KeyPlan:
    """One configuration key, here and in the published settings."""

    key: str
    value: Value
    published: Value
    remark: str


@dataclass(frozen=True)
class OptimizerPlan:
    """An optimizer's settings, and those that were best at the nearest published model size and data ratio."""

    kind: str
    model_size: int
    """Non-embedding parameters that are active per token, of the model that the run ends with."""
    ratio: float
    """Tokens of the run over 20 times that."""
    tokens_per_step: int
    published_size: str
    published_ratio: int
    published_tokens_per_step: int
    published_steps: int
    published_loss: float | None
    """Final validation loss there, nats per token."""
    keys: tuple[KeyPlan, ...]
    """Learning rates, and what else differs from the published settings."""
    notes: tuple[str, ...]
    """What makes the comparison a loose one."""


def plan_optimizer(config: Config, model: ModelConfig, tokens: int) -> OptimizerPlan:
    """Compare the settings of a run of so many tokens that ends with this model."""
    kind, size = config.optim.kind, count_parameters(model).active_non_embedding
    ratio = data_ratio(tokens, size)
    suggestion = suggest(kind, size, ratio)
    cell = suggestion.cell
    dense = "the published models are dense: sizes are compared by the parameters active per token"
    return OptimizerPlan(
        kind=kind,
        model_size=size,
        ratio=ratio,
        tokens_per_step=config.batch.tokens_per_step,
        published_size=cell.size,
        published_ratio=cell.ratio,
        published_tokens_per_step=cell.batch_tokens,
        published_steps=cell.steps,
        published_loss=cell.loss,
        keys=tuple(_keys(config, cell, model.hidden_size)),
        notes=(*suggestion.warnings, *([dense] if model.is_moe else [])),
    )


def _keys(config: Config, cell: Cell, hidden_size: int) -> Iterator[KeyPlan]:
    settings, remarks = dict(cell.settings), {}
    scale_key, lr_key, warmup_key = f"optim.{cell.kind}.scale", f"optim.{cell.kind}.lr", "schedule.warmup_steps"
    if scale_key in settings:
        scale = str(_value(config, scale_key))
        if scale != settings[scale_key]:
            settings = rescaled(settings, cell.kind, scale=scale, hidden_size=hidden_size)
            for key in (lr_key, "optim.weight_decay"):
                remarks[key] = f'{cell.settings[key]:g} under scale = "{cell.settings[scale_key]}"'
    remarks[warmup_key] = f"{int(settings[warmup_key]) / cell.steps:.0%} of {cell.steps:,} steps"
    for key, published in sorted(settings.items(), key=lambda item: not item[0].endswith(".lr")):
        value = _value(config, key)
        # Batches are compared in tokens.
        if not key.startswith("batch.") and (value != published or key.endswith(".lr")):
            yield KeyPlan(key, value, published, remarks.get(key, ""))


def _value(config: Config, key: str) -> Value:
    """What the run has under a dotted key. A learning rate of matrices that is not set is that of the rest."""
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return config.optim.lr if found is None else found
