"""What a model computes right after a growth, against what it computed before, through the real engine in fp32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config.schema import RouterConfig
from pretrain.growth import maps
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.scores import add_scores, no_scores, utility_due
from pretrain.model.initialise import draw_normal
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.router import CountingRouter
from pretrain.optim.matrices import split_matrices
from pretrain.parallel.routing_stats import aux_losses, expert_load, reset_routing_stats
from tests.helpers.configs import make_config
from tests.helpers.growth import (
    TINY,
    TINY_DENSE,
    Model,
    change,
    gathered,
    grow,
    mesh_of_one,
    new_model,
    point_of,
    with_growth,
)

# Rounding of a few layers in fp32, relative to the largest logit. Observed: 2e-7 to 6e-7.
ROUNDING = 1e-6

TIED = {"model.tie_embeddings": True}
SHARED = {"model.shared_expert_ffn_size": 24}
DENSE_FIRST = {"model.first_dense_layers": 1, "model.ffn_size": 32, "model.num_layers": 3}


@pytest.fixture(scope="module")
def source() -> Iterator[Callable[..., Model]]:
    """Models by their changes to TINY (or TINY_DENSE), each built once."""
    built: dict[str, Model] = {}
    with mesh_of_one() as mesh:

        def of(changes: dict[str, Any] | None = None, start: dict[str, Any] = TINY) -> Model:
            name = repr((start, changes))
            if name not in built:
                built[name] = new_model(mesh, start, changes)
            return built[name]

        yield of


def logits_change(before: Model, after: Model) -> float:
    return change(before.logits(), after.logits())


# Width.

JOINT = {"hidden": {}, "expert_ffn": {}, "query_groups": {}}
UNEVEN = {"init": "uneven", "split": 0.3}
WIDTHS = {
    "hidden": ({}, {"hidden": {}}),
    "hidden, tied": (TIED, {"hidden": {}}),
    "experts' ffn": ({}, {"expert_ffn": {}}),
    "shared expert's ffn": (SHARED, {"shared_expert_ffn": {}}),
    "attention": ({}, {"query_groups": {}}),
    "attention with a key for each query": ({"model.num_query_groups": 0}, {"query_groups": {}}),
    "attention without qk_norm": ({"model.qk_norm": False}, {"query_groups": {}}),
    "dense": (None, {"hidden": {}, "ffn": {}}),
    "dense layer first": (DENSE_FIRST, {"ffn": {}, "hidden": {}}),
    "joint, tied": (TIED | SHARED, {**JOINT, "shared_expert_ffn": {}}),
    "uneven": (TIED, dict.fromkeys(JOINT, UNEVEN)),
    "uneven, untied": ({}, dict.fromkeys(JOINT, UNEVEN)),
    "three times": ({}, {"hidden": {"factor": 3}, "expert_ffn": {"factor": 3}}),
    "three times, tied": (TIED, {"hidden": {"factor": 3}, "query_groups": {"factor": 3}}),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_whole_factors_of_width_preserve_the_function(name, source, monkeypatch):
    changes, keys = WIDTHS[name]
    model = source(changes) if changes is not None else source({}, TINY_DENSE)
    # 0.3 and 0.7 do not add up to 1 in binary; a half and a half do.
    rounding = 3 * ROUNDING if UNEVEN in keys.values() else ROUNDING
    # Rules refuse three times without noise: for what comes later.
    assert logits_change(model, grow(model, checked=False, **keys)) <= rounding
    factors = GrowthPoint._factors

    def ones(point: GrowthPoint, tensor: LogicalTensor, axis: str) -> np.ndarray | None:
        found = factors(point, tensor, axis)
        return None if found is None else np.ones_like(found)

    monkeypatch.setattr(GrowthPoint, "_factors", ones)
    assert logits_change(model, grow(model, checked=False, **keys)) > 0.05


@pytest.mark.parametrize("axis", ["hidden", "expert_ffn", "query_groups"])
@pytest.mark.parametrize("init", ["copy", "random", "random-copy", "copy-random", "copy-zero"])
def test_what_does_not_preserve_the_function(axis, init, source):
    """One-sided growth, and copies of a part."""
    model = source({"model.num_query_groups": 2})
    grown = grow(model, **{axis: {"init": init, "factor": 1.5 if init == "copy" else 2}})
    assert logits_change(model, grown) > 0.01


def test_a_stream_of_zeros_preserves_the_function(source):
    """Zero rows halve the mean square of the stream; norms make up for it, and columns are scaled for just that."""
    for changes in (TIED, {}):
        model = source(changes)
        # But for norm_eps, whose share doubles.
        assert logits_change(model, grow(model, hidden={"init": "zero-copy"})) < 1e-3
        assert logits_change(model, grow(model, expert_ffn={"init": "zero-copy"})) > 0.01


def test_tied_logits_are_halved_each_time(source):
    model = source(TIED)
    once = grow(model, hidden={})
    twice = grow(once, hidden={})
    assert (once.stage.model.logit_scale, twice.stage.model.logit_scale) == (0.5, 0.25)
    assert logits_change(model, twice) <= ROUNDING
    assert logits_change(model, grow(once, hidden={}, wrong={"logit_scale": 0.5})) == pytest.approx(1, rel=1e-5)


# Factors on weights whose inputs are doubled, from the paper's table of tensors (arXiv 2602.02472, section 3).
HALVED = {
    "hidden": {
        "self_attention.linear_qkv",
        "mlp.router",
        "mlp.linear_fc1",
        "mlp.experts.linear_fc1",
        "mlp.shared_experts.linear_fc1",
        "output_layer",
    },
    "ffn": {"mlp.linear_fc2"},
    "expert_ffn": {"mlp.experts.linear_fc2"},
    "shared_expert_ffn": {"mlp.shared_experts.linear_fc2"},
    "query_groups": {"self_attention.linear_proj"},
}


def name_of(key: str) -> str:
    """Key of a tensor without its layer."""
    return key.split(".", 3)[-1].removesuffix(".weight") if ".layers." in key else key.removesuffix(".weight")


@pytest.mark.parametrize("axes", [*([axis] for axis in HALVED), list(HALVED)], ids=str)
def test_weights_are_their_sources_times_the_factor(axes, source):
    """Bit for bit, in fp32: a half is exact. `[gate; up]` and `[queries; key; value]` grow in each of their parts."""
    model = source(DENSE_FIRST | SHARED)
    grown, halved = grow(model, **{axis: {} for axis in axes}), set()
    for tensor in logical_tensors(grown.stage.model):
        tensor_map = grown.points[-1].tensor_map(tensor)
        old, new = gathered(tensor_map, model.tensors[tensor_map.source.key]), grown.tensors[tensor.key]
        factor = 0.5 if any(name_of(tensor.key) in HALVED[axis] for axis in axes) else 1.0
        assert torch.equal(new, old * factor), tensor.key
        halved |= {name_of(tensor.key)} if factor < 1 else set()
    assert halved == set().union(*(HALVED[axis] for axis in axes))


@pytest.mark.parametrize(
    ("axes", "expected_ratios"),
    [
        (["hidden"], {0.71, 1.41}),
        (["expert_ffn"], {0.71, 1.0, 1.41}),
        (["query_groups"], {0.71, 1.0, 1.41}),
        (["hidden", "expert_ffn"], {0.71, 1.0, 1.41}),
    ],
    ids=str,
)
def test_spectral_norms(axes, expected_ratios, source):
    """1/sqrt(2) where inputs are doubled, sqrt(2) where outputs are, 1 where both are."""
    model = source(DENSE_FIRST)
    grown = grow(model, **{axis: {} for axis in axes})
    ratios = set()
    for tensor in logical_tensors(grown.stage.model):
        tensor_map = grown.points[-1].tensor_map(tensor)
        if tensor.kind in ("norm", "router_bias"):
            continue
        old = split_matrices(tensor_map.source, model.tensors[tensor_map.source.key])
        new = split_matrices(tensor, grown.tensors[tensor.key])
        doubled = {axis for axis, found in zip(tensor.axes, tensor_map.axes, strict=True) if found.is_new.any()}
        expected = math.sqrt(2) ** (len(doubled - {*tensor.fan_in}) - len(doubled & {*tensor.fan_in}))
        ratios.add(round(expected, 2))
        for before, after in zip(old, new, strict=True):
            norms = torch.linalg.matrix_norm(after, 2) / torch.linalg.matrix_norm(before, 2)
            torch.testing.assert_close(norms, torch.full_like(norms, expected), rtol=1e-5, atol=0)
    assert ratios == expected_ratios


@pytest.mark.parametrize("factor", [1.25, 1.5, 2, 2.5])
def test_rms_of_a_partly_copied_input(factor):
    """On independent data the output keeps its RMS within 2%, for any factor; with the one-sided scale it would not."""
    size = {"model.hidden_size": 512, "model.vocab_size": 512}
    point = point_of(with_growth(make_config(TINY, size), {"hidden": {"factor": factor}}))
    output = [*logical_tensors(point.after)][-1]
    tensor_map = point.tensor_map(output)
    x, weight = (draw_normal(0, name, (512, 512), (0, 0), (512, 512)) for name in "xw")
    grown = torch.zeros(output.shape)
    tensor_map.place(grown, (0, 0), weight, (0, 0))
    copied = x[:, tensor_map.axes[1].source]
    ratio = (copied @ grown.T).norm() / (x @ weight.T).norm()
    assert 0.98 < ratio < 1.02
    assert ratio * math.sqrt(1 / factor) / point.scale(tensor_map.source) > 1.1


# Root mean square at every site.


def rms_of_sites(model: Model) -> dict[str, float]:
    """RMS of what every part of the model puts out, for one batch."""
    found: dict[str, float] = {}
    chunk, channels = model.engine.chunks[0], model.stage.model.channels

    def note(name: str, values: torch.Tensor) -> None:
        found[name] = float(values.double().square().mean().sqrt())

    def hook(name: str) -> Callable[..., None]:
        def of(module, inputs, output) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if isinstance(module, CountingRouter):
                note(f"{name} logits", inputs[0] @ module.weight.T)
            elif name.endswith("linear_qkv"):
                slots = values.view(*values.shape[:2], model.stage.model.query_groups, -1, channels)
                for slot, part in {"q": slots[..., :-2, :], "k": slots[..., -2, :], "v": slots[..., -1, :]}.items():
                    note(f"{name} {slot}", part)
            else:
                note(name, values)

        return of

    parts = ("embedding", "linear_qkv", "core_attention", "linear_proj", "router", "mlp", "final_layernorm")
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in chunk.named_modules()
        if name.endswith(parts) or name.rpartition(".")[0].endswith("layers")
    ]
    note("logits", model.logits())
    for handle in handles:
        handle.remove()
    return found


SITES = {
    "hidden": {"hidden": {}},
    "expert_ffn": {"expert_ffn": {}},
    "query_groups": {"query_groups": {}},
    "joint": JOINT,
    "experts": {"experts": {"noise": 0}},
}


@pytest.mark.parametrize("name", SITES)
def test_rms_of_every_site(name, source, monkeypatch):
    model = source({})
    before, after = rms_of_sites(model), rms_of_sites(grow(model, **SITES[name]))
    assert len(before) == 2 * 8 + 3
    assert before.keys() == after.keys()
    assert {site: after[site] / before[site] for site in before} == pytest.approx(dict.fromkeys(before, 1), rel=1e-5)
    if name == "experts":
        return
    monkeypatch.setattr(maps, "fan_in_scale", lambda size, new_size, copied: 1.0)
    unscaled = rms_of_sites(grow(model, **SITES[name]))
    first = {
        site.rpartition("layers.0.")[2]: round(unscaled[site] / before[site], 4)
        for site in before
        if "layers.0." in site
    }
    doubled = {site for site, ratio in first.items() if ratio == 2}
    attention = {f"self_attention.linear_qkv {slot}" for slot in "qkv"} | {"self_attention.core_attention"}
    expected = {
        # Queries and keys are normalised, so that attention itself is as before.
        "hidden": attention | {"self_attention.linear_proj"},
        "expert_ffn": {"mlp"},
        "query_groups": {"self_attention.linear_proj"},
        "joint": attention,
    }
    assert doubled >= expected[name]
    assert (first["self_attention.linear_proj"] == 4) == (name == "joint")
    # The final norm makes up for what the layers did wrong, but not for the output layer.
    assert round(unscaled["logits"] / before["logits"], 1) == (2 if "hidden" in SITES[name] else 1)


# Experts.

E8 = {"model.num_experts": 8, "model.top_k": 4}
SOFTMAX = {"score_function": "softmax", "normalize_top_k": True}
SOFTMAX_OVER_ALL = {"score_function": "softmax", "normalize_top_k": False}
SIGMOID = {"score_function": "sigmoid", "normalize_top_k": True}
PLAIN_SIGMOID = {"score_function": "sigmoid", "normalize_top_k": False}
GROUPS = {"num_groups": 4, "group_top_k": 2}
BIAS = {"bias_update_rate": 1e-2}

ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax": (SOFTMAX, {}),
    "softmax, scaled, shared expert": (SOFTMAX | {"scaling_factor": 2.5}, SHARED),
    "softmax, groups": (SOFTMAX | GROUPS, E8),
    "softmax over all": (SOFTMAX_OVER_ALL, {}),
    "softmax over all, one": (SOFTMAX_OVER_ALL, {"model.top_k": 1}),
    "softmax over all, groups": (SOFTMAX_OVER_ALL | GROUPS, E8),
    "sigmoid": (SIGMOID, {}),
    "sigmoid, bias, scaled, shared expert": (SIGMOID | BIAS | {"scaling_factor": 2.5}, SHARED),
    "sigmoid, bias, groups": (SIGMOID | BIAS | GROUPS, E8),
    "plain sigmoid": (PLAIN_SIGMOID, {}),
    "plain sigmoid, one": (PLAIN_SIGMOID, {"model.top_k": 1}),
    "plain sigmoid, bias, groups, scaled": (PLAIN_SIGMOID | BIAS | GROUPS | {"scaling_factor": 1.5}, E8),
}
DOUBLED = {"noise": 0}


def router_changes(name: str) -> dict[str, Any]:
    router, changes = ROUTERS[name]
    return {"model.router": router, **changes}


@pytest.mark.parametrize("order", ["append", "interleave"])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_duplicated_experts_preserve_the_function(name, factor, order, source):
    model = source(router_changes(name))
    grown = grow(model, checked=False, experts=DOUBLED | {"factor": factor, "order": order})
    assert grown.stage.model.top_k == factor * model.stage.model.top_k
    assert logits_change(model, grown) <= ROUNDING


@pytest.mark.parametrize("order", ["append", "interleave"])
@pytest.mark.parametrize("name", ["sigmoid, bias, scaled, shared expert", "sigmoid, bias, groups", "plain sigmoid"])
def test_held_experts_preserve_it_only_out_of_reach(name, order, source):
    model = source(router_changes(name) | {"model.router.bias_update_rate": 1e-2})
    held = DOUBLED | {"order": order, "top_k": "hold"}
    assert logits_change(model, grow(model, experts=held | {"exact_start": True})) <= ROUNDING
    assert logits_change(model, grow(model, experts=held)) > 0.01


BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "weights of plain scores count twice": ("plain sigmoid", {}, {"router": {"scaling_factor": 1.0}}),
    "groups as before": ("sigmoid, bias, groups", {}, {"router": GROUPS}),
    "more groups": (
        "softmax, groups",
        {"order": "interleave"},
        {"router": {"num_groups": 8, "group_top_k": 4}},
    ),
    "as many experts chosen": ("softmax", {}, {"top_k": 2}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_experts_without_what_goes_with_them(name, source):
    router, experts, wrong = BROKEN[name]
    model = source(router_changes(router))
    assert logits_change(model, grow(model, experts=DOUBLED | experts)) <= ROUNDING
    assert logits_change(model, grow(model, experts=DOUBLED | experts, wrong=wrong)) > 0.01


def test_plain_scores_count_twice_without_half_the_scale(source):
    model = source(router_changes("plain sigmoid"))
    before = rms_of_sites(model)
    wrong = rms_of_sites(grow(model, experts=DOUBLED, wrong={"router": {"scaling_factor": 1.0}}))
    assert wrong["decoder.layers.0.mlp"] / before["decoder.layers.0.mlp"] == pytest.approx(2, rel=1e-6)


def test_the_selection_bias_is_copied(source):
    model = source(router_changes("sigmoid, bias, scaled, shared expert"))
    grown = grow(model, experts=DOUBLED)
    assert logits_change(model, grown) <= ROUNDING
    for key, bias in grown.tensors.items():
        if key.endswith("expert_bias"):
            assert torch.equal(bias, model.tensors[key].repeat(2))
            bias.zero_()
    assert logits_change(model, grown) > 0.01


def test_one_normalised_sigmoid_expert_is_another_function(source):
    """One score is used as it is, two are divided by their sum. The rules refuse it."""
    model = source({"model.router": SIGMOID, "model.top_k": 1})
    assert logits_change(model, grow(model, checked=False, experts=DOUBLED)) > 0.01
    with pytest.raises(AssertionError, match="normalised"):
        grow(model, experts=DOUBLED)


def test_load_and_auxiliary_losses(source):
    """Each twin gets its source's tokens; the balancing losses stay, and log-sum-exp grows by ln 2."""
    losses = {"aux_loss": 1e-2, "sequence_aux_loss": 1e-2, "global_aux_loss": 1e-2, "z_loss": 1e-3}
    model = source({"model.router": SOFTMAX | losses, "model.num_layers": 1})

    def read(model: Model) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
        reset_routing_stats(model.engine)
        logits: list[torch.Tensor] = []
        router = model.engine.chunks[0].decoder.layers[0].mlp.router
        handle = router.register_forward_hook(lambda module, inputs, _: logits.append(inputs[0] @ module.weight.T))
        model.backward()
        handle.remove()
        return expert_load(model.engine, model.stage.model), aux_losses(model.engine, model.stage.model), logits[0]

    load, before, logits = read(model)
    twice, after, _ = read(grow(model, experts=DOUBLED))
    held, held_losses, _ = read(grow(model, experts=DOUBLED | {"top_k": "hold"}))
    assert torch.equal(twice, load.repeat(1, 2))
    assert not torch.equal(held, load.repeat(1, 2))
    balancing = ("aux_loss", "sequence_aux_loss", "global_aux_loss")
    assert [after[name] for name in balancing] == pytest.approx([before[name] for name in balancing], rel=1e-6)
    assert held_losses["aux_loss"] != pytest.approx(before["aux_loss"], rel=1e-2)
    expected = (logits.double().logsumexp(-1) + math.log(2)).square().mean()
    assert after["z_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert before["z_loss"] != pytest.approx(float(expected), rel=1e-2)


def test_held_slots_fill_with_twins(source):
    """Without noise, two slots hold one expert twice, for every token: the layer acts as if top_k were 1."""
    model = source({"model.router": SOFTMAX})
    collisions = {}
    for noise in (0, 0.5):
        grown = grow(model, experts={"noise": noise, "top_k": "hold"})
        choices: list[torch.Tensor] = []
        router = grown.engine.chunks[0].decoder.layers[0].mlp.router
        router.register_forward_hook(lambda module, inputs, output, choices=choices: choices.append(output[1]))
        grown.logits()
        choice = choices[0].view(-1, 2, 4)
        collisions[noise] = float((choice.sum(dim=1) == 2).any(dim=1).float().mean())
    assert collisions[0] == 1.0
    assert collisions[0.5] < 0.9


COPIES = {0: [2, 0, 1, 1], 1: [0, 3, 0, 1]}


@pytest.mark.parametrize("order", ["append", "interleave"])
def test_experts_copied_by_utility(order, source):
    """Expert Upcycling's operator: rows of the router and experts stay together, and so do biases but for noise."""
    model, delta = source(), 1e-3
    experts = {"top_k": "hold", "utility": {}, "order": order, "noise": 0, "bias_noise": delta}
    grown = grow(model, copies=COPIES, experts=experts)
    for layer, copies in COPIES.items():
        expected = [expert for expert in range(4) for _ in range(copies[expert] + 1)]
        if order == "append":
            expected = [*range(4), *(expert for expert in range(4) for _ in range(copies[expert]))]
        for name in ("experts.linear_fc1.weight", "experts.linear_fc2.weight", "router.weight"):
            key = f"decoder.layers.{layer}.mlp.{name}"
            assert torch.equal(grown.tensors[key], model.tensors[key][expected])
        key = f"decoder.layers.{layer}.mlp.router.expert_bias"
        noise = grown.tensors[key] - model.tensors[key][expected]
        is_new = torch.tensor([expert in expected[:i] for i, expert in enumerate(expected)])
        assert not noise[~is_new].any()
        assert noise[is_new].all()
        assert noise.abs().max() <= delta
    alike, key = grow(model, experts=experts), "decoder.layers.0.mlp.router.weight"
    assert not torch.equal(grown.tensors[key], alike.tensors[key])


def test_utility_is_the_squared_gradient_norm(source):
    model = source(SHARED)
    scores, expected = no_scores([0, 1], 4), torch.zeros(2, 4, dtype=torch.float64)
    for step in range(2):
        model.backward(step)
        add_scores(scores, model.engine.shards, 4)
        for layer in range(2):
            for name in ("fc1", "fc2"):
                gradient = model.gradients[f"decoder.layers.{layer}.mlp.experts.linear_{name}.weight"]
                expected[layer] += gradient.double().square().flatten(1).sum(dim=1)
    found = torch.tensor([scores["0"], scores["1"]])
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
    # A step that the optimizer skips does not count.
    model.engine.shards[-1].tensor.main_grad.fill_(math.nan)
    fc1 = next(shard for shard in model.engine.shards if shard.logical.is_expert)
    fc1.tensor.main_grad[0].fill_(math.inf)
    add_scores(scores, model.engine.shards, 4)
    assert torch.equal(torch.tensor([scores["0"], scores["1"]]), found)


def test_utility_is_measured_right_before_the_growth():
    config = with_growth(make_config(TINY), {"experts": {"top_k": "hold", "utility": {"steps": 3}}})
    assert [step for step in range(1, 14) if utility_due(config, 0, step)] == [8, 9, 10]  # grows after step 10
    assert not any(utility_due(config, 1, step) for step in range(14))
    other = with_growth(make_config(TINY), {"experts": {}})
    assert not any(utility_due(other, 0, step) for step in range(14))


# The algebra in fp64, on one layer of experts written out here, with the weights that the maps make.


def combine_weights(logits: torch.Tensor, router: RouterConfig, top_k: int, bias: torch.Tensor) -> torch.Tensor:
    """logits [T, E] -> weight of each expert, 0 where it is not chosen."""
    score = logits.softmax(1) if router.score_function == "softmax" else logits.sigmoid()
    rank = score + bias if router.bias_update_rate else score
    if router.num_groups:
        grouped = rank.unflatten(1, (router.num_groups, -1))
        worth = grouped.topk(top_k // router.group_top_k, dim=2).values.sum(2)
        best = torch.zeros_like(worth).scatter(1, worth.topk(router.group_top_k).indices, 1.0).bool()
        rank = grouped.masked_fill(~best.unsqueeze(2), -math.inf).flatten(1)
    chosen = torch.zeros_like(rank).scatter(1, rank.topk(top_k).indices, 1.0)
    weight = score * chosen
    if router.normalize_top_k and (router.score_function == "softmax" or top_k > 1):
        weight = weight / weight.sum(1, keepdim=True)
    return weight * router.scaling_factor


def swiglu(x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    """x [T, D], fc1 [2, F, D], fc2 [D, F]."""
    gate, up = torch.einsum("td,gfd->gtf", x, fc1)
    return (torch.nn.functional.silu(gate) * up) @ fc2.T


def experts_layer(model, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Layer 0's experts on x [T, D]."""
    of = {key.removeprefix("decoder.layers.0.mlp.").removesuffix(".weight"): w for key, w in weights.items()}
    bias = of.get("router.expert_bias", torch.zeros(()))
    combine = combine_weights(x @ of["router"].T, model.router, model.top_k, bias)
    pairs = zip(of["experts.linear_fc1"], of["experts.linear_fc2"], strict=True)
    out = sum(combine[:, e : e + 1] * swiglu(x, fc1, fc2) for e, (fc1, fc2) in enumerate(pairs))
    if "shared_experts.linear_fc1" in of:
        out = out + swiglu(x, of["shared_experts.linear_fc1"], of["shared_experts.linear_fc2"])
    return out


def in_fp64(point: GrowthPoint) -> float:
    """Relative change of layer 0's output."""

    def is_part(tensor: LogicalTensor) -> bool:
        return tensor.layer == 0 and ".mlp." in tensor.key

    def random_values(tensor: LogicalTensor) -> torch.Tensor:
        values = draw_normal(3, tensor.key, tensor.shape, (0,) * len(tensor.shape), tensor.shape).double()
        return values * (0.05 if tensor.kind == "router_bias" else 0.3)

    old = {t.key: random_values(t) for t in logical_tensors(point.before) if is_part(t)}
    new = {t.key: torch.zeros(t.shape, dtype=torch.float64) for t in logical_tensors(point.after) if is_part(t)}
    for tensor in filter(is_part, logical_tensors(point.after)):
        origin = (0,) * len(tensor.shape)
        point.tensor_map(tensor).place(new[tensor.key], origin, old[tensor.key], origin)
    x = draw_normal(4, "x", (64, 32), (0, 0), (64, 32)).double()
    copies = point.after.hidden_size // 32
    expected = experts_layer(point.before, old, x).repeat(1, copies)
    return change(expected, experts_layer(point.after, new, x.repeat(1, copies)))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_algebra_in_double_precision(name):
    start = make_config(TINY, router_changes(name))
    for factor in (2, 3):
        for order in ("append", "interleave"):
            keys = {"experts": {"factor": factor, "order": order}}
            assert in_fp64(point_of(with_growth(start, keys))) <= 1e-14
    joint = {"experts": {}, "hidden": {}, "expert_ffn": {"factor": 4}}
    assert in_fp64(point_of(with_growth(start, joint))) <= 1e-14
    assert in_fp64(point_of(with_growth(start, {"expert_ffn": {"factor": 1.5}}))) > 1e-3
    if name != "plain sigmoid, one":  # either twin will do there
        assert in_fp64(point_of(with_growth(start, {"experts": {"top_k": "hold"}}))) > 1e-3


# Depth.

DEPTHS = {
    "interposed": ({}, {}),
    "stacked": ({}, {"method": "stack"}),
    "shared expert, three times": (SHARED, {"factor": 3}),
    "dense layer first, once": (DENSE_FIRST, {"keep_first": 1}),
    "dense layer first, repeated": (DENSE_FIRST, {}),
    "dense layer first, stacked": (DENSE_FIRST, {"method": "stack", "keep_last": 1}),
    "dense": (None, {}),
    "dense, stacked": (None, {"method": "stack", "factor": 3}),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_that_start_as_the_identity(name, source, monkeypatch):
    changes, depth = DEPTHS[name]
    model = source(changes) if changes is not None else source({}, TINY_DENSE)
    grown = grow(model, depth=depth | {"identity": True})
    assert torch.equal(grown.logits(), model.logits())
    assert logits_change(model, grow(model, depth=depth)) > 0.05
    # Were the experts' projection, or attention's, forgotten, it would show.
    key = {"dense": "mlp.linear_fc2", "interposed": "experts.linear_fc2"}.get(name, "linear_proj")
    is_one = LogicalTensor.writes_stream.fget
    monkeypatch.setattr(LogicalTensor, "writes_stream", property(lambda t: is_one(t) and key not in t.key))
    assert logits_change(model, grow(model, depth=depth | {"identity": True})) > 0.01


@pytest.mark.parametrize("depth", [{}, {"method": "stack"}, {"keep_first": 1, "factor": 3}], ids=str)
def test_copied_layers_are_copies(depth, source):
    """Every tensor of layer j is, bit for bit, that of its source, in memory of its own; the rest stays."""
    model = source(DENSE_FIRST | SHARED)
    grown = grow(model, depth=depth)
    sources = grown.points[-1].layers.source.tolist()
    assert len(sources) == grown.stage.model.num_layers > 3
    tensors = grown.tensors
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            continue
        layer = key.split(".")[2] if ".layers." in key else None
        origin = key if layer is None else key.replace(f".{layer}.", f".{sources[int(layer)]}.", 1)
        assert torch.equal(value, model.tensors[origin]), key
    assert len({value.data_ptr() for value in tensors.values()}) == len(tensors)
    same = [f"decoder.layers.{j}.self_attention.linear_proj.weight" for j, layer in enumerate(sources) if layer == 1]
    tensors[same[0]].zero_()
    assert len(same) > 1
    assert all(tensors[key].any() for key in same[1:])


def test_norms_over_depth(source):
    """Interposed layers keep a profile of norms that rises; stacked ones fall at the seam."""
    model = source({"model.num_layers": 4})
    profile = [1.0, 1.1, 1.2, 1.3]
    key = "decoder.layers.{}.mlp.experts.linear_fc1.weight"
    saved = {key.format(j): model.tensors[key.format(j)].clone() for j in range(4)}
    for j, norm in enumerate(profile):
        tensor = model.tensors[key.format(j)]
        tensor.mul_(norm / tensor.norm())
    norms = {
        method: [float(grow(model, depth={"method": method}).tensors[key.format(j)].norm()) for j in range(8)]
        for method in ("interpose", "stack")
    }
    for name, value in saved.items():
        model.tensors[name].copy_(value)
    assert norms["interpose"] == pytest.approx([norm for norm in profile for _ in range(2)], rel=1e-6)
    assert norms["stack"] == pytest.approx(profile * 2, rel=1e-6)
    steps = {method: max(abs(b - a) for a, b in itertools.pairwise(found)) for method, found in norms.items()}
    assert steps == pytest.approx({"interpose": 0.1, "stack": 0.3}, rel=1e-5)


# Together.

EVERYTHING = {
    "depth": {"identity": True},
    "experts": DOUBLED,
    **JOINT,
    "shared_expert_ffn": {},
}


@pytest.mark.parametrize("router", ["softmax", "plain sigmoid, bias, groups, scaled", "sigmoid, bias, groups"])
def test_everything_at_one_point_and_then_again(router, source):
    model = source(router_changes(router) | SHARED | TIED)
    once = grow(model, **EVERYTHING)
    assert logits_change(model, once) <= ROUNDING
    twice = grow(once, **EVERYTHING | {"experts": DOUBLED | {"order": "interleave"}})
    assert logits_change(model, twice) <= 2 * ROUNDING
    assert twice.stage.model.num_layers == 4 * model.stage.model.num_layers
    assert twice.stage.model.hidden_size == 4 * model.stage.model.hidden_size
    once.tensors["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"].add_(0.1)  # of a new layer
    assert logits_change(model, once) > 0.01


@pytest.mark.parametrize("state", ["asymmetric", "copy", "reset"])
def test_depth_and_width_commute(state, source):
    """In either order, and at one point: the same bits of weights, biases and states, without noise."""
    model, policy = source(SHARED), {"optimizer_state": state}
    depth, width = {"depth": {}}, {"experts": DOUBLED, "hidden": {}, "expert_ffn": {}}
    ends = [
        grow(grow(model, **depth, **policy), **width, **policy).tensors,
        grow(grow(model, **width, **policy), **depth, **policy).tensors,
        grow(model, **depth, **width, **policy).tensors,
    ]
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        assert all(torch.equal(other[key], ends[0][key]) for key in other)
    # With noise they differ: it is copied with the layers, or drawn for each.
    noisy = {"experts": {"noise": 0.01}}
    first = grow(grow(model, **noisy, **policy), **depth, **policy).tensors
    second = grow(grow(model, **depth, **policy), **noisy, **policy).tensors
    key = "decoder.layers.{}.mlp.router.weight"
    assert torch.equal(first[key.format(0)], first[key.format(1)])
    assert not torch.equal(second[key.format(0)], second[key.format(1)])


def test_bf16(source):
    """Loss within 1e-3, and weights the rounded masters. Noise is on the masters: rounding loses some of it."""
    model = source({"run.precision": "bf16"})
    for keys in (EVERYTHING, {"hidden": {}}, {"experts": DOUBLED}):
        used = {key: value for key, value in keys.items() if key != "shared_expert_ffn"}
        grown = grow(model, **used)
        assert grown.backward() == pytest.approx(model.backward(), abs=1e-3)
    noisy = grow(model, experts={"noise": 0.01})
    for shard in noisy.engine.shards:
        if shard.logical.trainable:
            assert shard.tensor.dtype == torch.bfloat16
            assert torch.equal(shard.view().float(), noisy.tensors[shard.key].bfloat16().float())
    fc1 = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    old, new = noisy.tensors[fc1].chunk(2)
    assert (old != new).float().mean() > 0.999
    lost = (old.bfloat16() == new.bfloat16()).float().mean()
    assert 0.1 < lost < 0.25
