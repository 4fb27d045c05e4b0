"""The table of logical tensors against what megatron-core builds, on one process and on parallel layouts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.model import initialise as initialisation
from pretrain.model.initialise import draw_normal, initialise, standard_deviation
from pretrain.model.logical import logical_tensors
from pretrain.model.shards import collect_shards
from tests.helpers.configs import DENSE, MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Box, assemble, boxes, engine_of, single_process

# Sizes are all different, so that no axis can stand in for another.
MODELS: dict[str, Config] = {
    "dense": make_config(DENSE, {"model.ffn_size": 56}),
    "dense, every head its own keys": make_config(DENSE, {"model.num_query_groups": 0, "model.tie_embeddings": True}),
    "mixture": make_config(MOE),
    "mixture, softmax over all, tied": make_config(
        MOE, {"model.router.normalize_top_k": False, "model.tie_embeddings": True}
    ),
    "everything": make_config(
        MOE,
        {
            "model.num_query_groups": 2,
            "model.num_attention_heads": 6,
            "model.head_dim": 10,
            "model.qk_norm": True,
            "model.first_dense_layers": 1,
            "model.ffn_size": 56,
            "model.shared_expert_ffn_size": 24,
            "model.router": {"score_function": "sigmoid", "bias_update_rate": 1e-3},
        },
    ),
}

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 interleaved": (2, {"pipeline": 2, "pipeline_chunks": 2}),
    "EP2": (2, {"expert": 2}),
    "ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "DP2": (2, {}),
    "TP2xEP2": (4, {"tensor": 2, "expert": 2}),
    "ETP2xEP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "PP2xTP2": (4, {"pipeline": 2, "tensor": 2}),
    "PP2xEP2 interleaved": (4, {"pipeline": 2, "pipeline_chunks": 2, "expert": 2}),
    "EP4": (4, {"expert": 4}),
}

PAIRS = [
    (layout, name)
    for layout, (_, sizes) in LAYOUTS.items()
    for name, config in MODELS.items()
    if config.model.is_moe or not {"expert", "expert_tensor"} & sizes.keys()
]


@dataclass(frozen=True)
class Initial:
    """One rank's initial weights and selection biases."""

    boxes: list[Box]
    main: list[bool]
    """Whether the rank is the one that counts the box and writes it to a checkpoint."""
    local_shapes_as_expected: bool


def with_layout(name: str, layout: str | None) -> Config:
    sizes = LAYOUTS[layout][1] if layout else {}
    config = MODELS[name]
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def initial(config: Config) -> Initial:
    with engine_of(config) as engine:
        parallel = config.parallel
        sizes = {"tensor": parallel.tensor, "expert": parallel.expert, "expert_tensor": parallel.expert_tensor}
        return Initial(
            boxes(engine.shards, lambda shard: shard.tensor),
            [shard.replica_id == (0, 0, 0) for shard in engine.shards],
            all(shard.shape == shard.logical.local_shape(sizes) for shard in engine.shards),
        )


def initial_all(cases: dict[tuple[str, str], Config]) -> dict[tuple[str, str], Initial]:
    return {pair: initial(config) for pair, config in cases.items()}


@functools.cache
def on_ranks(world_size: int) -> dict[tuple[str, str], list[Initial]]:
    cases = {pair: with_layout(pair[1], pair[0]) for pair in PAIRS if LAYOUTS[pair[0]][0] == world_size}
    ranks = run_ranks(initial_all, world_size, cases)
    return {pair: [rank[pair] for rank in ranks] for pair in cases}


@functools.cache
def on_one_process(name: str) -> dict[str, torch.Tensor]:
    """Whole initial tensors."""
    config = MODELS[name]
    with single_process():
        return assemble(config.model, [initial(config).boxes])


def fuses_to(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether `stored` is `shape` with neighbouring axes merged."""
    remaining = list(shape)
    for size in stored:
        product = 1
        while product < size and remaining:
            product *= remaining.pop(0)
        if product != size:
            return False
    return not remaining


# ----- the table


@pytest.mark.parametrize("name", MODELS)
def test_table_is_what_megatron_core_builds(name: str) -> None:
    config = MODELS[name]
    table = {logical.key: logical for logical in logical_tensors(config.model)}
    assert len(table) == len(list(logical_tensors(config.model)))
    with single_process(), engine_of(config) as engine:
        (chunk,) = engine.chunks
        parameters = dict(chunk.named_parameters())
        stored = {**parameters, **{key: value for key, value in chunk.state_dict().items() if value is not None}}
        stored = {key: value for key, value in stored.items() if isinstance(value, torch.Tensor)}
        assert stored.keys() == table.keys()
        assert parameters.keys() == {key for key, logical in table.items() if logical.trainable}
        for key, logical in table.items():
            assert fuses_to(logical.shape, tuple(stored[key].shape)), (key, logical.shape, stored[key].shape)
            assert len(logical.axes) == len(logical.shape)
            assert logical.sharded.keys() <= set(logical.axes)
        assert [shard.key for shard in engine.shards] == list(table)
        for shard in engine.shards:
            assert shard.shape == shard.logical.shape
            assert shard.tensor.data_ptr() == stored[shard.key].data_ptr()
    assert not fuses_to((2, 3, 4), (8, 3))
    assert fuses_to((2, 3, 4), (6, 4))


@pytest.mark.parametrize("changes", [{"expert_ffn_size": 8}, {"num_layers": 3}, {"tie_embeddings": True}])
def test_another_model_than_the_table_is_refused(changes: dict[str, int]) -> None:
    config = MODELS["mixture"]
    other = config.model.model_copy(update=changes)
    with single_process(), engine_of(config) as engine, pytest.raises(AssertionError):
        collect_shards(engine.chunks, other, engine.mesh.groups)


def test_parameter_without_a_logical_tensor_is_refused() -> None:
    config = MODELS["mixture"]
    with single_process(), engine_of(config) as engine:
        engine.chunks[0].decoder.extra = torch.nn.Parameter(torch.zeros(3))
        with pytest.raises(AssertionError, match=r"without a logical tensor.*extra"):
            collect_shards(engine.chunks, config.model, engine.mesh.groups)


# ----- layouts


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_boxes_of_all_ranks_are_the_tensors_of_one_process(layout: str, name: str) -> None:
    expected = on_one_process(name)
    ranks = on_ranks(LAYOUTS[layout][0])[layout, name]
    actual = assemble(MODELS[name].model, [rank.boxes for rank in ranks])
    assert actual.keys() == expected.keys() == {logical.key for logical in logical_tensors(MODELS[name].model)}
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    assert all(rank.local_shapes_as_expected for rank in ranks)


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_every_entry_has_one_main_replica(layout: str, name: str) -> None:
    shapes = {logical.key: logical.shape for logical in logical_tensors(MODELS[name].model)}
    covered = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in shapes.items()}
    for rank in on_ranks(LAYOUTS[layout][0])[layout, name]:
        for box, main in zip(rank.boxes, rank.main, strict=True):
            if main:
                place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.values.shape, strict=True))
                covered[box.key][place] += 1
    assert [key for key, count in covered.items() if not (count == 1).all()] == []


def test_a_layout_spreads_what_it_says() -> None:
    """So that the comparison above is not of whole tensors with whole tensors."""
    (first, *_) = on_ranks(4)["ETP2xEP2", "everything"]
    shape = {box.key: tuple(box.values.shape) for box in first.boxes}
    assert shape["decoder.layers.1.mlp.experts.linear_fc1.weight"] == (4, 2, 8, 32)
    assert shape["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"] == (32, 12)
    assert shape["decoder.layers.0.self_attention.linear_qkv.weight"] == (1, 5, 10, 32)
    (stage_0, *_) = on_ranks(2)["PP2 interleaved", "mixture"]
    layers = {box.key.split(".")[2] for box in stage_0.boxes if box.key.startswith("decoder.layers")}
    assert layers == {"0", "2"}


def test_boxes_in_other_places_are_noticed() -> None:
    expected = on_one_process("everything")
    ranks = [rank.boxes for rank in on_ranks(2)["EP2", "everything"]]
    key = "decoder.layers.1.mlp.experts.linear_fc1.weight"

    def moved(box: Box, start: int) -> Box:
        return Box(box.key, (start, *box.offset[1:]), box.values) if box.key == key else box

    model = MODELS["everything"].model
    swapped = [[moved(box, 4 - box.offset[0]) for box in boxes_of_rank] for boxes_of_rank in ranks]
    assert not torch.equal(assemble(model, swapped)[key], expected[key])
    stacked = [[moved(box, 0) for box in boxes_of_rank] for boxes_of_rank in ranks]
    with pytest.raises(AssertionError, match="copies at"):
        assemble(model, stacked)
    with pytest.raises(AssertionError, match="no rank holds"):
        assemble(model, ranks[:1])


# ----- initial values


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 12 entries: two rows of a tensor [*, 6]."""
    monkeypatch.setattr(initialisation, "BLOCK_ENTRIES", 12)


@pytest.mark.usefixtures("_small_blocks")
def test_any_box_is_part_of_the_same_draw() -> None:
    shape = (7, 2, 3)
    whole = draw_normal(1, "key", shape, (0, 0, 0), shape)
    for offset, extent in [
        ((0, 0, 0), (1, 2, 3)),
        ((3, 1, 0), (4, 1, 2)),
        ((6, 0, 1), (1, 2, 2)),
        ((1, 0, 0), (5, 2, 3)),
    ]:
        place = tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))
        assert torch.equal(draw_normal(1, "key", shape, offset, extent), whole[place])
    assert whole.unique().numel() == whole.numel()


@pytest.mark.usefixtures("_small_blocks")
def test_seed_key_and_block_change_the_draw() -> None:
    def draw(seed: int, key: str) -> torch.Tensor:
        return draw_normal(seed, key, (4, 6), (0, 0), (4, 6))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert not torch.equal(draw(1, "a")[:2], draw(1, "a")[2:])


@pytest.mark.parametrize("seed", [1234, 5])
def test_initial_values_have_their_standard_deviation(seed: int) -> None:
    config = MODELS["everything"]
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    with single_process(), engine_of(config) as engine:
        for shard in engine.shards:
            values, kind = shard.tensor.detach(), shard.logical.kind
            if kind in ("norm", "router_bias"):
                assert torch.equal(values, torch.full_like(values, float(kind == "norm")))
                continue
            into_stream = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = config.model.init_std / (math.sqrt(2 * config.model.num_layers) if into_stream else 1)
            assert standard_deviation(shard.logical, config.model) == expected
            # Five standard errors of a standard deviation and of a mean over so many entries.
            assert abs(values.std() / expected - 1) < 5 / math.sqrt(2 * values.numel()), shard.key
            assert abs(values.mean() / expected) < 5 / math.sqrt(values.numel()), shard.key


def test_another_seed_gives_other_weights() -> None:
    config = MODELS["mixture"]
    with single_process(), engine_of(config) as engine:
        initialise(engine.shards, config.model, config.run.seed + 1)
        actual = assemble(config.model, [boxes(engine.shards, lambda shard: shard.tensor)])
    expected = on_one_process("mixture")
    assert all(torch.equal(actual[key], expected[key]) == ("norm" in key) for key in expected)


def test_bf16_holds_the_rounded_values() -> None:
    config = MODELS["everything"]
    config = config.model_copy(update={"run": config.run.model_copy(update={"precision": "bf16"})})
    with single_process():
        actual = assemble(config.model, [initial(config).boxes])
    for key, tensor in on_one_process("everything").items():
        dtype = torch.float32 if key.endswith("expert_bias") else torch.bfloat16
        assert torch.equal(actual[key], tensor.to(dtype)), key
        assert actual[key].dtype == dtype
