"""What becomes of the optimizer state at a growth, and what follows from it: gradients and updates of twins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.growth import transplant
from pretrain.model.counts import count_parameters
from pretrain.model.logical import LogicalTensor, logical_tensors
from tests.helpers.growth import TINY, TINY_DENSE, Model, gathered, grow, mask_of, mesh_of_one, new_model

ADAMW: dict[str, Any] = {"optim.kind": "adamw"}
MUON: dict[str, Any] = {"optim.kind": "muon"}
OPTIMIZERS = {"adamw": ADAMW, "muon": MUON}
# All sizes are multiples of 16: the CPU then adds up copies in the same order, and twins stay equal bit for bit.
SHARED = {"model.shared_expert_ffn_size": 32}


@pytest.fixture(scope="module")
def source() -> Iterator[Callable[..., Model]]:
    """Models by their changes to TINY, trained for a few steps so that they have state; each built once.

    They must be left as they are: train what they grow into.
    """
    built: dict[str, Model] = {}
    with mesh_of_one() as mesh:

        def of(changes: dict[str, Any]) -> Model:
            if repr(changes) not in built:
                built[repr(changes)] = new_model(mesh, TINY, changes, steps=3)
            return built[repr(changes)]

        yield of


def states_of(model: Model) -> dict[str, tuple[str, torch.Tensor]]:
    """Key of a state -> key of its weight, and the state."""
    found = {}
    for key, value in model.tensors.items():
        if key.startswith("optimizer."):
            found[key] = (key.split(".", 2)[2], value)
    return found


def tensors_by_key(model: Model) -> dict[str, LogicalTensor]:
    return {tensor.key: tensor for tensor in logical_tensors(model.stage.model)}


# The policies.

EVERYTHING = {
    "depth": {"method": "stack"},
    "experts": {"noise": 0.01, "order": "interleave"},
    "hidden": {},
    "expert_ffn": {},
    "query_groups": {"factor": 1.5},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["asymmetric", "copy", "reset"])
def test_state_of_old_and_new_entries(policy, optimizer, source):
    model = source(OPTIMIZERS[optimizer])
    grown = grow(model, **EVERYTHING, optimizer_state=policy)
    tensors, old_states, counts = tensors_by_key(grown), states_of(model), {"new": 0, "zero": 0}
    names = set()
    for key, (weight, state) in states_of(grown).items():
        name = key.split(".")[1]
        names.add(name)
        tensor_map = grown.points[-1].tensor_map(tensors[weight])
        before = gathered(tensor_map, old_states[f"optimizer.{name}.{tensor_map.source.key}"][1])
        new = mask_of(tensor_map)
        # Kept bit for bit, without the factors of the weights.
        kept = {"asymmetric": torch.where(new, 0.0, before), "copy": before, "reset": torch.zeros_like(before)}
        assert torch.equal(state, kept[policy]), key
        if name in ("exp_avg", "momentum"):
            counts["new"] += int(new.sum())
            counts["zero"] += int((state[new] == 0).sum())
            assert before[new].any() or not new.any(), key
    assert names == ({"exp_avg", "exp_avg_sq"} if optimizer == "adamw" else {"exp_avg", "exp_avg_sq", "momentum"})
    totals = [count_parameters(part.stage.model).total for part in (model, grown)]
    assert counts["new"] == totals[1] - totals[0]
    assert (counts["zero"] == counts["new"]) == (policy != "copy")
    assert grown.optimizer.state_dict()["step"] == (0 if policy == "reset" else 3)


def test_masters_grow_and_weights_are_rounded_from_them(source):
    model = source({"run.precision": "bf16"})
    grown = grow(model, hidden={}, expert_ffn={}, depth={"factor": 3})
    for key, tensor in tensors_by_key(grown).items():
        tensor_map = grown.points[-1].tensor_map(tensor)
        master = gathered(tensor_map, model.tensors[tensor_map.source.key])
        for axis, factors in zip(tensor.axes, tensor_map.factors, strict=True):
            assert (factors is not None) == (axis in tensor.fan_in and axis in ("hidden", "expert_ffn"))
            master = master * 0.5 if factors is not None else master
        assert torch.equal(grown.tensors[key], master), key
    assert any(not torch.equal(value, value.bfloat16().float()) for value in model.tensors.values())
    for shard in grown.engine.shards:
        if shard.logical.trainable:
            assert torch.equal(shard.tensor.flatten(), grown.tensors[shard.key].bfloat16().flatten()), shard.key


def test_state_that_starts_at_zero_makes_a_full_first_step(source):
    """Reset: the count is back to zero, so that bias correction makes Adam's first update the learning rate."""
    model = source({"optim.weight_decay": 0.0})
    for policy, size in {
        "reset": 1.0,
        "asymmetric": (1 - 0.9) / (1 - 0.9**4) / math.sqrt(0.05 / (1 - 0.95**4)),
    }.items():
        grown = grow(model, hidden={}, optimizer_state=policy)
        key = "decoder.layers.0.self_attention.linear_qkv.weight"
        before = grown.tensors[key].clone()
        grown.train(1, first=7)
        step = (grown.tensors[key] - before)[..., 32:].abs() / 1e-3
        assert step.median() == pytest.approx(size, rel=1e-3)


# The exact policy.

# Adam's eps would be felt twice as much by gradients of half the size.
EXACT = {"optim.eps": 1e-20, "model.router": {"score_function": "sigmoid", "bias_update_rate": 1e-2, "aux_loss": 1e-2}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [2, 3])
def test_exact_state_is_scaled_as_the_gradients_are(factor, optimizer, source):
    model = source(EXACT | OPTIMIZERS[optimizer])
    grown = grow(model, experts={"noise": 0, "factor": factor}, optimizer_state="exact")
    share, tensors = {"exp_avg": 1 / factor, "exp_avg_sq": 1 / factor**2, "momentum": 1 / factor}, tensors_by_key(grown)
    for key, (weight, state) in states_of(grown).items():
        name, tensor_map = key.split(".")[1], grown.points[-1].tensor_map(tensors[weight])
        before = gathered(tensor_map, model.tensors[f"optimizer.{name}.{weight}"])
        expected = before * share[name] if ".experts." in weight or ".router." in weight else before
        assert torch.equal(state, expected), key


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ["append", "interleave"])
def test_exact_state_trains_on_as_before(order, optimizer, source, monkeypatch):
    """The losses of the source's own next steps; twins, their biases and their loads stay equal, bit for bit."""
    changes = EXACT | OPTIMIZERS[optimizer]
    with_state = {"experts": {"noise": 0, "order": order}, "optimizer_state": "exact"}
    grown = grow(source(changes), **with_state)
    # The source again: that of all tests must stay as it is.
    plain = new_model(grown.engine.mesh, TINY, changes, steps=3)
    expected, found = plain.train(10, first=3), grown.train(10, first=3)
    assert found == pytest.approx(expected, rel=1e-5)
    for key, tensor in tensors_by_key(grown).items():
        if "expert" in tensor.axes:
            first, second = twins(grown, key, "expert")
            assert torch.equal(first, second), key
            if tensor.kind == "router_bias":
                assert torch.equal(first, plain.tensors[key])
    # With moments as they are, losses are others.
    scaled = transplant.state_copying
    monkeypatch.setattr(transplant, "state_copying", lambda p, state, m: scaled(p, replace(state, degree=0), m))
    copied = grow(source(changes), **with_state).train(10, first=3)
    assert copied != pytest.approx(expected, rel=1e-5)


# Twins.


def twins(grown: Model, key: str, axis: str, values: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies along an axis of a tensor, and beside them what they are copies of."""
    tensor = tensors_by_key(grown)[key]
    dim = tensor.axes.index(axis)
    axis_map = grown.points[-1].tensor_map(tensor).axes[dim]
    values = grown.tensors[key] if values is None else values
    copies = torch.from_numpy(axis_map.is_new.nonzero()[0])
    old = [[*axis_map.source].index(source) for source in axis_map.source[axis_map.is_new]]
    return values.index_select(dim, torch.tensor(old)), values.index_select(dim, copies)


AXES = {"hidden": "hidden", "expert_ffn": "expert_ffn", "query_groups": "kv_group", "shared_expert_ffn": "shared_ffn"}


def distances(grown: Model) -> dict[str, float]:
    """Key and axis -> relative distance of copies and sources, of all axes of all weights that grew in width."""
    found = {}
    for key, tensor in tensors_by_key(grown).items():
        for name, axis in AXES.items():
            if axis in tensor.axes and getattr(grown.points[-1].config, name):
                old, new = twins(grown, key, axis)
                found[f"{key} {axis}"] = float((old - new).norm() / old.norm())
    return found


WIDTH = {"hidden": {}, "expert_ffn": {}, "query_groups": {}, "shared_expert_ffn": {}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("axes", [["hidden"], ["expert_ffn", "query_groups"], list(WIDTH)], ids=str)
def test_symmetric_state_locks_copies_and_asymmetric_state_frees_them(axes, optimizer, source):
    model, keys = source(OPTIMIZERS[optimizer] | SHARED), {axis: {} for axis in axes}
    for policy in ("copy", "reset"):
        grown = grow(model, **keys, optimizer_state=policy)
        grown.train(20)
        assert not any(distances(grown).values()), policy
    free = grow(model, **keys, optimizer_state="asymmetric")
    assert not any(distances(free).values())
    free.train(1)
    first = distances(free)
    assert all(first.values())
    free.train(9, first=1)
    tenth = distances(free)
    assert all(tenth[key] > first[key] for key in first)
    assert min(tenth[key] for key in tenth if "norm" not in key) > 5e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_of_their_own_frees_copies_from_the_second_step(optimizer, source):
    grown = grow(source(OPTIMIZERS[optimizer]), hidden={}, expert_ffn={}, optimizer_state="copy")
    grown.train(1, newer=[1.0])  # re-warm-up begins with the rate of the others
    assert not any(distances(grown).values())
    grown.train(1, first=1, newer=[1.1])
    second = distances(grown)
    assert all(second.values())
    grown.train(8, first=2, newer=[1.3])
    tenth = distances(grown)
    assert all(tenth[key] > second[key] for key in second)


def test_more_copies_than_one_stay_together_without_noise(source):
    """Copies 1, 2 and 3 of a channel have the same state and rate. The rules refuse that; noise is what parts them."""
    model, key = source(SHARED), "decoder.layers.0.mlp.experts.linear_fc2.weight"
    four = {"expert_ffn": {"factor": 4}}
    with pytest.raises(AssertionError, match="stay equal for ever"):
        grow(model, **four)
    parted = grow(model, expert_ffn={"factor": 4, "noise": 0.01})
    for grown in (locked := grow(model, checked=False, **four), parted):
        grown.train(10)
    _, first, second, third = locked.tensors[key].chunk(4, dim=2)
    assert torch.equal(first, second)
    assert torch.equal(second, third)
    assert all((old - new).norm() / old.norm() > 5e-4 for old, new in [twins(locked, key, "expert_ffn")])
    blocks = parted.tensors[key].chunk(4, dim=2)
    assert all(not torch.equal(a, b) for i, a in enumerate(blocks) for b in blocks[:i])


def test_noise_parts_duplicated_experts(source):
    """Chosen together, twins have the same gradients; asymmetric state or noise tells them apart."""
    model, key = source({}), "decoder.layers.0.mlp.experts.linear_fc1.weight"
    found = {}
    for noise in (0.0, 0.01):
        grown = grow(model, experts={"noise": noise}, optimizer_state="copy")
        old, new = twins(grown, key, "expert")
        before = (old - new).norm() / old.norm()
        grown.train(20)
        old, new = twins(grown, key, "expert")
        found[noise] = (float(before), float((old - new).norm() / old.norm()))
    assert found[0.0] == (0.0, 0.0)
    assert found[0.01][0] == pytest.approx(0.01, rel=0.05)
    assert found[0.01][1] > found[0.01][0]


# The first gradients after a growth, on the batch of the source's last ones.


def gradients(model: Model) -> dict[str, torch.Tensor]:
    model.backward()
    return model.gradients


# Where an output axis was duplicated, each copy gets half. Elsewhere an old entry gets what it got before.
HALF = {
    "hidden": ("embedding", "layernorm.weight", "linear_proj", "linear_fc2"),
    "expert_ffn": ("mlp.experts.linear_fc1",),
    "shared_expert_ffn": ("shared_experts.linear_fc1",),
    "query_groups": ("linear_qkv",),
}


@pytest.mark.parametrize("axes", [*([axis] for axis in WIDTH), list(WIDTH)], ids=str)
def test_first_gradients_after_growth_in_width(axes, source):
    model = source(SHARED)
    grown = grow(model, **{axis: {} for axis in axes})
    before, after, seen = gradients(model), gradients(grown), set()
    for key, tensor in tensors_by_key(grown).items():
        if not tensor.trainable:
            continue
        scale = after[key].abs().max()
        for axis in (AXES[name] for name in axes):
            if axis in tensor.axes:
                old, new = twins(grown, key, axis, after[key])
                torch.testing.assert_close(old, new, rtol=0, atol=1e-6 * float(scale), msg=f"{key} {axis}")
        is_per_head = key.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        ratio = 1.0
        for axis in axes:
            if any(part in key for part in HALF[axis]) and not is_per_head:
                ratio *= 0.5
        old_block = after[key][tuple(slice(size) for size in before[key].shape)]
        expected = before[key] * ratio
        torch.testing.assert_close(old_block, expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=key)
        assert expected.any()
        seen.add(ratio)
    assert seen == {0.5, 1.0}


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("order", ["append", "interleave"])
def test_first_gradients_of_duplicated_experts(order, factor, source):
    """A share each for experts and rows of the router, so that the square of their norm falls as much; others stay."""
    model = source(SHARED)
    grown = grow(model, checked=False, experts={"noise": 0, "factor": factor, "order": order})
    before, after = gradients(model), gradients(grown)
    squares = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for key, tensor in tensors_by_key(grown).items():
        if not tensor.trainable:
            continue
        is_routed = "expert" in tensor.axes
        expected = gathered(grown.points[-1].tensor_map(tensor), before[key]) / (factor if is_routed else 1)
        atol = 3e-6 * float(expected.abs().max())
        torch.testing.assert_close(after[key], expected, rtol=0, atol=atol, msg=key)
        squares[is_routed][0] += float(before[key].square().sum())
        squares[is_routed][1] += float(after[key].square().sum())
    assert squares[True][1] / squares[True][0] == pytest.approx(1 / factor, rel=1e-5)
    assert squares[False][1] / squares[False][0] == pytest.approx(1, rel=1e-5)


def test_a_dense_model_with_tied_ends(source):
    model = new_model(source({}).engine.mesh, TINY_DENSE, {"model.tie_embeddings": True})
    grown = grow(model, hidden={}, ffn={})
    before, after = gradients(model), gradients(grown)
    for key, expected in before.items():
        # Attention reads the stream and writes heads, which stay; norms per head are not of it at all.
        is_half = not key.endswith(("linear_qkv.weight", "q_layernorm.weight", "k_layernorm.weight"))
        old = after[key][tuple(slice(size) for size in expected.shape)] * (2 if is_half else 1)
        torch.testing.assert_close(old, expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=key)
