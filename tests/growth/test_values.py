"""Values of new entries that are no plain copies: measures of the old ones, noise, fresh weights, zeros, biases."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from pretrain.growth import maps, values
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.values import Figures, Part, apply_fills, measure
from pretrain.model.initialise import draw_normal
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.routing_stats import expert_load, reset_routing_stats
from tests.helpers.configs import make_config
from tests.helpers.growth import TINY, Model, gathered, grow, mask_of, mesh_of_one, new_model, point_of, with_growth


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_of_one() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def model(mesh) -> Model:
    return new_model(mesh, TINY)


# Tensors without a model.

# Large enough for figures to settle within 1%: no tensor but biases and norms has fewer than 2**14 entries.
LARGE = {
    "model.vocab_size": 64,
    "model.hidden_size": 512,
    "model.num_layers": 1,
    "model.num_experts": 32,
    "model.expert_ffn_size": 16,
    "model.shared_expert_ffn_size": 32,
}


def large_point(changes=None, **keys) -> GrowthPoint:
    return point_of(with_growth(make_config(TINY, LARGE | (changes or {})), keys))


def tensors_of(point: GrowthPoint) -> dict[str, LogicalTensor]:
    """Name without the leading parts -> tensor of the grown model, of layer 0 only."""
    first = [tensor for tensor in logical_tensors(point.after) if not tensor.layer]
    return {tensor.key.removeprefix("decoder.layers.0.").removesuffix(".weight"): tensor for tensor in first}


def old_values(tensor: LogicalTensor) -> torch.Tensor:
    """Random values of a tensor of the old model, each expert's with a standard deviation and mean of its own."""
    found = draw_normal(0, tensor.key, tensor.shape, (0,) * len(tensor.shape), tensor.shape)
    if tensor.is_expert:
        sizes = torch.linspace(0.5, 2.0, len(found)).view(-1, *[1] * (found.dim() - 1))
        return (found + 0.3) * sizes
    return found


def filled(point: GrowthPoint, tensor: LogicalTensor, source=None, *, seed=0, box=None) -> torch.Tensor:
    """A box (default: all) of a grown tensor."""
    tensor_map = point.tensor_map(tensor)
    source = old_values(tensor_map.source) if source is None else source
    origin = (0,) * source.dim()
    offset, shape = box or (origin, tensor.shape)
    out = torch.zeros(shape)
    tensor_map.place(out, offset, source, origin)
    figures = measure([tensor_map.source], lambda: [Part(tensor_map.source, origin, source)])
    apply_fills(point, tensor_map, out, offset, figures=figures, seed=seed)
    return out


# Measures.


def rows_of(tensor: LogicalTensor, entries: torch.Tensor) -> torch.Tensor:
    """What is measured apart as a row each: experts, or all."""
    return entries.double().flatten(1) if tensor.is_expert else entries.double().reshape(1, -1)


def test_figures_are_those_of_torch():
    for name, tensor in tensors_of(large_point(experts={})).items():
        source = tensor if "expert" not in tensor.axes else dataclasses.replace(tensor, shape=(32, *tensor.shape[1:]))
        old = old_values(source)
        figures = measure([source], lambda old=old, source=source: [Part(source, (0,) * old.dim(), old)])[tensor.key]
        rows = rows_of(tensor, old)
        # Values are measured in steps of 2**-16 of the largest.
        torch.testing.assert_close(figures.std, rows.std(dim=1, correction=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(figures.spread, rows.amax(dim=1) - rows.amin(dim=1), rtol=1e-6, atol=0)
        assert len(figures.std) == (32 if name.startswith("mlp.experts") else 1)


def test_figures_do_not_depend_on_the_parts(monkeypatch):
    tensor = next(
        t for t in logical_tensors(make_config(TINY).model) if t.key.endswith(".mlp.experts.linear_fc1.weight")
    )
    old = old_values(tensor)
    whole = measure([tensor], lambda: [Part(tensor, (0, 0, 0, 0), old)])[tensor.key]
    monkeypatch.setattr(values, "MEASURED_CHUNK", 100)
    pieces = [(slice(a, b), slice(c, d)) for a, b in ((0, 1), (1, 4)) for c, d in ((0, 10), (10, 16))]
    parts = [Part(tensor, (e.start, 0, f.start, 0), old[e, :, f]) for e, f in reversed(pieces)]
    for order in (parts, parts[::-1]):
        found = measure([tensor], lambda order=order: order)[tensor.key]
        assert torch.equal(found.std, whole.std)
        assert torch.equal(found.spread, whole.spread)
    missing = measure([tensor], lambda: parts[1:])[tensor.key]
    assert not torch.equal(missing.std, whole.std)


# Noise.

NOISY = {"experts": {"noise": 0.01}, "hidden": {"noise": 0.02}, "query_groups": {"noise": 0.05}}


@pytest.mark.parametrize("operator", NOISY)
def test_noise_is_a_share_of_the_standard_deviation_on_copies_only(operator):
    (amount,), touched = NOISY[operator].values(), set()
    noisy, plain = large_point(**{operator: NOISY[operator]}), large_point(**{operator: {"noise": 0}})
    for name, tensor in tensors_of(noisy).items():
        tensor_map = noisy.tensor_map(tensor)
        new, copied = mask_of(tensor_map), filled(plain, tensor)
        noise = filled(noisy, tensor) - copied
        assert not noise[~new].any(), name
        if not noise.any():
            continue
        touched.add(name)
        # Of the tensor as it is after the growth: what reads a wider axis is halved.
        halves = 0.5 if any(factors is not None for factors in tensor_map.factors) else 1.0
        std = halves * rows_of(tensor, old_values(tensor_map.source)).std(dim=1, correction=0)
        if tensor.is_expert:
            std = std[tensor_map.axes[0].source]
        relative = (rows_of(tensor, noise) / (amount * std).unsqueeze(1))[rows_of(tensor, new).bool()]
        assert relative.numel() >= 1 << 13, name
        assert 0.98 < relative.std() < 1.02, name
        assert relative.mean().abs() < 3 / math.sqrt(relative.numel()), name
        if tensor.is_expert and operator == "experts":
            each = rows_of(tensor, noise)[32:]
            assert torch.corrcoef(each).fill_diagonal_(0).abs().max() < 5 / math.sqrt(each.shape[1]), name
    experts = {"mlp.experts.linear_fc1", "mlp.experts.linear_fc2", "mlp.router"}
    attention = {"self_attention.linear_qkv", "self_attention.linear_proj"}
    shared = {"mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"}
    everything = experts | attention | shared | {"embedding.word_embeddings", "output_layer"}
    assert touched == {"experts": experts, "hidden": everything, "query_groups": attention}[operator]


def test_layers_get_noise_of_their_own():
    point = point_of(with_growth(make_config(TINY, LARGE | {"model.num_layers": 2}), NOISY))
    fc1 = [t for t in logical_tensors(point.after) if t.key.endswith(".mlp.experts.linear_fc1.weight")]
    source = old_values(point.tensor_map(fc1[0]).source)
    first, second = (filled(point, tensor, source) for tensor in fc1)
    plain = filled(large_point(**{key: {"noise": 0} for key in NOISY}), fc1[0], source)
    noise = torch.stack([(first - plain).flatten(), (second - plain).flatten()])
    # Nearly all: some of it is lost in rounding.
    assert (noise.count_nonzero(dim=1) / mask_of(point.tensor_map(fc1[0])).sum()).min() > 0.999
    assert torch.corrcoef(noise)[0, 1].abs() < 5 / math.sqrt(noise.shape[1])
    # As of one layer twice, it would be seen.
    assert torch.equal(filled(point, fc1[0], source), first)


@pytest.mark.parametrize("keys", [NOISY, {"experts": {"order": "interleave"}, "expert_ffn": {"init": "random"}}])
def test_a_box_is_a_part_of_the_whole(keys, monkeypatch):
    """Whatever the layout, an entry gets the same bits; also in small chunks."""
    point, rng = point_of(with_growth(make_config(TINY), keys)), random.Random(0)
    for name, tensor in tensors_of(point).items():
        whole = filled(point, tensor)
        for chunk in (1 << 24, 200):
            monkeypatch.setattr(values, "CHUNK", chunk)
            offset = tuple(rng.randrange(size) for size in tensor.shape)
            shape = tuple(rng.randint(1, size - start) for size, start in zip(tensor.shape, offset, strict=True))
            place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            assert torch.equal(filled(point, tensor, box=(offset, shape)), whole[place]), name


def test_bytes_depend_on_the_seed_and_on_the_growth():
    point = large_point(**NOISY)
    tensor = tensors_of(point)["mlp.experts.linear_fc1"]
    found = filled(point, tensor)
    assert torch.equal(filled(point, tensor), found)
    for other in (filled(point, tensor, seed=1), filled(dataclasses.replace(point, number=2), tensor)):
        new = mask_of(point.tensor_map(tensor))
        assert torch.equal(other[~new], found[~new])
        assert (other[new] != found[new]).float().mean() > 0.99


def test_a_tensor_without_spread_gets_no_noise():
    noisy, plain = large_point(**NOISY), large_point(**{key: {"noise": 0} for key in NOISY})
    for tensor in tensors_of(noisy).values():
        for value in (0.0, 0.75):
            source = torch.full(noisy.tensor_map(tensor).source.shape, value)
            assert torch.equal(filled(noisy, tensor, source), filled(plain, tensor, source))
    assert not torch.equal(filled(noisy, tensor), filled(plain, tensor))


def test_noise_on_selection_biases_is_uniform():
    keys = {"top_k": "hold", "bias_noise": 1e-3}
    point = large_point({"model.num_experts": 4096}, experts=keys)
    tensor = tensors_of(point)["mlp.router.expert_bias"]
    tensor_map = point.tensor_map(tensor)
    new, found = mask_of(tensor_map), filled(point, tensor)
    noise = (found - gathered(tensor_map, old_values(tensor_map.source))).double()
    assert not noise[~new].any()
    # Rounding of biases of up to 4 adds 2e-7.
    assert 0.99e-3 < noise[new].abs().max() <= 1e-3 + 3e-7
    quartiles = torch.quantile(noise[new], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, torch.tensor([-5e-4, 0, 5e-4], dtype=torch.float64), rtol=0, atol=5e-5)
    doubled = filled(large_point({"model.num_experts": 4096}, experts={}), tensor)
    assert torch.equal(doubled, gathered(tensor_map, old_values(tensor_map.source)))


# Kinds of new rows and columns.

# Axis -> tensors whose rows write it, tensors whose columns read it.
ROLES = {
    "hidden": (
        {
            "embedding.word_embeddings",
            "self_attention.linear_proj",
            "mlp.experts.linear_fc2",
            "mlp.shared_experts.linear_fc2",
        },
        {
            "self_attention.linear_qkv",
            "mlp.router",
            "mlp.experts.linear_fc1",
            "mlp.shared_experts.linear_fc1",
            "output_layer",
        },
    ),
    "expert_ffn": ({"mlp.experts.linear_fc1"}, {"mlp.experts.linear_fc2"}),
    "shared_expert_ffn": ({"mlp.shared_experts.linear_fc1"}, {"mlp.shared_experts.linear_fc2"}),
    "query_groups": ({"self_attention.linear_qkv"}, {"self_attention.linear_proj"}),
}
INITS = {
    "copy": ("copy", "copy"),
    "zero-copy": ("zero", "copy"),
    "copy-zero": ("copy", "zero"),
    "random": ("random", "random"),
    "random-copy": ("random", "copy"),
    "copy-random": ("copy", "random"),
    "random-zero": ("random", "zero"),
}


@pytest.mark.parametrize("axis", ROLES)
@pytest.mark.parametrize("init", INITS)
def test_new_rows_and_columns(axis, init):
    point = large_point(**{axis: {"init": init}})
    writers, readers = ROLES[axis]
    for name, tensor in tensors_of(point).items():
        tensor_map = point.tensor_map(tensor)
        source, found, new = old_values(tensor_map.source), filled(point, tensor), mask_of(tensor_map)
        copied = gathered(tensor_map, source)
        if name not in writers | readers:
            assert torch.equal(found, copied), name  # norm gains among them
            continue
        scale = 1.0
        if name in readers:
            scale = 0.5 if init == "copy" else 1 / math.sqrt(2)
            copied *= torch.tensor(scale)
        kind = INITS[init][name in readers]
        assert torch.equal(found[~new], copied[~new]), name
        if kind == "zero" and name in writers:
            # The gate (of gate and up), queries and keys stay copies.
            for fused in {"gate_up", "qkv_slot"} & set(tensor.axes):
                last = [slice(None)] * found.dim()
                last[tensor.axes.index(fused)] = slice(-1)
                assert torch.equal(found[tuple(last)], copied[tuple(last)]), name
                new[tuple(last)] = False
        match kind:
            case "copy":
                assert torch.equal(found[new], copied[new]), name
            case "zero":
                assert not found[new].any(), name
            case "random":
                expected = scale * rows_of(tensor, source).std(dim=1, correction=0)
                fresh = found[new].double().view(len(expected), -1)
                assert (fresh.std(dim=1) / expected - 1).abs().max() < 0.05, name
                assert (fresh.mean(dim=1) / expected).abs().max() < 0.15, name  # the old experts' mean is 0.3
                assert (found[new] == copied[new]).float().mean() < 1e-3, name


def test_zero_wins_over_random_and_both_over_noise(monkeypatch):
    """Operators that meet in one tensor: what starts at zero has no noise on it, and fresh weights none either."""
    keys = {"experts": {"noise": 0.5}, "hidden": {"noise": 0.5}, "expert_ffn": {"init": "zero-copy"}}
    fc1 = tensors_of(large_point(**keys))["mlp.experts.linear_fc1"]
    found = filled(large_point(**keys), fc1)
    assert not found[:, 1, 16:].any()
    assert found[:, 0, 16:].all()
    with monkeypatch.context() as patch:
        patch.setattr(maps, "FILL_ORDER", maps.FILL_ORDER[::-1])
        assert filled(large_point(**keys), fc1)[:, 1, 16:].any()
    keys = {"hidden": {"init": "zero-copy"}, "expert_ffn": {"init": "random"}}
    fc2 = tensors_of(large_point(**keys))["mlp.experts.linear_fc2"]
    assert not filled(large_point(**keys), fc2)[:, 512:].any()
    keys = {"experts": {"noise": 0.5}, "expert_ffn": {"init": "random"}}
    found = filled(large_point(**keys), fc1 := tensors_of(large_point(**keys))["mlp.experts.linear_fc1"])
    alone = filled(large_point(experts={"noise": 0}, expert_ffn={"init": "random"}), fc1)
    assert torch.equal(found[:, :, 16:], alone[:, :, 16:])
    assert not torch.equal(found[32:, :, :16], alone[32:, :, :16])
    depth = large_point(**keys, depth={"identity": True})
    zeroed = [t for t in logical_tensors(depth.after) if not filled(depth, t).any()]
    assert [t.key.rpartition("layers.")[2] for t in zeroed] == [
        "1.self_attention.linear_proj.weight",
        "1.mlp.experts.linear_fc2.weight",
        "1.mlp.shared_experts.linear_fc2.weight",
    ]


def test_zeros_learn_because_the_gate_is_a_copy(model, monkeypatch):
    """With up zero and the gate a copy, up gets a gradient; were both zero, none of the new channels ever would."""
    fc1, fc2 = (f"decoder.layers.0.mlp.experts.linear_{name}.weight" for name in ("fc1", "fc2"))

    def new_gradients() -> list[float]:
        grown = grow(model, expert_ffn={"init": "zero-copy"})
        grown.backward()
        gate, up = grown.gradients[fc1][:, :, 16:].square().sum(dim=(0, 2, 3))
        return [float(gate), float(up), float(grown.gradients[fc2][:, :, 16:].norm())]

    gate, up, down = new_gradients()
    assert up > 1e-3
    assert gate == down == 0.0  # at first: they wait for up
    monkeypatch.setattr(maps, "_last_slot_only", lambda target: {})
    assert new_gradients() == [0.0, 0.0, 0.0]


# In a model.


def test_growth_of_a_model_puts_the_same_values(model):
    """What a model gets are the values above, by the run's seed; its old entries do not move."""
    keys = {"experts": {"noise": 0.1}, "expert_ffn": {"init": "random"}, "depth": {"keep_first": 1}}
    grown, again = grow(model, **keys), grow(model, **keys)
    config = model.config.model_copy(update={"run": model.config.run.model_copy(update={"seed": 5})})
    other = grow(dataclasses.replace(model, config=config), **keys)
    differing = set()
    for tensor in logical_tensors(grown.stage.model):
        key, tensor_map = tensor.key, grown.points[-1].tensor_map(tensor)
        expected = filled(grown.points[-1], tensor, model.tensors[tensor_map.source.key], seed=model.config.run.seed)
        assert torch.equal(grown.tensors[key], expected), key
        assert torch.equal(grown.tensors[key], again.tensors[key]), key
        if not torch.equal(grown.tensors[key], other.tensors[key]):
            differing.add(key.rpartition("layers.")[2])
            old = ~mask_of(tensor_map)
            assert torch.equal(grown.tensors[key][old], other.tensors[key][old])
    parts = ("experts.linear_fc1", "experts.linear_fc2", "router")
    assert differing == {f"{layer}.mlp.{part}.weight" for layer in (0, 1, 2) for part in parts}


def loads_of(grown: Model) -> torch.Tensor:
    """Tokens of each layer's experts over four batches that train."""
    reset_routing_stats(grown.engine)
    for step in range(4):
        grown.backward(step)
    return expert_load(grown.engine, grown.stage.model)


@pytest.mark.parametrize("keys", [{}, {"order": "interleave"}, {"factor": 3}], ids=str)
def test_an_exact_start_chooses_no_copy(model, keys, monkeypatch):
    keys = {"top_k": "hold", "exact_start": True, **keys}
    grown = grow(model, experts=keys)
    copies = maps.expert_map(4, grown.points[-1].config.experts).is_new
    loads = loads_of(grown)
    assert not loads[:, copies].any()
    assert loads[:, ~copies].sum() == 4 * 128 * 2 * 2
    # Balancing raises those that nobody chooses.
    before = grown.tensors["decoder.layers.0.mlp.router.expert_bias"].clone()
    grown.backward(5)
    assert ((grown.tensors["decoder.layers.0.mlp.router.expert_bias"] > before)[copies]).all()
    # Lowered by less, some are.
    nearer = partial(dataclasses.replace, spread=torch.tensor([-0.5]))
    figures = measure

    def closer(*args, **kwargs) -> dict[str, Figures]:
        return {key: nearer(found) for key, found in figures(*args, **kwargs).items()}

    monkeypatch.setattr("pretrain.growth.transplant.measure", closer)
    assert loads_of(grow(model, experts=keys))[:, copies].any()
