"""A site that trains some of the experts goes on from its checkpoint, on its layout and on another one."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import read_checkpoint, verify_checkpoint, write_checkpoint
from pretrain.config.schema import Config
from pretrain.errors import CheckpointError
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import mesh_of
from pretrain.platform import cpu_adapter
from pretrain.run import checkpoint_tensors, partial_keys
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import CPU, Box, assemble, boxes, microbatches
from tests.parallel.test_frozen_experts import TRAINED, configuration

STEPS = 2
HERE, ELSEWHERE = "EP2xDP2", "ETP2xEP2"
OTHERS = (0, 1, 4, 5)


@dataclass
class Seen:
    """What one rank holds, by run: straight, resumed, elsewhere, others."""

    weights: dict[str, list[Box]] = field(default_factory=dict)
    """In the end."""
    states: dict[str, list[Box]] = field(default_factory=dict)
    """Masters and moments at the checkpoint."""
    refused: str = ""
    fresh: list[tuple[str, int]] = field(default_factory=list)
    """Key and expert of what had to begin anew."""


def train(engine: Engine, optimizer: ShardedOptimizer, config: Config, steps: range) -> None:
    for step in steps:
        engine.forward_backward(microbatches(config, engine.mesh, step))
        optimizer.step(1.0)


def states_of(optimizer: ShardedOptimizer) -> list[Box]:
    return [Box(tensor.key, tensor.global_offset, tensor.data.clone()) for tensor in optimizer.named_state()]


def run(path: Path) -> Seen:
    """Train, save, go on; then from the checkpoint on the same layout, on another, and with other experts."""
    cpu_adapter.apply()
    seen, config = Seen(), configuration(HERE, "bf16")
    with mesh_of(config.parallel, CPU) as mesh:
        engine = build_engine(config, mesh, trained=TRAINED)
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups)
        train(engine, optimizer, config, range(STEPS))
        seen.states["straight"], state = states_of(optimizer), optimizer.state_dict()
        # Of rank 0's keys alone, as everything that is no tensor.
        keys = partial_keys(config, TRAINED) if mesh.is_main else ()
        tensors = checkpoint_tensors(engine, optimizer)
        write_checkpoint(path, tensors, step=STEPS, state={}, config_toml="", partial_keys=keys)
        train(engine, optimizer, config, range(STEPS, STEPS + 1))
        seen.weights["straight"] = boxes(engine.shards, lambda shard: shard.tensor)
    for name, layout in (("resumed", HERE), ("elsewhere", ELSEWHERE)):
        other = configuration(layout, "bf16")
        with mesh_of(other.parallel, CPU) as mesh:
            engine = build_engine(other, mesh, trained=TRAINED)
            optimizer = ShardedOptimizer(engine.shards, other.optim, mesh.groups)
            assert read_checkpoint(path, checkpoint_tensors(engine, optimizer)) == []
            optimizer.load_state_dict(state)
            optimizer.load_finished()
            seen.states[name] = states_of(optimizer)
            train(engine, optimizer, other, range(STEPS, STEPS + 1))
            seen.weights[name] = boxes(engine.shards, lambda shard: shard.tensor)
    _with_other_experts(path, configuration(ELSEWHERE, "bf16"), seen)
    return seen


def _with_other_experts(path: Path, config: Config, seen: Seen) -> None:
    with mesh_of(config.parallel, CPU) as mesh:
        engine = build_engine(config, mesh, trained=OTHERS)
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups)
        tensors = checkpoint_tensors(engine, optimizer)
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(path, tensors)
        seen.refused = str(error.value)
        # What a caller does who wants the new ones to begin anew.
        weights = [tensor for tensor in tensors if split_state_key(tensor.key)[0] is None]
        read_checkpoint(path, weights, leave_out=["optimizer."])
        optimizer.begin_again()
        gaps = read_checkpoint(path, tensors, but_for=partial_keys(config, OTHERS))
        seen.fresh = [(key, box.offset[0] + i) for key, box in gaps for i in range(box.shape[0])]
        seen.states["others"] = states_of(optimizer)
        seen.weights["others"] = boxes(engine.shards, lambda shard: shard.tensor)


@dataclass
class Outcome:
    """What a test looks at."""

    path: Path
    ranks: list[Seen]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return assemble(configuration(HERE, "bf16").model, [rank.weights[name] for rank in self.ranks])

    def states(self, name: str) -> dict[str, torch.Tensor]:
        """Whole states of experts, NaN where nobody has any."""
        weights, found = self.weights(name), {}
        for box in (box for rank in self.ranks for box in rank.states[name] if ".experts." in box.key):
            shape = weights[split_state_key(box.key)[1]].shape
            whole = found.setdefault(box.key, torch.full(shape, torch.nan))
            whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.values.shape, strict=True))] = box.values
        return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("sites") / "step_00000002"
    return Outcome(path, run_ranks(run, 4, path))


def test_checkpoint_has_all_weights_and_the_state_of_own_experts(outcome: Outcome) -> None:
    assert verify_checkpoint(outcome.path) == []
    tensors = json.loads((outcome.path / "index.json").read_text())["tensors"]
    assert {key.split(".")[1] for key in tensors if key.startswith("optimizer.")} == {"master", "exp_avg", "exp_avg_sq"}
    experts = defaultdict(list)
    for key, tensor in tensors.items():
        is_state = key.startswith("optimizer.") and ".experts." in key
        assert tensor.get("partial", False) == is_state, key
        if ".experts." in key:
            experts[key] += [box["offset"][0] + i for box in tensor["boxes"] for i in range(box["shape"][0])]
            assert sorted(experts[key]) == list(TRAINED if is_state else range(8)), key
            assert tensor["dtype"] == ("F32" if is_state else "BF16")
    assert len(experts) == 2 * 2 * 4


def test_a_site_goes_on_as_if_it_had_never_stopped(outcome: Outcome) -> None:
    straight, resumed = outcome.weights("straight"), outcome.weights("resumed")
    assert all(torch.equal(weights, resumed[key]) for key, weights in straight.items())
    # A step before, it is elsewhere.
    others = outcome.weights("others")
    assert not any(torch.equal(weights, others[key]) for key, weights in straight.items() if ".linear_" in key)


@pytest.mark.parametrize("name", ["resumed", "elsewhere"])
def test_every_layout_takes_over_every_state(name: str, outcome: Outcome) -> None:
    straight, loaded = outcome.states("straight"), outcome.states(name)
    assert straight.keys() == loaded.keys() == partial_keys(configuration(HERE, "bf16"), TRAINED)
    for key, values in straight.items():
        own = torch.tensor([expert in TRAINED for expert in range(len(values))])
        assert torch.equal(values[own], loaded[key][own]), key
        assert bool(values[own].flatten(1).any(1).all()), key
        for states in (values, loaded[key]):
            assert torch.equal(states.isnan().flatten(1).all(1), ~own), key
            assert torch.equal(states.isnan().flatten(1).any(1), ~own), key


def test_other_experts_are_refused_or_begin_anew_where_that_is_asked_for(outcome: Outcome) -> None:
    for rank in outcome.ranks:
        assert "the checkpoint is of a site that trains other experts: optimizer." in rank.refused
        assert "\n" not in rank.refused
    # A rank has the halves of its own experts.
    gained = set(OTHERS) - set(TRAINED)
    keys = partial_keys(configuration(HERE, "bf16"), TRAINED)
    assert {part for rank in outcome.ranks for part in rank.fresh} == {
        (key, expert) for key in keys for expert in gained
    }
    before, weights = outcome.states("straight"), outcome.weights("others")
    for key, states in outcome.states("others").items():
        name, of_weight = split_state_key(key)
        for expert in OTHERS:
            begun = weights[of_weight][expert].float() if name == "master" else torch.zeros_like(states[expert])
            assert torch.equal(states[expert], begun if expert in gained else before[key][expert]), (key, expert)
