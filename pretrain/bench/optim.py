"""What the update of every kind of optimizer costs: its share of a step, its peers, the memory of its state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch

from pretrain.bench.measure import Seconds, take_turns
from pretrain.bench.optim_peers import peers
from pretrain.bench.workloads import MEDIUM, SMALL, ZIPF_EXPONENT, Workload
from pretrain.config.optim import Kind, OptimConfig
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.model.shards import Shard
from pretrain.optim.routing import route, rules_of
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Batch, Engine, build_engine
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.probe import probe_passes
from pretrain.plan.memory import rank_memory

WARMUP = 2
"""Steps before the clock starts. SOAP only takes stock in the first."""
PASSES = "forward and backward pass"
OURS = "pretrain"
OURS_MATRICES = "pretrain, its matrices"
ESTIMATE = "estimate of curvature"

QUICK = replace(
    SMALL,
    name="quick",
    model=SMALL.model.model_copy(update={"vocab_size": 1024, "num_layers": 2, "num_experts": 4}),
    micro_batch_size=2,
)


@dataclass(frozen=True)
class OptimResult:
    """What one kind of optimizer took."""

    kind: Kind
    seconds: dict[str, list[Seconds]]
    """By variant, a round each: PASSES, OURS and, where it has one, ESTIMATE for the whole model; the peers on the
    tensors of the kind's own rule, and OURS_MATRICES on these alone, where they are not all."""
    every_steps: int
    """Steps to an ESTIMATE."""
    parameters: int
    state_bytes: int
    """Of all states, masters included, in this process."""
    planned_bytes: int
    """The same as `pretrain plan` has it."""


def optim_workload(device: torch.device, *, quick: bool) -> Workload:
    """The model whose tensors are updated."""
    if quick:
        return QUICK
    return MEDIUM if device.type == "cuda" else SMALL


def optim_config(kind: Kind) -> OptimConfig:
    """A kind with its defaults, but without clipping and decay, which not all peers have, and Muon as torch's is."""
    own = {"muon": {"newton_schulz_dtype": "bfloat16"}} if kind == "muon" else {}
    return OptimConfig.model_validate({"kind": kind, "clip_grad": 0.0, "weight_decay": 0.0} | own)


def measure_optim(
    workload: Workload, mesh: Mesh, *, rounds: int, kinds: Sequence[Kind] = get_args(Kind)
) -> list[OptimResult]:
    """Time every kind in fp32. Raises RuntimeError if states do not take what is planned for them."""
    results = []
    for kind in kinds:
        print(f"measuring {kind} ...", file=sys.stderr, flush=True)
        config = _config(workload, optim_config(kind))
        # Anew for each kind: updates of one would be the start of the next.
        engine, batch = build_engine(config, mesh), _batch(workload, mesh.device)
        engine.forward_backward(iter(batch))
        results.append(_measured(config, engine, batch, rounds=rounds))
    return results


def _config(workload: Workload, optim: OptimConfig) -> Config:
    size = workload.micro_batch_size
    return Config.model_validate(
        {
            "run": {"directory": "unused", "precision": "fp32"},
            "model": workload.model.model_dump(),
            "batch": {
                "sequence_length": workload.sequence_length,
                "global_batch_size": size,
                "micro_batch_size": size,
            },
            "budget": {"steps": 1000},
            "optim": optim.model_dump(),
        }
    )


def _batch(workload: Workload, device: torch.device) -> list[Batch]:
    """One micro-batch of random tokens, some far more frequent than others."""
    frequency = torch.arange(1, workload.model.vocab_size + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
    count = workload.micro_batch_size * (workload.sequence_length + 1)
    drawn = torch.multinomial(frequency, count, replacement=True, generator=torch.Generator().manual_seed(0))
    tokens = drawn.view(workload.micro_batch_size, -1).to(device)
    return [{"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}]


def _measured(config: Config, engine: Engine, batch: list[Batch], *, rounds: int) -> OptimResult:
    optim, groups, kind = config.optim, engine.mesh.groups, config.optim.kind
    trained = [shard for shard in engine.shards if shard.trainable]
    own = [shard for shard in trained if route(shard.logical, optim).rule == rules_of(kind)[0]]
    variants: dict[str, Callable[[], object]] = {
        name: peer.step for name, peer in peers(kind, own, optim, lr=route(own[0].logical, optim).lr).items()
    }
    if len(own) < len(trained) and variants:
        alone = ShardedOptimizer([_copy(shard) for shard in own], optim, groups)
        variants[OURS_MATRICES] = partial(alone.step, 1.0)
    optimizer = ShardedOptimizer(trained, optim, groups)
    variants |= {PASSES: lambda: engine.forward_backward(iter(batch)), OURS: partial(optimizer.step, 1.0)}
    if optimizer.wants_curvature:
        variants[ESTIMATE] = lambda: _estimate(engine, batch, optimizer)
    for variant in variants.values():
        for _ in range(WARMUP):
            variant()
    planned = rank_memory(config, Layout.of(config, 1)).optimizer
    if optimizer.state_bytes() != planned:
        raise RuntimeError(f"{kind}: the state takes {optimizer.state_bytes()} bytes, and {planned} are planned")
    return OptimResult(
        kind=kind,
        seconds=take_turns(variants, rounds=rounds, device=engine.mesh.device),
        every_steps=optim.sophia.every_steps,
        parameters=sum(shard.logical.numel for shard in trained),
        state_bytes=optimizer.state_bytes(),
        planned_bytes=planned,
    )


def _estimate(engine: Engine, batch: list[Batch], optimizer: ShardedOptimizer) -> None:
    with probe_passes(engine, batch) as backward:
        optimizer.estimate_curvature(backward, seed=0)


def _copy(shard: Shard) -> Shard:
    """A shard with a parameter and gradient of its own."""
    parameter = torch.nn.Parameter(shard.tensor.detach().clone())
    parameter.main_grad = shard.tensor.main_grad.clone()  # type: ignore[attr-defined]
    return replace(shard, tensor=parameter)
