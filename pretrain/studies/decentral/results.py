"""What the runs of the study of decentralized training came to, read from what they have written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.format import DTYPES
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.steps import list_moments
from pretrain.config.schema import Config
from pretrain.decentral.merge import cosines
from pretrain.decentral.outer import OUTER_PREFIX
from pretrain.metrics.history import History, read_histories
from pretrain.model.logical import logical_tensors
from pretrain.plan import make_plan
from pretrain.run_directory import CHECKPOINTS
from pretrain.studies.decentral.arms import CENTRAL, Arm
from pretrain.studies.decentral.running import Task


@dataclass(frozen=True)
class Round:
    """A synchronisation, as one site saw it."""

    step: int
    members: tuple[int, ...]
    losses: Mapping[int, float]
    """Member -> mean training loss since the last round."""
    sent_bytes: int
    """By this site."""
    wait_seconds: float
    """Until all were there."""
    seconds: float
    """From then on."""
    merged: bool
    heals: bool = False
    """Whether a member that had been away took over what it had missed: others send more then."""


@dataclass(frozen=True)
class Outcome:
    """One run at its end."""

    seed: int
    loss: float
    """Of the model that all sites have after the last round, on the validation batches, nats per token."""
    bits_per_byte: float
    curve: Sequence[tuple[int, float]]
    """(step, validation loss), right after a round."""
    disagreement: float
    """Largest difference of the final validation losses of two sites: 0 when all have one model."""
    rounds: Sequence[Round]
    """Of site 0, which is always there."""
    away: tuple[int, ...]
    """Steps after which a round went without a site."""
    returned: int | None
    """Step of the first round with it again."""
    state_bytes: int
    """Weights and optimizer state that one site keeps, by its checkpoint."""
    planned_state_bytes: int
    """The same by the plan."""
    memory_bytes: int
    """By the plan: that and the gradients of what a site trains."""
    planned_bytes_per_round: int
    """Sent by a site, without a merge."""
    similarity: float
    """Cosine of the gate matrices of two experts of a layer, mean over pairs and layers."""
    entropy: float
    """Of the load of the experts over log E, mean over layers and the last rows of all sites."""
    fullest: float
    """Load of the fullest expert over the mean, in the same way."""
    dead_experts: int
    """Without a token lately, over all layers; at the site that has the most."""
    seconds: float
    """Wall time of site 0."""

    @property
    def sent_bytes(self) -> int:
        """By one site in the whole run."""
        return sum(one.sent_bytes for one in self.rounds)

    @property
    def bytes_per_round(self) -> float:
        """Sent by one site in a round of all sites without a merge, and to which none comes back; NaN where there are
        none."""
        most = max((len(one.members) for one in self.rounds), default=0)
        plain = [one for one in self.rounds if not one.merged and not one.heals]
        found = [one.sent_bytes for one in plain if len(one.members) == most]
        return sum(found) / len(found) if found else math.nan

    @property
    def sync_seconds(self) -> float:
        """In rounds of the whole run, waiting for other sites left out."""
        return sum(one.seconds for one in self.rounds)

    @property
    def wait_seconds(self) -> float:
        """For other sites, in the whole run."""
        return sum(one.wait_seconds for one in self.rounds)


LAST_ROWS = 5
"""Logged steps at the end whose balance figures are averaged."""


def outcome(task: Task) -> Outcome:
    """What a finished run came to."""
    histories = read_histories(task.site_directories)
    first = histories[0]
    last = first.valid[-1]
    assert last["step"] == task.config.total_steps, f"{task.directory}: not trained to its end"
    rounds = [_round(event) for event in first.events_in_force("sync")]
    gone = [one.step for one in rounds if len(one.members) < task.config.sites]
    finals = [history.valid[-1]["valid_loss"] for history in histories]
    balance = [row["moe"] for history in histories for row in history.train[-LAST_ROWS:]]
    weights, gradients, optimizer = _planned_state(task.config)
    goodput = first.last_event("goodput")
    return Outcome(
        seed=task.seed,
        loss=last["valid_loss"],
        bits_per_byte=last["valid_bits_per_byte"],
        curve=[(row["step"], row["valid_loss"]) for row in first.valid],
        disagreement=max(finals) - min(finals),
        rounds=rounds,
        away=tuple(gone),
        returned=next((one.step for one in rounds if gone and one.step > gone[-1]), None),
        state_bytes=_state_bytes(_last_checkpoint(first)),
        planned_state_bytes=weights + optimizer,
        memory_bytes=weights + gradients + optimizer,
        planned_bytes_per_round=_planned_bytes(task.config),
        similarity=similarity(task.config, _last_checkpoint(first)),
        entropy=_mean(row["entropy_mean"] for row in balance),
        fullest=1 + _mean(row["max_violation_mean"] for row in balance),
        dead_experts=max(history.train[-1]["moe"]["dead_experts_total"] for history in histories),
        seconds=goodput["wall_seconds"] if goodput else math.nan,
    )


def _round(event: Mapping[str, Any]) -> Round:
    return Round(
        step=event["step"],
        members=tuple(event["members"]),
        losses={int(site): loss for site, loss in event["losses"].items()},
        sent_bytes=event["sent_bytes"],
        wait_seconds=event["wait_seconds"],
        seconds=event["seconds"],
        merged=event.get("merged", False),
        heals=bool(event.get("stale")),
    )


def _mean(values: Iterator[float]) -> float:
    found = [*values]
    return math.fsum(found) / len(found)


def _last_checkpoint(history: History) -> Path:
    return [*list_moments(history.directory / CHECKPOINTS).values()][-1]


def _state_bytes(checkpoint: Path) -> int:
    """Of the weights, and of the optimizer's tensors, as far as a checkpoint has them; the outer optimizer left out."""
    with CheckpointReader(checkpoint) as reader:
        return sum(
            DTYPES[stored.dtype].itemsize * part.box.numel
            for key, stored in reader.index.tensors.items()
            for part in stored.boxes
            if not key.startswith(OUTER_PREFIX)
        )


def _planned_state(config: Config) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of one site, by the plan."""
    plan = make_plan(config, 1)
    found = plan.decentral.site_memory if plan.decentral else plan.stages[0].memory
    return found.weights, found.gradients, found.optimizer


def _planned_bytes(config: Config) -> int:
    decentral = make_plan(config, 1).decentral
    return decentral.traffic.total if decentral else 0


def similarity(config: Config, checkpoint: Path) -> float:
    """Mean cosine of the gate matrices of all pairs of experts in a checkpoint, over layers."""
    found: list[float] = []
    with CheckpointReader(checkpoint) as reader:
        for tensor in logical_tensors(config.model):
            if not tensor.is_expert or "gate_up" not in tensor.axes:
                continue
            values = reader.read(tensor.key, [0] * len(tensor.shape), tensor.shape)
            gate = values.select(tensor.axes.index("gate_up"), 0).flatten(1).double()
            cosine = cosines(gate @ gate.T)
            found.append(cosine[~torch.eye(len(cosine), dtype=torch.bool)].mean().item())
    return _mean(iter(found))


@dataclass(frozen=True)
class Study:
    """All that the report tells of."""

    base: Config
    """The central run's configuration."""
    tasks: Mapping[str, Task]
    """Arm -> its run with the first seed."""
    outcomes: Mapping[str, Sequence[Outcome]]
    """Arm -> what its runs came to, by seed."""
    command: Sequence[str]
    """Words that repeat the study."""
    machine: Mapping[str, str]
    """What it ran on: name -> value."""

    @property
    def seeds(self) -> list[int]:
        return [one.seed for one in self.outcomes[CENTRAL]]

    @property
    def arms(self) -> list[Arm]:
        return [task.arm for task in self.tasks.values()]

    def by_seed(self, arm: str, figure: str = "loss") -> dict[int, float]:
        """A figure of an arm's runs; nothing for an arm that was not trained."""
        return {one.seed: getattr(one, figure) for one in self.outcomes.get(arm, ())}

    def gaps(self, arm: str) -> dict[int, float]:
        """Final loss less that of the central run of the same seed."""
        central = self.by_seed(CENTRAL)
        return {seed: loss - central[seed] for seed, loss in self.by_seed(arm).items()}
