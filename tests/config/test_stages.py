"""Stages of a run: layer maps, sizes and layouts after growth, against the formulas and tables of the papers."""

from pathlib import Path

import pytest

from pretrain.config.growth import DepthGrowth, ExpertGrowth, GrowthConfig, RewarmConfig, WidthGrowth
from pretrain.config.load import load_config
from pretrain.config.rules import check, smallest_world_size
from pretrain.config.stages import (
    describe_growth,
    describe_rewarm,
    describe_state,
    fan_in_scale,
    grown_model,
    growth_step,
    layer_sources,
    preserves_function,
    stages,
    wider_size,
)
from pretrain.model.counts import count_parameters
from tests.helpers.configs import DENSE, MOE, make_config

MODELS = Path(__file__).parents[2] / "configs" / "models"


def growth(**keys):
    return GrowthConfig.model_validate({"at_step": 1, **keys})


def published(name):
    return load_config(MODELS / f"{name}.toml")


# Depth: arXiv 2510.08008, section 3.


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_layer_sources_are_the_papers_formulas(n, factor):
    assert layer_sources(n, DepthGrowth(factor=factor)) == tuple(j // factor for j in range(n * factor))
    stack = layer_sources(n, DepthGrowth(method="stack", factor=factor))
    assert stack == tuple(j % n for j in range(n * factor))
    assert (stack == layer_sources(n, DepthGrowth(factor=factor))) is (n == 1)


@pytest.mark.parametrize(("n", "first", "last", "depth"), [(28, 0, 0, 56), (20, 2, 2, 36), (28, 2, 2, 52)])
@pytest.mark.parametrize("method", ["interpose", "stack"])
def test_depth_after_partial_growth(n, first, last, depth, method):
    growth = DepthGrowth(method=method, keep_first=first, keep_last=last)
    sources = layer_sources(n, growth)
    assert len(sources) == depth == n + (n - first - last)
    once = [*range(first), *range(n - last, n)]
    assert all(sources.count(layer) == (1 if layer in once else 2) for layer in range(n))


def test_a_stack_with_equal_ends_is_depth_up_scaling():
    """SOLAR (arXiv 2312.15166): a copy without its last m layers, then one without its first m; 32, m = 8 -> 48."""
    n, m = 32, 8
    sources = layer_sources(n, DepthGrowth(method="stack", keep_first=m, keep_last=m))
    assert sources == (*range(n - m), *range(m, n))
    assert len(sources) == 48


def dense_after(depth, **changes):
    """Numbers of the dense layers after a growth, as the model says and as the map does."""
    model = make_config(MOE, {"model.ffn_size": 64, **changes}).model
    grown = grown_model(model, growth(depth=depth))
    sources = layer_sources(model.num_layers, DepthGrowth.model_validate(depth))
    assert [grown.is_moe_layer(layer) for layer in range(grown.num_layers)] == [model.is_moe_layer(s) for s in sources]
    return grown.first_dense_layers, grown.dense_layers


def test_dense_layers_follow_their_source():
    first = {"model.first_dense_layers": 1}
    assert dense_after({"method": "interpose"}, **first) == (2, ())
    assert dense_after({"method": "interpose", "keep_first": 1}, **first) == (1, ())
    assert dense_after({"method": "stack"}, **first) == (1, (4,))
    assert dense_after({"method": "stack", "factor": 3}, **first) == (1, (4, 8))
    assert dense_after({"method": "stack", "keep_first": 1}, **first) == (1, ())
    between = {"model.first_dense_layers": 1, "model.dense_layers": [2]}
    assert dense_after({"method": "interpose"}, **between) == (2, (4, 5))
    assert dense_after({"method": "stack", "keep_last": 1}, **between) == (1, (2, 3, 5))


def test_growing_a_model_with_dense_layers_twice():
    points = [{"at_step": step, "depth": {"method": method}} for step, method in ((3, "stack"), (6, "interpose"))]
    config = make_config(MOE, {"model.first_dense_layers": 1, "model.ffn_size": 64, "growth": points})
    assert check(config) == []
    last = stages(config)[-1].config.model
    assert (last.num_layers, last.first_dense_layers, last.dense_layers) == (16, 2, (8, 9))


# Width: arXiv 2602.02472, equations 14 to 17.


@pytest.mark.parametrize(
    ("more", "scale"),
    [(0.25, 0.7559), (0.5, 0.6325), (0.75, 0.5547), (1, 0.5), (2, 0.3333), (3, 0.25)],
)
def test_scale_with_both_sides_copied(more, scale):
    size = 64
    new_size = wider_size(size, WidthGrowth(factor=1 + more))
    found = fan_in_scale(size, new_size, copied=True)
    assert found == pytest.approx(scale, abs=5e-5)
    paper = (1 + 3 * more) ** -0.5 if more <= 1 else 1 / (1 + more)
    assert found == pytest.approx(paper, rel=1e-12)


def test_scale_with_one_side_copied():
    assert fan_in_scale(64, 128, copied=False) == pytest.approx(0.70711, abs=5e-6)
    assert fan_in_scale(64, 128, copied=False) != fan_in_scale(64, 128, copied=True)


def test_scale_between_whole_factors_keeps_the_rms_where_the_papers_formula_does_not():
    size, new_size = 64, 160  # c = 1.5
    multiplicity = [len([j for j in range(new_size) if j % size == i]) for i in range(size)]
    variance = sum(m**2 for m in multiplicity) / size
    assert fan_in_scale(size, new_size, copied=True) ** 2 * variance == pytest.approx(1, rel=1e-12)
    assert fan_in_scale(size, new_size, copied=True) == pytest.approx(0.3922, abs=5e-5)
    assert 1 / 2.5 * variance**0.5 == pytest.approx(1.02, rel=1e-3)  # 1 / (1 + c)


# Shapes of the papers, reached by growth.

SPARKLING = {
    "sparkling-inner2x": ["expert_ffn"],
    "sparkling-hidden2x": ["hidden"],
    "sparkling-joint": ["hidden", "expert_ffn"],
}


@pytest.mark.parametrize("name", SPARKLING)
def test_the_small_model_grows_into_the_others(name):
    """Into the shape and counts of the models that the paper trains from scratch; the logit scale is growth's own."""
    small, large = published("sparkling-small").model, published(name).model
    assert count_parameters(small) != count_parameters(large)
    grown = grown_model(small, growth(**{axis: {} for axis in SPARKLING[name]}))
    assert count_parameters(grown) == count_parameters(large)
    scale = 0.5 if "hidden" in SPARKLING[name] else 1.0
    assert grown == large.model_copy(update={"logit_scale": scale})


def test_tied_logits_are_scaled_at_each_growth_of_hidden():
    model = published("sparkling-small").model
    twice = growth(hidden={})
    assert grown_model(grown_model(model, twice), twice).logit_scale == 0.25
    one_sided = grown_model(model, growth(hidden={"init": "random-copy"}))
    assert one_sided.logit_scale == pytest.approx(0.70711, abs=5e-6)
    untied = model.model_copy(update={"tie_embeddings": False})
    assert grown_model(untied, twice).logit_scale == 1.0


def test_heads_stay_when_hidden_grows():
    model = make_config(DENSE).model
    grown = grown_model(model, growth(hidden={}))
    assert (grown.hidden_size, grown.num_attention_heads, grown.channels) == (64, 4, 8)
    assert model.channels == 8


def test_query_groups_grow_with_their_heads():
    model = make_config(DENSE).model
    grown = grown_model(model, growth(query_groups={}))
    assert (grown.query_groups, grown.num_attention_heads, grown.channels, grown.hidden_size) == (4, 8, 8, 32)
    each_its_own = make_config(DENSE, {"model.num_query_groups": 0}).model
    grown = grown_model(each_its_own, growth(query_groups={"factor": 1.5}))
    assert (grown.query_groups, grown.num_attention_heads) == (6, 6)


def test_the_chain_from_17b_to_70b():
    """arXiv 2510.08008 prints 18.0/35.2/69.0B total and 2.1/3.5/5.6B active; the digits are those of the shape."""
    chain = [stage.config.model for stage in stages(published("orthogonal-17b-to-70b"))]
    alone = [published(name).model for name in ("orthogonal-17b", "orthogonal-35b", "orthogonal-70b")]
    assert chain == alone
    counts = [count_parameters(model) for model in chain]
    assert [round(count.total / 1e9, 2) for count in counts] == [18.03, 35.24, 69.07]
    assert [round(count.active / 1e9, 2) for count in counts] == [2.18, 3.53, 5.66]


def test_parameters_that_growth_adds():
    """Depth: the repeated layers. Experts: E times three matrices and a router row in every layer with experts."""
    model = make_config(MOE, {"model.first_dense_layers": 1, "model.ffn_size": 64}).model
    base = count_parameters(model).total
    richer = count_parameters(grown_model(model, growth(experts={}))).total
    assert richer - base == 3 * 8 * (3 * 16 * 32 + 32)
    deeper = count_parameters(grown_model(model, growth(depth={"keep_first": 1, "keep_last": 1}))).total
    attention, norms = 32 * (4 + 2 * 2) * 8 + 32 * 32, 2 * 32
    assert deeper - base == 2 * (attention + norms + 8 * (3 * 16 * 32 + 32))


# Experts: when duplication preserves the function.

GROUPS = {"num_groups": 4, "group_top_k": 2}


@pytest.mark.parametrize(
    ("experts", "groups"),
    [
        ({}, {"num_groups": 8, "group_top_k": 4}),
        ({"factor": 3}, {"num_groups": 12, "group_top_k": 6}),
        ({"order": "interleave"}, GROUPS),
        ({"top_k": "hold"}, {"num_groups": 8, "group_top_k": 2}),
        ({"top_k": "hold", "order": "interleave"}, GROUPS),
    ],
)
def test_groups_of_experts(experts, groups):
    model = make_config(MOE, {f"model.router.{key}": value for key, value in GROUPS.items()}).model
    grown = grown_model(model, growth(experts=experts))
    assert grown.router == model.router.model_copy(update=groups)
    # As many experts of each chosen group as before, times the copies in the group.
    copies = experts.get("factor", 2) if experts.get("order") == "interleave" else 1
    if experts.get("top_k") != "hold":
        assert grown.top_k // grown.router.group_top_k == copies * model.top_k // model.router.group_top_k


@pytest.mark.parametrize(
    ("score_function", "normalize", "top_k", "scale"),
    [
        ("sigmoid", False, "double", 1.25),
        ("sigmoid", False, "hold", 2.5),
        ("sigmoid", True, "double", 2.5),
        ("softmax", False, "double", 2.5),
        ("softmax", True, "double", 2.5),
    ],
)
def test_scale_of_combine_weights(score_function, normalize, top_k, scale):
    router = {"score_function": score_function, "normalize_top_k": normalize, "scaling_factor": 2.5}
    model = make_config(MOE, {f"model.router.{key}": value for key, value in router.items()}).model
    grown = grown_model(model, growth(experts={"top_k": top_k}))
    assert grown.router.scaling_factor == scale
    assert (grown.num_experts, grown.top_k) == (16, 4 if top_k == "double" else 2)


@pytest.mark.parametrize(
    ("keys", "preserved"),
    [
        ({"hidden": {}}, True),
        ({"hidden": {"factor": 3, "noise": 0.01}}, True),
        ({"hidden": {"factor": 1.5}}, False),
        ({"hidden": {"init": "uneven", "split": 0.3}}, True),
        ({"hidden": {"init": "zero-copy"}}, False),
        ({"hidden": {}, "expert_ffn": {"init": "random"}}, False),
        ({"depth": {}}, False),
        ({"depth": {"identity": True}}, True),
        ({"experts": {}}, True),
        ({"experts": {"top_k": "hold"}}, False),
        ({"experts": {"top_k": "hold", "exact_start": True}}, True),
        ({"experts": {}, "depth": {}}, False),
    ],
)
def test_what_preserves_the_function(keys, preserved):
    assert preserves_function(growth(**keys)) is preserved


# The run.


def test_stages_have_their_own_model_and_layout():
    points = [
        {"at_step": 3, "experts": {}, "parallel": {"expert": 4}},
        {"at_tokens": 6 * 256 - 1, "depth": {}, "parallel": {"expert": 2, "pipeline": 2}},
        {"at_step": 8, "hidden": {}},
    ]
    config = make_config(MOE, {"growth": points, "parallel.tensor": 2})
    found = stages(config)
    assert found[0].config == config
    assert [stage.start_step for stage in found] == [0, 3, 6, 8]
    assert [stage.growth for stage in found] == [None, *config.growth]
    models = [stage.config.model for stage in found]
    assert [model.num_experts for model in models] == [8, 16, 16, 16]
    assert [model.num_layers for model in models] == [4, 4, 8, 8]
    assert [model.hidden_size for model in models] == [32, 32, 32, 64]
    layouts = [stage.config.parallel for stage in found]
    assert [layout.expert for layout in layouts] == [1, 4, 2, 2]
    assert [layout.pipeline for layout in layouts] == [1, 1, 2, 2]
    assert {layout.tensor for layout in layouts} == {2}
    # Every stage fits: tensor 2, expert 4, and 2 * 2.
    assert smallest_world_size(config) == 4
    assert check(config, 4) == []


def test_operators_of_one_point_or_of_several_give_one_model():
    keys = {"depth": {"keep_first": 1}, "experts": {}, "hidden": {}, "expert_ffn": {}, "query_groups": {}}
    model = make_config(MOE, {"model.tie_embeddings": True}).model
    together = grown_model(model, growth(**keys))
    for order in (keys, reversed(keys)):
        alone = model
        for key in order:
            alone = grown_model(alone, growth(**{key: keys[key]}))
        assert alone == together
    assert together != model


def test_a_number_of_tokens_is_rounded_up_to_steps():
    config = make_config(DENSE)
    steps = [growth_step(config, GrowthConfig(at_tokens=tokens)) for tokens in (1, 255, 256, 257)]
    assert steps == [1, 1, 1, 2]
    assert growth_step(config, GrowthConfig(at_step=7)) == 7


# Words.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"depth": {}, "experts": {}, "hidden": {}},
            "layers 4 -> 8 (interpose), experts 8 -> 16 (top-k 2 -> 4, noise 0.01), hidden 32 -> 64 (copy)",
        ),
        (
            {"depth": {"method": "stack", "keep_first": 1, "keep_last": 2, "identity": True}},
            "layers 4 -> 5 (stack, first 1 and last 2 once, identity at the start)",
        ),
        (
            {"experts": {"top_k": "hold", "order": "interleave", "utility": {}, "bias_noise": 1e-3, "noise": 0}},
            "experts 8 -> 16 (top-k 2 held, interleaved, chosen by gradients, bias noise 0.001)",
        ),
        (
            {"experts": {"top_k": "hold", "exact_start": True}},
            "experts 8 -> 16 (top-k 2 held, copies out of reach at the start, noise 0.01)",
        ),
        (
            {"expert_ffn": {"init": "uneven", "split": 0.3, "noise": 0.02}, "query_groups": {"factor": 1.5}},
            "expert ffn 16 -> 32 (uneven 0.3 : 0.7, noise 0.02), query groups 2 -> 3 (copy)",
        ),
    ],
)
def test_growth_in_words(keys, words):
    assert describe_growth(make_config(MOE).model, growth(**keys)) == words


def test_state_and_learning_rate_in_words():
    texts = {describe_state(growth(optimizer_state=state)) for state in ("asymmetric", "reset", "copy", "exact")}
    assert len(texts) == 4
    assert describe_rewarm(None) == "goes on as before"
    assert describe_rewarm(RewarmConfig()).startswith("of new entries from 1 to 1.3 times its value here in 250 steps")
    assert describe_rewarm(RewarmConfig(entries="all", start=0)).startswith("of all entries from 0 to 1.3 times")


def test_defaults_are_the_papers():
    """arXiv 2602.02472, section 4.3 and appendix H; arXiv 2510.08008, section 3."""
    assert (RewarmConfig().steps, RewarmConfig().ratio, RewarmConfig().entries) == (250, 1.3, "new")
    assert (ExpertGrowth().factor, ExpertGrowth().top_k, ExpertGrowth().noise) == (2, "double", 0.01)
    assert (DepthGrowth().method, DepthGrowth().keep_first, DepthGrowth().keep_last) == ("interpose", 0, 0)
