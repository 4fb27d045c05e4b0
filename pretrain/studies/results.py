"""What the runs of a study came to: final losses, compute, the growth itself, and whether copies stayed copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.steps import list_moments
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.metrics.history import read_histories
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.run_directory import CHECKPOINTS


@dataclass(frozen=True)
class Twins:
    """How alike the old half of a grown tensor and its copy are at the end of a run."""

    cosine: float
    distance: float
    """Norm of the difference over the norm of the old half."""


@dataclass(frozen=True)
class Outcome:
    """One run at its end."""

    seed: int
    steps: int
    tokens: int
    flops: float
    """Model FLOPs of training, those before a growth included."""
    loss: float
    """On the validation batches, nats per token."""
    bits_per_byte: float
    loss_before: float | None = None
    """Validation loss right before the growth."""
    loss_after: float | None = None
    """Right after it."""
    twins: Mapping[str, Twins] = field(default_factory=dict)
    """By tensor, of the last layer."""


@dataclass(frozen=True)
class Point:
    """A validation on the way."""

    tokens: int
    flops: float
    loss: float


def outcome(config: Config, *, seed: int) -> Outcome:
    """What a finished run came to."""
    (history,) = read_histories([config.run.directory])
    last = history.valid[-1]
    growth = next(iter(history.events_in_force("growth")), {})
    return Outcome(
        seed=seed,
        steps=last["step"],
        tokens=last["tokens"],
        flops=last["flops"],
        loss=last["valid_loss"],
        bits_per_byte=last["valid_bits_per_byte"],
        loss_before=growth.get("valid_loss_before"),
        loss_after=growth.get("valid_loss_after"),
        twins=dict(twins(config)) if config.growth else {},
    )


def curve(config: Config, before: Config | None) -> list[Point]:
    """Validations of a run; `before`: the run that it went on from, up to its growth."""
    rows = _valid_rows(config)
    if before is not None:
        rows = [row for row in _valid_rows(before) if row["step"] < rows[0]["step"]] + rows
    return [Point(row["tokens"], row["flops"], row["valid_loss"]) for row in rows]


def twins(config: Config) -> Iterator[tuple[str, Twins]]:
    """The experts' tensors and the router of the last layer whose grown axis holds [old | new] halves."""
    growth = config.growth[0]
    axis = "expert" if growth.experts else "expert_ffn" if growth.expert_ffn else None
    if axis is None:
        return
    model = stages(config)[-1].config.model
    checkpoint = [*list_moments(config.run.directory / CHECKPOINTS).values()][-1]
    with CheckpointReader(checkpoint) as reader:
        for tensor in logical_tensors(model):
            if tensor.layer == model.num_layers - 1 and axis in tensor.axes and tensor.trainable:
                values = reader.read(tensor.key, [0] * len(tensor.shape), tensor.shape)
                yield tensor.key, _compare_halves(values, tensor, axis)


def _compare_halves(values: torch.Tensor, tensor: LogicalTensor, axis: str) -> Twins:
    old, new = (half.double().flatten() for half in values.chunk(2, dim=tensor.axes.index(axis)))
    cosine = float(old @ new / (old.norm() * new.norm()))
    return Twins(cosine, float((new - old).norm() / old.norm()))


def _valid_rows(config: Config) -> list[dict[str, Any]]:
    (history,) = read_histories([config.run.directory])
    return list(history.valid)
