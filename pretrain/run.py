"""A run: its parts, its state, and how both come back after a restart.

`TrainState` lists everything that must survive one, beside the weights, selection biases and optimizer tensors.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.data.batches import BatchIterator, validation_batches
from pretrain.data.dataset import VALIDATION_SEED, BlendedDataset, open_blend
from pretrain.decentral.outer import Nesterov
from pretrain.decentral.reown import ages_of_handovers, rewarms_of_handovers
from pretrain.growth.history import history, rewarms
from pretrain.growth.maps import ages
from pretrain.metrics.moe import BalanceWindow
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.throughput import RunClock
from pretrain.model.logical import logical_tensors
from pretrain.optim.ages import Ages
from pretrain.optim.routing import expert_state_keys
from pretrain.optim.rules import Slot
from pretrain.optim.schedule import Schedule, Schedules
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh, Meshes

NO_ROUNDS: dict[str, Any] = {
    "round": -1,
    "round_step": 0,
    "late": False,
    "missed": {},
    "dropped": [],
    "handovers": [],
    "outer": False,
}
"""`TrainState.decentral` of a site that has not met the others: synchronisations it has been through and the step of
the last one; whether its experts have yet to come; rounds that absent sites have missed in a row; sites whose experts
others train; what changed hands after which step; whether checkpoints hold the state of an outer optimizer."""


@dataclass
class TrainState:
    """Where a run stands. JSON values only."""

    step: int = 0
    """Optimizer steps done; skipped ones count, as their data is used up."""
    samples: int = 0
    """Position in the global sample order."""
    tokens: int = 0
    flops: float = 0.0
    skipped_in_a_row: int = 0
    growths: list[dict[str, Any]] = field(default_factory=list)
    """The growths the run has been through, see `growth.history`."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Utility of experts so far, when the next growth goes by it, see `growth.scores`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What its first weights were made of, see `upcycle`; empty where they were drawn."""
    decentral: dict[str, Any] = field(default_factory=dict)
    """Where this site stands among the others, see `syncing`; empty in a run of one place."""
    data_fingerprint: str = ""
    """Of the blend that `samples` is a position in."""
    rng: str = ""
    """torch's host generator, base64. Training draws nothing from it; what comes to draw must not repeat itself."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    recorder: dict[str, Any] = field(default_factory=dict)

    def advance(self, config: Config, flops_per_token: int) -> None:
        """Count one global batch as done."""
        self.step += 1
        self.samples += config.batch.global_batch_size
        self.tokens += config.batch.tokens_per_step
        self.flops += float(flops_per_token) * config.batch.tokens_per_step


@dataclass
class Run:
    """The parts of a run on this rank."""

    written: Config
    """The configuration as written, with all growth points."""
    config: Config
    """The same with the model and layout of this stage."""
    meshes: Meshes
    engine: Engine
    optimizer: ShardedOptimizer
    schedule: Schedules
    flops_per_token: int
    """Model FLOPs of training on one token."""
    train_data: BlendedDataset
    valid_data: BlendedDataset | None
    batches: BatchIterator
    checkpoints: Checkpoints
    ranks: Ranks
    clock: RunClock
    recorder: Recorder | None
    """Rank 0 only."""
    outer: Nesterov | None = None
    """What synchronisations of several sites do with the mean of their weights, if it is more than to take it."""
    valid_bytes_per_token: float | None = None
    """Of the text that validation predicts; None where the datasets do not tell."""
    balance: BalanceWindow = field(default_factory=BalanceWindow)
    durable: SimpleQueue[tuple[Path, float]] = field(default_factory=SimpleQueue)
    """Checkpoints that became durable, with the seconds it took; filled by the thread that writes them."""

    @property
    def mesh(self) -> Mesh:
        """The layout in force."""
        return self.engine.mesh

    def event(self, name: str, state: TrainState, /, **fields: Any) -> None:
        """Write an event, on the rank that does."""
        if self.recorder:
            self.recorder.event(name, step=state.step, **fields)

    def save(self, state: TrainState, *, grown: bool = False) -> None:
        """Write a checkpoint, or begin to when they are asynchronous. `grown`: of this step after its growth.
        Collective."""
        state.optimizer = self.optimizer.state_dict()
        state.clock = self.clock.state_dict()
        state.rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        if self.recorder:
            state.recorder = self.recorder.state_dict()
        if self.outer:
            state.decentral = {**state.decentral, "outer": True}
        self.checkpoints.save(
            state.step,
            checkpoint_tensors(self.engine, self.optimizer, self.outer),
            state=asdict(state),
            config_toml=dump_config(self.written),
            partial_keys=partial_keys(self.config, self.engine.trained),
            grown=grown,
        )

    def valid_loss(self) -> float:
        """Loss on the validation batches, always the same ones, in nats per token. Collective."""
        assert self.valid_data is not None
        config, mesh = self.config, self.mesh
        batches = validation_batches(
            self.valid_data, config.batch, batches=config.eval.batches, dp_rank=mesh.data_rank, dp_size=mesh.data_size
        )
        on_device = ({name: tensor.to(mesh.device) for name, tensor in micro.items()} for micro in batches)
        # Every site validates on all of them.
        count = config.eval.batches * self.engine.microbatches * config.sites
        return float(self.engine.evaluate(on_device, count))

    def report_durable(self, state: TrainState) -> None:
        """Write an event for each checkpoint that is safe by now."""
        while not self.durable.empty():
            path, seconds = self.durable.get()
            self.event("save", state, checkpoint=path.name, seconds=round(seconds, 3))


def checkpoint_tensors(
    engine: Engine, optimizer: ShardedOptimizer, outer: Nesterov | None = None
) -> list[ShardedTensor]:
    """What a checkpoint holds beside the state: weights, selection biases, tensors of both optimizers."""
    tensors = [shard.sharded() for shard in engine.shards] + optimizer.named_state()
    return tensors + (outer.named_state() if outer else [])


def partial_keys(config: Config, trained: Collection[int] | None) -> frozenset[str]:
    """What a checkpoint holds of the experts `trained` alone, unless these are all (None): their optimizer tensors."""
    if trained is None:
        return frozenset()
    return expert_state_keys(logical_tensors(config.model), config.optim)


def shared_slots(config: Config, optimizer: ShardedOptimizer) -> list[Slot]:
    """What all sites train, of the shards this rank owns: all of them, but for experts that have one site each."""
    one_owner = config.decentral is not None and config.decentral.kind == "spes"
    return [slot for slot in optimizer.slots if not (one_owner and slot.shard.logical.is_expert)]


def outer_of(config: Config, optimizer: ShardedOptimizer) -> Nesterov | None:
    """The outer optimizer of a run, beginning at the weights as they are; None where there is none."""
    decentral = config.decentral
    if decentral is None or decentral.outer_rule == "average":
        return None
    slots = shared_slots(config, optimizer)
    return Nesterov(slots, lr=decentral.outer_lr, momentum=decentral.outer_momentum)


def open_data(config: Config) -> tuple[BlendedDataset, BlendedDataset | None]:
    """Training and validation blends, with the checks that do not read the tokens. Raises DataError."""

    def blend(which: str, seed: int) -> BlendedDataset:
        return open_blend(
            getattr(config.data, which),
            sequence_length=config.batch.sequence_length,
            vocab_size=config.model.vocab_size,
            seed=seed,
            tokenizer=config.data.tokenizer,
        )

    return blend("train", config.run.seed), blend("valid", VALIDATION_SEED) if config.data.valid else None


def open_batches(config: Config, mesh: Mesh, data: BlendedDataset, *, consumed_samples: int) -> BatchIterator:
    """This rank's micro-batches of a layout, from a position in the global sample order on."""
    site = config.decentral.site if config.decentral else 0
    return BatchIterator(
        data,
        config.batch,
        # Sites share a global batch as data-parallel ranks do.
        dp_rank=site * mesh.data_size + mesh.data_rank,
        dp_size=config.sites * mesh.data_size,
        consumed_samples=consumed_samples,
    )


def schedule_of(config: Config, state: TrainState) -> Schedules:
    """The learning rates of a run that has been through the growths, or changes of hands, of `state`."""
    curves = rewarms(config, state.growths)
    if config.decentral:
        curves += rewarms_of_handovers(config.decentral, state.decentral["handovers"])
    return Schedules(Schedule.from_config(config.schedule, config.total_steps), tuple(curves))


def entry_ages(config: Config, state: TrainState) -> Ages | None:
    """Which growth, or change of hands, brought an entry of the model in; None: none did."""
    if state.growths:
        return ages(history(config, state.growths))
    return ages_of_handovers([entry["experts"] for entry in state.decentral.get("handovers", ())])
