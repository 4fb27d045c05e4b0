"""What a growth makes of the state of every kind of optimizer, entry by entry: indices written down here, not maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.growth import GrowthConfig
from pretrain.config.optim import OptimConfig
from pretrain.config.rules import check
from pretrain.config.schema import ModelConfig
from pretrain.config.stages import grown_model
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.transplant import transplant
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim import states as states_module
from pretrain.optim.routing import check_routes, route
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key, states_of
from tests.helpers import configs
from tests.optim.build import KINDS, MOE, Layout, config_of, full_value, make_groups, make_shards, set_grads

EVERYTHING: dict[str, Any] = {
    "depth": {"keep_first": 1},
    "experts": {"order": "interleave", "noise": 0.1},
    "hidden": {},
    "expert_ffn": {},
    "query_groups": {"factor": 1.5},
}
# Axis -> index of the old axis that each index comes from; all other axes stay. Layer 2 is a copy of layer 1.
SOURCES: dict[str, list[int]] = {
    "hidden": [*range(32), *range(32)],
    "expert": [0, 0, 1, 1, 2, 2, 3, 3],
    "expert_ffn": [*range(24), *range(24)],
    "kv_group": [0, 1, 2, 3, 0, 1],
}
NEW: dict[str, list[bool]] = {
    "hidden": [False] * 32 + [True] * 32,
    "expert": [False, True] * 4,
    "expert_ffn": [False] * 24 + [True] * 24,
    "kv_group": [False] * 4 + [True] * 2,
}
DOUBLED: dict[str, Any] = {"experts": {"noise": 0.0, "order": "interleave"}}

Model = tuple[list[Shard], ShardedOptimizer]


def model_of(model: ModelConfig, optim: OptimConfig) -> Model:
    shards = make_shards(model, Layout())
    return shards, ShardedOptimizer(shards, optim, make_groups(Layout()))


def trained(optim: OptimConfig, steps: int = 3) -> Model:
    """The small model after steps with random gradients; no state of it is zero."""
    shards, optimizer = model_of(MOE, optim)
    for step in range(steps):
        set_grads(shards, str(step))
        optimizer.step(1.0)
    for state in optimizer.named_state():
        if not state.data.any():  # Sophia's curvature, which only a model has
            state.data.fill_(0.1)
    return shards, optimizer


def grown(model: Model, optim: OptimConfig, growth: Mapping[str, Any]) -> Model:
    """What a model grows into."""
    config = GrowthConfig.model_validate({"at_step": 5, **growth})
    point = GrowthPoint(1, config, MOE, grown_model(MOE, config))
    after = model_of(point.after, optim)
    for shard in after[0]:
        shard.tensor.data.zero_()
    tensors = [
        optimizer.whole_state() + [shard.sharded() for shard in shards if not shard.logical.trainable]
        for shards, optimizer in (model, after)
    ]
    transplant(point, *tensors, optim=optim, seed=1, device=torch.device("cpu"), ranks=Ranks())
    after[1].load_state_dict(model[1].state_dict())
    return after


def states(model: Model) -> dict[str, torch.Tensor]:
    return {state.key: state.data for state in model[1].named_state()}


def origin(weight: LogicalTensor, axis: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each index of an axis of a state comes from, and whether it is new; None if no block stays as it was."""
    name = axis.removesuffix("_blocks")
    if name not in SOURCES:
        return np.arange(size), np.zeros(size, dtype=bool)
    block = weight.shape[weight.axes.index(name)] // size
    source, new = (np.array(values).reshape(-1, block) for values in (SOURCES[name], NEW[name]))
    if block > 1 and name == "expert":  # the router's, whose rows interleave
        return None
    return source[:, 0] // block, new[:, 0]


@pytest.mark.parametrize("policy", ["asymmetric", "copy", "reset"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_of_every_state(kind, policy):
    optim = config_of(kind)
    before = trained(optim)
    after = grown(before, optim, EVERYTHING | {"optimizer_state": policy})
    old, old_weights = states(before), {shard.key: shard.logical for shard in before[0]}
    seen = {"new": 0, "old": 0}
    for key, state in states(after).items():
        name, weight = split_state_key(key)
        source = weight.replace("layers.2.", "layers.1.")
        declared = states_of(old_weights[source], route(old_weights[source], optim).rule, optim)[name]
        values = old[key.replace("layers.2.", "layers.1.")]
        if name == "radius":
            assert not state.any(), key
            continue
        axes = zip(declared.tensor.axes, declared.tensor.shape, strict=True)
        origins = [origin(old_weights[source], axis, size) for axis, size in axes]
        if None in origins:
            assert not state.any(), key
            continue
        indices, masks = zip(*origins, strict=True)
        gathered = values.view(declared.tensor.shape)[np.ix_(*indices)]
        new = torch.from_numpy(functools.reduce(np.logical_or.outer, masks)) | (source != weight)
        zero = torch.zeros_like(gathered)
        expected = {"asymmetric": torch.where(new, zero, gathered), "copy": gathered, "reset": zero}[policy]
        assert torch.equal(state.view(expected.shape), expected), key
        seen["new"] += int(gathered[new].count_nonzero())
        seen["old"] += int(gathered[~new].count_nonzero())
    assert min(seen.values()) > 0, "zeros would show nothing"


# Exact: experts that are doubled without noise get half of the gradient each, and their twins move as one did.


def gap(kind: str, policy: str) -> float:
    """Largest relative distance of weights after more steps, with experts doubled and not."""
    unread = OptimConfig.model_validate({"kind": kind}).unread()[""]
    keys: dict[str, Any] = {"routes": {}, "clip_grad": 0.0} | ({} if "eps" in unread else {"eps": 1e-20})
    optim = config_of(kind, **keys)
    before = trained(optim)
    after = grown(before, optim, DOUBLED | {"optimizer_state": policy})
    for step in range(3, 7):
        for shards, optimizer in (before, after):
            for shard in shards:
                if shard.logical.trainable:
                    shard.tensor.main_grad = gradient_of(shard, step).reshape(shard.tensor.shape).clone()
            optimizer.step(1.0)
    plain = {shard.key: shard.view() for shard in before[0]}
    distances = []
    for shard in after[0]:
        expected = plain[shard.key].detach()
        if "expert" in shard.logical.axes:
            expected = expected.repeat_interleave(2, dim=0)
        distances.append(float((shard.view().detach() - expected).norm() / expected.norm()))
    return max(distances)


def gradient_of(shard: Shard, step: int) -> torch.Tensor:
    """The gradient of the model that did not grow, halves of it for twins."""
    logical = next(tensor for tensor in logical_tensors(MOE) if tensor.key == shard.key)
    value = full_value(logical, f"grad {step}")
    if shard.shape == logical.shape:
        return value
    return value.repeat_interleave(2, dim=0) / 2


def allowed(kind: str) -> bool:
    config = configs.make_config(configs.MOE, {"optim.kind": kind, "growth": [{"at_step": 5, **DOUBLED, **EXACT}]})
    problems = check(config) or check_routes(config)
    assert len(problems) <= 1
    assert all(line.startswith('growth[0].optimizer_state = "exact": ') for line in problems)
    return not problems


EXACT = {"optimizer_state": "exact"}


@pytest.mark.parametrize("kind", KINDS)
def test_exact_state_is_allowed_where_twins_go_on_as_one_did(kind):
    """Negative control: under the others they do not, and with a state as it was neither."""
    if allowed(kind):
        assert gap(kind, "exact") < 1e-6
        assert gap(kind, "copy") > 1e-5
    else:
        assert gap(kind, "exact") > 1e-5


def test_a_layer_under_another_rule_starts_anew():
    """Layer 2 is a copy of layer 1, which has another rule with states of the same names."""
    optim = config_of("soap", routes={"decoder.layers.1.*linear*": "adamw"})
    before = trained(optim)
    after = states(grown(before, optim, {"depth": {"keep_first": 1}, "optimizer_state": "copy"}))
    for layer, kept in ((1, True), (2, False)):
        key = f"optimizer.exp_avg_sq.decoder.layers.{layer}.mlp.experts.linear_fc1.weight"
        assert bool(after[key].any()) == kept, key


def test_other_axes_show(monkeypatch: pytest.MonkeyPatch):
    """Negative control of all above: a state that says other axes than its rule keeps does not come through."""
    right: Callable[..., Any] = states_module.row_axes
    monkeypatch.setattr(states_module, "row_axes", lambda weight: tuple(reversed(right(weight))))
    with pytest.raises((AssertionError, RuntimeError)):
        test_every_entry_of_every_state("adam_mini", "copy")
