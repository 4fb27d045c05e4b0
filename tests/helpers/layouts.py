"""Train small models on parallel layouts, and put what the ranks hold together as whole logical tensors."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from pretrain.config.schema import Config, ModelConfig
from pretrain.model.logical import logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Batch, Engine, build_engine
from pretrain.parallel.mesh import Mesh, mesh_of
from pretrain.parallel.routing_stats import aux_losses, expert_load, reset_routing_stats, selection_bias
from pretrain.platform import cpu_adapter
from tests.helpers.replicas import differing_replicas

CPU = torch.device("cpu")

Case = TypeVar("Case")
# What is done to an engine between its gradients and the optimizer step, to break it.
Tamper = Callable[[Engine], None]


@dataclass(frozen=True)
class Box:
    """One rank's part of a logical tensor."""

    key: str
    offset: tuple[int, ...]
    values: torch.Tensor


@dataclass
class Outcome:
    """What one rank saw of a short training run."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loads: list[list[list[int]]] = field(default_factory=list)
    """Tokens per step, MoE layer and expert."""
    aux_losses: list[dict[str, float]] = field(default_factory=list)
    biases: list[list[list[float]] | None] = field(default_factory=list)
    """Selection bias after each step, per MoE layer and expert."""
    eval_loss: float = 0.0
    gradients: list[Box] = field(default_factory=list)
    """Of the first step."""
    weights: list[Box] = field(default_factory=list)
    """After the last step, selection biases included."""
    differing: list[str] = field(default_factory=list)
    """Weights whose copies differ between ranks after the last step."""


@contextmanager
def single_process() -> Iterator[None]:
    """A process group of this process alone, for tests that build a model in the test process."""
    cpu_adapter.apply()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # megatron-core sizes it by the first model that it sees; the next test may have another one.
        get_moe_layer_wise_logging_tracker().clear()
        end_forgotten_groups()


def end_forgotten_groups() -> None:
    """Models and the groups they hold refer to each other, and until a group is found its threads wake up all the
    time: a hundred groups take a seventh of a core."""
    gc.collect()


@contextmanager
def engine_of(config: Config) -> Iterator[Engine]:
    """The engine of a layout on the ranks that run, for the time of a `with` block."""
    cpu_adapter.apply()
    end_forgotten_groups()
    with mesh_of(config.parallel, CPU) as mesh:
        yield build_engine(config, mesh)


def sequences(config: Config, step: int) -> torch.Tensor:
    """The global batch of a step, tokens and the next one: [global batch, S + 1]."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.batch.global_batch_size, config.batch.sequence_length + 1)
    # Squared, so that some tokens and hence some experts are far more frequent than others.
    return (torch.rand(shape, generator=generator).square() * config.model.vocab_size).long()


def microbatches(config: Config, mesh: Mesh, step: int) -> Iterator[Batch]:
    """This rank's micro-batches: number j of rank r is micro-batch j * data_size + r of the global batch."""
    size = config.batch.micro_batch_size
    for mine in sequences(config, step).split(size)[mesh.data_rank :: mesh.data_size]:
        yield {"tokens": mine[:, :-1].contiguous(), "labels": mine[:, 1:].contiguous()}


def boxes(shards: Sequence[Shard], of: Callable[[Shard], torch.Tensor]) -> list[Box]:
    """`of(shard)`, a tensor of the parameter's shape, as this rank's boxes."""
    return [Box(shard.key, shard.offset, shard.view(of(shard)).detach().clone()) for shard in shards]


def train(config: Config, steps: int, tamper: Tamper | None = None) -> Outcome:
    """Train for some steps on the ranks that run."""
    outcome = Outcome()
    with engine_of(config) as engine:
        optimizer = ShardedOptimizer(engine.shards, config.optim, engine.mesh.groups)
        for step in range(steps):
            if config.model.is_moe:
                reset_routing_stats(engine)
            outcome.losses.append(float(engine.forward_backward(microbatches(config, engine.mesh, step))))
            if tamper:
                tamper(engine)
            if step == 0:
                trained = [shard for shard in engine.shards if shard.logical.trainable]
                outcome.gradients = boxes(trained, lambda shard: shard.tensor.main_grad)
            if config.model.is_moe:
                outcome.loads.append(expert_load(engine, config.model).tolist())
                outcome.aux_losses.append(aux_losses(engine, config.model))
                bias = selection_bias(engine, config.model)
                outcome.biases.append(None if bias is None else bias.tolist())
            outcome.grad_norms.append(optimizer.step(1.0).grad_norm)
        outcome.weights = boxes(engine.shards, lambda shard: shard.tensor)
        outcome.differing = differing_replicas(engine.shards)
        outcome.eval_loss = float(engine.evaluate(microbatches(config, engine.mesh, steps), engine.microbatches))
    return outcome


def double_expert_gradients(engine: Engine) -> None:
    """As if experts' gradients were averaged over fewer ranks than they are."""
    for shard in engine.shards:
        if shard.logical.is_expert:
            shard.tensor.main_grad.mul_(2)


def train_alone(config: Config, steps: int) -> Outcome:
    """`train` in the test process."""
    with single_process():
        return train(config, steps)


def train_all(cases: Mapping[Case, Config], steps: int) -> dict[Case, Outcome]:
    """`train` for one configuration after another, in the same processes."""
    return {case: train(config, steps) for case, config in cases.items()}


def assemble(model: ModelConfig, ranks: Sequence[Sequence[Box]]) -> dict[str, torch.Tensor]:
    """Whole logical tensors from the boxes of all ranks; AssertionError unless copies agree bit for bit."""
    shapes = {logical.key: logical.shape for logical in logical_tensors(model)}
    found: dict[str, list[Box]] = defaultdict(list)
    for box in (box for of_rank in ranks for box in of_rank):
        found[box.key].append(box)
    whole = {}
    for key, parts in found.items():
        out = torch.zeros(shapes[key], dtype=parts[0].values.dtype)
        filled = torch.zeros(shapes[key], dtype=torch.bool)
        for box in parts:
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.values.shape, strict=True))
            known = filled[place]
            assert torch.equal(out[place][known], box.values[known]), f"{key}: copies at {box.offset} differ"
            out[place] = box.values
            filled[place] = True
        assert filled.all(), f"{key}: no rank holds some entries"
        whole[key] = out
    return whole
