"""A site that trains some of the experts, on every layout: the rest of the model trains as if all did."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pretrain.config.decentral import DecentralConfig
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.model.logical import logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import mesh_of
from pretrain.parallel.routing_stats import reset_routing_stats
from pretrain.plan.memory import rank_memory
from pretrain.platform import cpu_adapter
from tests.helpers.configs import MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import CPU, Box, assemble, boxes, microbatches, single_process
from tests.helpers.replicas import differing_replicas
from tests.parallel.test_equivalence import LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE

STEPS = 3
# Of 8 experts, so that every rank of EP2 has two runs of frozen ones and three of trained ones between them.
TRAINED = (1, 3, 5, 7)

# Of which the second rank of EP2 trains none, or none does.
LOPSIDED = {"first rank": (0, 1), "none": ()}

COMMON: dict[str, Any] = {
    "model.num_layers": 2,
    "model.init_std": 0.1,
    "model.router": {"score_function": "sigmoid", "bias_update_rate": 1e-2, "aux_loss": 1e-1},
    "model.shared_expert_ffn_size": 24,
    "batch.sequence_length": 16,
    "batch.global_batch_size": 4,
    "optim.lr": 1e-2,
    "optim.eps": 1e-3,
    "optim.weight_decay": 0.5,
    "optim.clip_grad": 0.05,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "EP2": (2, {"expert": 2}),
    "ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "EP2xDP2": (4, {"expert": 2, "recompute": "selective"}),
    "ETP2xEP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
}
CASES = [
    *((layout, "fp32") for layout in LAYOUTS),
    *((layout, "bf16") for layout in ("single", "DP2", "EP2", "ETP2xEP2")),
]


def configuration(layout: str, precision: str) -> Config:
    sizes = {f"parallel.{key}": size for key, size in LAYOUTS[layout][1].items()}
    return make_config(MOE, {**COMMON, **sizes, "run.precision": precision})


@dataclass
class Outcome:
    """What one rank saw of a short run."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[Box] = field(default_factory=list)
    """Of the first step, of what trains."""
    weights: list[Box] = field(default_factory=list)
    frozen: list[list[str]] = field(default_factory=list)
    """SHA-256 of the frozen weights, at the start and after every step."""
    differing: list[str] = field(default_factory=list)
    gradient_numel: int = 0
    """Entries of DDP's buffers."""
    state: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    """Key -> boxes (offset, shape) of masters and states."""
    state_bytes: int = 0
    weight_bytes: int = 0
    held: int = 0
    """Entries of the parameters that train, of parameters of their own."""


def train(config: Config, trained: tuple[int, ...] | None, steps: int = STEPS) -> Outcome:
    """Some steps on the ranks that run, with decay and clipping."""
    cpu_adapter.apply()
    with mesh_of(config.parallel, CPU) as mesh:
        engine = build_engine(config, mesh, trained=trained)
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups)
        outcome = Outcome(frozen=[_hashes(engine.shards)])
        for step in range(steps):
            reset_routing_stats(engine)
            outcome.losses.append(float(engine.forward_backward(microbatches(config, mesh, step))))
            if step == 0:
                live = [shard for shard in engine.shards if shard.trainable]
                outcome.gradients = boxes(live, lambda shard: shard.tensor.main_grad)
            result = optimizer.step(1.0)
            assert result.clipped
            outcome.grad_norms.append(result.grad_norm)
            outcome.frozen.append(_hashes(engine.shards))
        outcome.weights = boxes(engine.shards, lambda shard: shard.tensor)
        outcome.differing = differing_replicas(engine.shards)
        outcome.gradient_numel = _gradient_numel(engine)
        for tensor in optimizer.named_state():
            outcome.state.setdefault(tensor.key, []).append((tensor.global_offset, tensor.local_shape))
        outcome.state_bytes = optimizer.state_bytes()
        outcome.weight_bytes = sum(shard.tensor.nbytes for shard in engine.shards if shard.logical.trainable)
        outcome.held = sum(shard.tensor.numel() for shard in engine.shards if shard.trainable)
    return outcome


def _hashes(shards: list[Shard]) -> list[str]:
    frozen = [shard.tensor for shard in shards if shard.logical.trainable and not shard.trainable]
    return [hashlib.sha256(tensor.detach().view(torch.uint8).numpy().tobytes()).hexdigest() for tensor in frozen]


def _gradient_numel(engine: Engine) -> int:
    buffers = [buffer for chunk in engine.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(buffer.grad_data.numel() for buffer in buffers)


def train_all(cases: list[tuple[str, str]]) -> dict[tuple[str, str, bool], Outcome]:
    """Each case with some experts frozen (True) and with none."""
    found = {}
    for layout, precision in cases:
        config = configuration(layout, precision)
        found[layout, precision, True] = train(config, TRAINED)
        if layout == "EP2":
            for name, trained in LOPSIDED.items():
                found[name, precision, True] = train(config, trained)
        # Later steps differ, as they should.
        found[layout, precision, False] = train(config, None, STEPS if layout == "single" else 1)
    return found


@functools.cache
def outcomes(world_size: int) -> list[dict[tuple[str, str, bool], Outcome]]:
    cases = [case for case in CASES if LAYOUTS[case[0]][0] == world_size]
    if world_size == 1:
        with single_process():
            return [train_all(cases)]
    return run_ranks(train_all, world_size, cases)


def outcome(layout: str, precision: str, *, freezes: bool = True) -> list[Outcome]:
    return [rank[layout, precision, freezes] for rank in outcomes(LAYOUTS[layout][0])]


def experts_of(box: Box) -> range:
    return range(box.offset[0], box.offset[0] + box.values.shape[0])


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_gradients_of_the_first_step_are_those_of_a_run_in_which_all_train(layout: str, precision: str) -> None:
    """Bit for bit: of router, shared expert, attention, embedding (through every layer's input) and trained experts."""
    for mine, theirs in zip(outcome(layout, precision), outcome(layout, precision, freezes=False), strict=True):
        assert mine.losses[0] == theirs.losses[0]
        whole = {(box.key, box.offset): box for box in theirs.gradients}
        seen = set()
        for box in mine.gradients:
            if ".experts." not in box.key:
                expected = whole[box.key, box.offset].values
            else:
                all_local = next(other for (key, _), other in whole.items() if key == box.key)
                assert set(experts_of(box)) <= set(TRAINED)
                start = box.offset[0] - all_local.offset[0]
                expected = all_local.values[start : start + len(box.values)]
            assert torch.equal(box.values, expected), box.key
            assert bool(box.values.any()), box.key
            seen.add(box.key)
        assert seen == {key for key, _ in whole}


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_frozen_experts_keep_their_bytes(layout: str, precision: str) -> None:
    for rank in outcome(layout, precision):
        assert len(rank.frozen) == STEPS + 1
        assert rank.frozen[0]
        assert all(hashes == rank.frozen[0] for hashes in rank.frozen)
        assert rank.differing == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_frozen_experts_as_one_process_does(layout: str) -> None:
    ranks, (expected,) = outcome(layout, "fp32"), outcome("single", "fp32")
    model = configuration(layout, "fp32").model
    for rank in ranks:
        assert rank.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=NORM_TOLERANCE)
    weights = assemble(model, [rank.weights for rank in ranks])
    for key, theirs in assemble(model, [expected.weights]).items():
        assert (weights[key] - theirs).abs().max() <= WEIGHT_TOLERANCE, key
    # What is frozen is part of the function, and training it as well goes elsewhere.
    (all_train,) = outcome("single", "fp32", freezes=False)
    assert all_train.losses[1:] != pytest.approx(expected.losses[1:], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_frozen_experts_have_no_gradient_buffer_and_no_state(layout: str, precision: str) -> None:
    """Entries of gradient buffers, masters and moments, over all ranks: those of what trains, once per copy or once."""
    model, ranks = configuration(layout, precision).model, outcome(layout, precision)
    for rank in ranks:
        assert rank.gradient_numel == rank.held
    trains = {
        logical.key: logical.numel * (len(TRAINED) if logical.is_expert else model.num_experts) // model.num_experts
        for logical in logical_tensors(model)
        if logical.trainable
    }
    names = ["exp_avg", "exp_avg_sq", *(["master"] if precision == "bf16" else [])]
    found: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for rank in ranks:
        for key, located in rank.state.items():
            found.setdefault(key, set()).update(located)
    assert found.keys() == {f"optimizer.{name}.{key}" for name in names for key in trains}
    for key, located in found.items():
        numel = sum(torch.Size(shape).numel() for _, shape in located)
        assert numel == trains[key.split(".", 2)[2]], key
        if ".experts." in key:
            assert {first + i for (first, *_), (n, *_) in located for i in range(n)} == set(TRAINED), key
    # The same counted from what optimizers say they hold. Tensor and pipeline parallelism leave copies of norms and
    # routers on several ranks, each with a state of its own.
    copies = {"TP2": 2, "ETP2": 2, "ETP2xEP2": 2}.get(layout, 1)
    if copies == 1:
        assert sum(rank.state_bytes for rank in ranks) == 4 * len(names) * sum(trains.values())


@pytest.mark.parametrize(("layout", "precision"), [case for case in CASES if case[0] != "PP2"])
def test_memory_is_what_the_plan_says(layout: str, precision: str) -> None:
    """Of the site that trains every second expert, on the rank that needs the most."""
    config, ranks = configuration(layout, precision), outcome(layout, precision)
    layout_of_ranks = Layout.of(config, len(ranks))
    site = config.model_copy(update={"decentral": DecentralConfig(kind="spes", sites=2, site=1)})
    planned = rank_memory(site, layout_of_ranks)
    assert planned.weights == max(rank.weight_bytes for rank in ranks)
    assert planned.gradients == 4 * max(rank.gradient_numel for rank in ranks)
    assert planned.optimizer == max(rank.state_bytes for rank in ranks)
    # Full replicas need more.
    whole = rank_memory(config, layout_of_ranks)
    assert (whole.weights, whole.gradients > planned.gradients) == (planned.weights, True)


@pytest.mark.parametrize("name", LOPSIDED)
def test_a_rank_may_train_no_expert(name: str) -> None:
    for rank, seen in enumerate(found[name, "fp32", True] for found in outcomes(2)):
        own = set(LOPSIDED[name]) if rank == 0 else set()
        assert {e for box in seen.gradients if ".experts." in box.key for e in experts_of(box)} == own
        assert seen.gradient_numel == seen.held
        assert len(set(map(tuple, seen.frozen))) == 1
        assert seen.losses[0] == outcome("EP2", "fp32")[rank].losses[0]
        assert seen.differing == []


def test_a_run_in_which_all_train_fails_these_checks() -> None:
    (rank,) = outcome("single", "bf16", freezes=False)
    assert rank.frozen == [[]] * (STEPS + 1)
    start = assemble(configuration("single", "bf16").model, [outcome("single", "bf16")[0].weights])
    end = assemble(configuration("single", "bf16").model, [rank.weights])
    key = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    assert not torch.equal(start[key][0], end[key][0])
    assert rank.gradient_numel - outcome("single", "bf16")[0].gradient_numel == 2 * 4 * 3 * 32 * 16
