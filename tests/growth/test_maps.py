"""Axis maps against plain indexing of whole tensors: what comes from where, what is new, and since when."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from pretrain.config.growth import ExpertGrowth, WidthGrowth
from pretrain.growth import maps
from pretrain.growth.maps import AxisMap, TensorMap, ages, expert_map, share_copies, width_map
from pretrain.model.counts import count_parameters
from pretrain.model.logical import LogicalTensor, logical_tensors
from tests.helpers.configs import make_config
from tests.helpers.growth import TINY, gathered, mask_of, point_of, with_growth

# Orders and counts.


@pytest.mark.parametrize(
    ("keys", "copies", "source"),
    [
        ({}, None, [0, 1, 2, 0, 1, 2]),
        ({"factor": 3}, None, [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        ({"order": "interleave"}, None, [0, 0, 1, 1, 2, 2]),
        ({"order": "interleave", "factor": 3}, None, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ({}, [0, 2, 1], [0, 1, 2, 1, 1, 2]),
        ({"order": "interleave"}, [0, 2, 1], [0, 1, 1, 1, 2, 2]),
    ],
)
def test_order_of_experts(keys, copies, source):
    found = expert_map(3, ExpertGrowth.model_validate(keys), copies)
    assert found.source.tolist() == source
    # The first of each source is the old one.
    assert [source.index(expert) == i for i, expert in enumerate(source)] == (~found.is_new).tolist()


def test_copies_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="add up"):
        expert_map(3, ExpertGrowth(), [1, 1, 0])


@pytest.mark.parametrize(
    ("size", "factor", "source"),
    [
        (3, 2, [0, 1, 2, 0, 1, 2]),
        (4, 1.5, [0, 1, 2, 3, 0, 1]),
        (4, 2.25, [0, 1, 2, 3, 0, 1, 2, 3, 0]),
        (2, 4, [0, 1] * 4),
    ],
)
def test_order_of_channels(size, factor, source):
    found = width_map(size, WidthGrowth(factor=factor))
    assert found.source.tolist() == source
    assert found.is_new.tolist() == [False] * size + [True] * (len(source) - size)


def test_copies_by_utility_are_the_papers():
    """arXiv 2604.19835: 32 experts, at most 3 copies each: the best ten get 3, the eleventh 2, the others none."""
    scores = [math.sin(expert) for expert in range(32)]
    copies = share_copies(scores, 2, 3)
    best_first = sorted(range(32), key=lambda expert: -scores[expert])
    assert [copies[expert] for expert in best_first] == [3] * 10 + [2] + [0] * 21
    assert share_copies([-score for score in scores], 2, 3) != copies


@pytest.mark.parametrize(
    ("scores", "factor", "max_copies", "copies"),
    [
        ([1, 4, 2, 3], 2, 1, [1, 1, 1, 1]),
        ([1, 4, 2, 3], 2, 4, [0, 4, 0, 0]),
        ([1, 4, 2, 3], 3, 3, [0, 3, 2, 3]),
        ([0, 0, 0, 0], 2, 3, [3, 1, 0, 0]),  # equal scores go by number
    ],
)
def test_copies_by_utility(scores, factor, max_copies, copies):
    assert share_copies(scores, factor, max_copies) == copies
    assert sum(copies) == (factor - 1) * len(scores)


def test_too_few_copies_are_refused():
    with pytest.raises(AssertionError, match="max_copies"):
        share_copies([1, 2, 3], 3, 1)


# Boxes and pieces.


def random_axis(rng: random.Random) -> AxisMap:
    """Any map: in any order, with any number of copies."""
    size = rng.randint(1, 5)
    source = [*range(size), *(rng.randrange(size) for _ in range(rng.randint(0, 5)))]
    rng.shuffle(source)
    return AxisMap.of(source)


def random_map(rng: random.Random) -> tuple[TensorMap, torch.Tensor]:
    """A map of a tensor with one to four axes, and the whole source: fp32, no two entries alike."""
    axes = tuple(random_axis(rng) for _ in range(rng.randint(1, 4)))
    names = tuple(f"axis{i}" for i in range(len(axes)))
    old_shape = tuple(int(axis.source.max()) + 1 for axis in axes)
    new_shape = tuple(len(axis.source) for axis in axes)
    # Powers of two, so that the order in which axes are applied cannot show.
    factors = tuple(
        np.array([2.0 ** rng.randint(-3, 3) for _ in axis.source], dtype=np.float32) if rng.random() < 0.5 else None
        for axis in axes
    )
    source, target = (LogicalTensor("w", names, shape, "matrix", {}) for shape in (old_shape, new_shape))
    values = torch.arange(1.0, math.prod(old_shape) + 1).reshape(old_shape)
    return TensorMap(target, source, False, axes, factors, ()), values


def random_box(rng: random.Random, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offset = tuple(rng.randrange(size) for size in shape)
    return offset, tuple(rng.randint(1, size - start) for size, start in zip(shape, offset, strict=True))


def random_tiles(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of a grid that covers a tensor."""
    cuts = [sorted({0, size, *(rng.randrange(size + 1) for _ in range(2))}) for size in shape]
    grid = itertools.product(*(itertools.pairwise(cut) for cut in cuts))
    return [(tuple(a for a, _ in tile), tuple(b - a for a, b in tile)) for tile in grid]


def part(tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def placed(tensor_map: TensorMap, source, box, tiles, **options) -> torch.Tensor:
    """A box of the target, filled with pieces of the source; NaN where nothing was put."""
    offset, shape = box
    target = torch.full(shape, math.nan)
    for at, extent in tiles:
        tensor_map.place(target, offset, part(source, at, extent), at, **options)
    return target


SEEDS = range(200)


@pytest.mark.parametrize(
    "options", [{}, {"old_only": True}, {"factor": 0.5}, {"old_only": True, "factor": 1.0}], ids=str
)
def test_placing_pieces_is_indexing(options):
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor_map, source = random_map(rng)
        box, tiles = random_box(rng, tensor_map.target.shape), random_tiles(rng, tensor_map.source.shape)
        expected = gathered(tensor_map, source)
        if "factor" in options:
            expected *= options["factor"]
        else:
            for dim, factors in enumerate(tensor_map.factors):
                if factors is not None:
                    expected *= torch.from_numpy(factors).view([-1 if d == dim else 1 for d in range(source.dim())])
        if options.get("old_only"):
            expected[mask_of(tensor_map)] = math.nan
        rng.shuffle(tiles)
        found = placed(tensor_map, source, box, tiles, **options)
        torch.testing.assert_close(found, part(expected, *box), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("old_only", [False, True])
def test_what_is_wanted_is_what_is_needed(old_only):
    """The wanted boxes cover the sources of a box once each, and nothing else; from them alone it can be filled."""
    for seed in SEEDS:
        rng = random.Random(seed)
        tensor_map, source = random_map(rng)
        box = random_box(rng, tensor_map.target.shape)
        count = torch.zeros(source.shape)
        wanted = tensor_map.wanted(*box, old_only=old_only)
        for offset, shape in wanted:
            part(count, offset, shape).add_(1)
        needed = gathered(tensor_map, torch.arange(source.numel()).reshape(source.shape))
        inside = part(needed, *box)
        if old_only:
            inside = inside[~part(mask_of(tensor_map), *box)]
        expected = torch.zeros(source.numel())
        expected[inside.flatten()] = 1
        assert torch.equal(count.flatten(), expected)
        found = placed(tensor_map, source, box, wanted, old_only=old_only)
        whole = placed(tensor_map, source, box, [((0,) * source.dim(), source.shape)], old_only=old_only)
        assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))
        if wanted:
            less = placed(tensor_map, source, box, wanted[:-1], old_only=old_only)
            assert not torch.equal(less.nan_to_num(-1), whole.nan_to_num(-1))


def test_nothing_of_a_new_layer_is_old():
    tensor_map, _ = random_map(random.Random(0))
    new = dataclasses.replace(tensor_map, is_new_layer=True)
    box = (0,) * len(new.axes), new.target.shape
    assert new.wanted(*box, old_only=True) == []
    assert new.wanted(*box) == tensor_map.wanted(*box)
    assert tensor_map.wanted(*box, old_only=True)


# Tensors of a model.

ALL = {"depth": {}, "experts": {}, "hidden": {}, "expert_ffn": {}, "query_groups": {"factor": 1.5}}


def test_an_axis_that_nobody_thought_of_is_refused(monkeypatch):
    point = point_of(with_growth(make_config(TINY), ALL))
    known = {tensor.key: tensor for tensor in logical_tensors(point.after)}
    point.tensor_map(known["embedding.word_embeddings.weight"])
    renamed = dataclasses.replace(known["embedding.word_embeddings.weight"], axes=("vocab", "stream"))
    monkeypatch.setattr(maps, "logical_tensors", lambda model: [renamed])
    other = point_of(with_growth(make_config(TINY), ALL))
    with pytest.raises(ValueError, match="axis 'stream' is unknown to growth"):
        other.tensor_map(renamed)


def test_maps_fit_the_grown_model():
    """Every tensor of the grown model has the shape that its maps give, and its source is of its own kind."""
    point = point_of(with_growth(make_config(TINY, {"model.first_dense_layers": 1, "model.ffn_size": 48}), ALL))
    for tensor in logical_tensors(point.after):
        tensor_map = point.tensor_map(tensor)
        assert tuple(len(axis.source) for axis in tensor_map.axes) == tensor.shape
        assert (tensor_map.source.axes, tensor_map.source.kind) == (tensor.axes, tensor.kind)
    # Interposed: 0 0 1 1, the second of each new; the dense one is the first.
    layers = [point.tensor_map(t) for t in logical_tensors(point.after) if t.key.endswith("input_layernorm.weight")]
    assert [tensor_map.source.layer for tensor_map in layers] == [0, 0, 1, 1]
    assert [tensor_map.is_new_layer for tensor_map in layers] == [False, True, False, True]


# Ages.

HISTORIES = {
    "width, experts, depth": [{"hidden": {}}, {"experts": {"order": "interleave"}}, {"depth": {}}],
    "all, then all": [ALL, {"depth": {"method": "stack", "keep_first": 1}, "experts": {}, "hidden": {}}],
    "depth, width, depth": [{"depth": {}}, {"hidden": {}, "query_groups": {}}, {"depth": {"keep_last": 3}}],
    "utility": [{"experts": {"top_k": "hold", "utility": {}}}, {"experts": {"factor": 2}}],
}


def history_of(growths):
    config, points = make_config(TINY), []
    for keys in growths:
        config = with_growth(config, keys)
        utility = "utility" in keys.get("experts", {})
        points.append(point_of(config, {0: [2, 0, 1, 1], 1: [0, 3, 0, 1]} if utility else None))
    return points


def full_ages(points) -> dict[str, torch.Tensor]:
    """The age of every entry of every tensor, the slow way."""
    found = {t.key: torch.zeros(t.shape, dtype=torch.int64) for t in logical_tensors(points[0].before)}
    for point in points:
        grown = {}
        for tensor in logical_tensors(point.after):
            tensor_map = point.tensor_map(tensor)
            grown[tensor.key] = gathered(tensor_map, found[tensor_map.source.key])
            grown[tensor.key][mask_of(tensor_map)] = point.number
        found = grown
    return found


def entry_ages(points) -> dict[str, torch.Tensor]:
    """What `ages` says, as full tensors."""
    of = ages(points)
    return {
        tensor.key: torch.stack(torch.meshgrid(*map(torch.from_numpy, of(tensor)), indexing="ij")).amax(dim=0)
        for tensor in logical_tensors(points[-1].after)
    }


@pytest.mark.parametrize("name", HISTORIES)
def test_ages_of_all_entries(name):
    points = history_of(HISTORIES[name])
    expected, found = full_ages(points), entry_ages(points)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # As many entries of each age as its growth added parameters. Selection biases are none.
    biases = {tensor.key for tensor in logical_tensors(points[-1].after) if not tensor.trainable}
    totals = [count_parameters(model).total for model in (points[0].before, *(point.after for point in points))]
    trained = torch.cat([age.flatten() for key, age in found.items() if key not in biases])
    assert trained.bincount().tolist() == [totals[0], *(b - a for a, b in itertools.pairwise(totals))]


def test_ages_without_a_mark_on_new_layers_are_wrong(monkeypatch):
    points = history_of(HISTORIES["width, experts, depth"])
    expected, tensor_map = full_ages(points), maps.GrowthPoint.tensor_map

    def forgetful(point, target):
        return dataclasses.replace(tensor_map(point, target), is_new_layer=False)

    monkeypatch.setattr(maps.GrowthPoint, "tensor_map", forgetful)
    found = entry_ages(points)
    wrong = {key for key in expected if not torch.equal(found[key], expected[key])}
    assert wrong == {key for key in expected if ".layers.1." in key or ".layers.3." in key}
