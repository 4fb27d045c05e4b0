"""Every rule about growth, with growth points that break it and ones that just do not; and the words of some."""

import pytest

from pretrain.config.growth import WIDTH_AXES
from pretrain.config.rules import check, check_runnable
from tests.helpers.configs import DENSE, MOE, make_config

DEPTH = {"depth": {}}
SIGMOID = {"model.router.score_function": "sigmoid"}
BIAS = {**SIGMOID, "model.router.bias_update_rate": 1e-3}
GROUPS = {"model.router.num_groups": 4, "model.router.group_top_k": 2}
EXACT = {"optimizer_state": "exact"}


def point(step=5, **keys):
    return {"at_step": step, **(keys or DEPTH)}


def hold(**keys):
    return point(experts={"top_k": "hold", **keys})


# Each row: start, its changes, growth points that break the rule, the start of the line that says so, the mended ones.
# A run has 10 steps of 8 * 32 = 256 tokens.
RULES = {
    "a time": (DENSE, {}, [DEPTH], "growth[0].at_step = 0, growth[0].at_tokens = 0: exactly one", [point()]),
    "one time": (
        DENSE,
        {},
        [{**point(), "at_tokens": 512}],
        "growth[0].at_step = 5, growth[0].at_tokens = 512: exactly one",
        [{**DEPTH, "at_tokens": 512}],
    ),
    "before the end": (DENSE, {}, [point(10)], "growth[0].at_step = 10: must come before the end", [point(9)]),
    "tokens before the end": (
        DENSE,
        {},
        [{**DEPTH, "at_tokens": 9 * 256 + 1}],
        "growth[0].at_tokens = 2305 (step 10): must come before the end",
        [{**DEPTH, "at_tokens": 9 * 256}],
    ),
    "in order": (
        DENSE,
        {},
        [point(5), point(5)],
        "growth[1].at_step = 5: must come after the growth before it, at step 5;",
        [point(5), point(6)],
    ),
    "in order of steps, not of keys": (
        DENSE,
        {},
        [point(5), {**DEPTH, "at_tokens": 5 * 256}],
        "growth[1].at_tokens = 1280 (step 5): must come after",
        [point(5), {**DEPTH, "at_tokens": 5 * 256 + 1}],
    ),
    "re-warm-up after warm-up": (
        DENSE,
        {"schedule.warmup_steps": 6},
        [point(5, **DEPTH, rewarm={"steps": 2})],
        "growth[0].at_step = 5: growth[0].rewarm starts from the learning rate of this step",
        [point(6, **DEPTH, rewarm={"steps": 2})],
    ),
    "re-warm-up before the end": (
        DENSE,
        {},
        [point(5, **DEPTH, rewarm={"steps": 5})],
        "growth[0].rewarm.steps = 5: must end before the budget, which has 5 steps left",
        [point(5, **DEPTH, rewarm={"steps": 4})],
    ),
    "something grows": (DENSE, {}, [point(5, rewarm=None)], "growth[0]: nothing grows;", [point()]),
    "a layer to repeat": (
        DENSE,
        {},
        [point(depth={"keep_first": 3, "keep_last": 1})],
        "growth[0].depth.keep_first + keep_last = 4: leaves none of the 4 layers to repeat; keep at most 3",
        [point(depth={"keep_first": 3})],
    ),
    "a later point sees the grown model": (
        DENSE,
        {},
        [point(5), point(6, depth={"keep_first": 8})],
        "growth[1].depth.keep_first + keep_last = 8: leaves none of the 8 layers",
        [point(5), point(6, depth={"keep_first": 7})],
    ),
    "experts to copy": (DENSE, {}, [point(experts={})], "growth[0].experts: a dense model", [point()]),
    "one sigmoid expert": (
        MOE,
        {**SIGMOID, "model.top_k": 1},
        [point(experts={})],
        'growth[0].experts.top_k = "double": with model.top_k = 1',
        [hold()],
    ),
    "doubled copies of one expert": (
        MOE,
        {},
        [point(experts={"factor": 3, "noise": 0.0})],
        "growth[0].experts.factor = 3: several copies of one expert would stay equal",
        [point(experts={"factor": 3, "noise": 1e-3})],
    ),
    "bias noise for held top_k": (
        MOE,
        BIAS,
        [point(experts={"bias_noise": 1e-3})],
        'growth[0].experts.bias_noise: only for top_k = "hold"',
        [hold(bias_noise=1e-3)],
    ),
    "exact start for held top_k": (
        MOE,
        BIAS,
        [point(experts={"exact_start": True})],
        'growth[0].experts.exact_start: only for top_k = "hold"',
        [hold(exact_start=True)],
    ),
    "utility for held top_k": (
        MOE,
        BIAS,
        [point(experts={"utility": {"steps": 2}})],
        'growth[0].experts.utility: only for top_k = "hold"',
        [hold(utility={"steps": 2})],
    ),
    "bias noise on a bias": (
        MOE,
        {},
        [hold(bias_noise=1e-3)],
        "growth[0].experts.bias_noise: needs a selection bias",
        [hold()],
    ),
    "exact start by a bias": (
        MOE,
        SIGMOID,
        [hold(exact_start=True)],
        "growth[0].experts.exact_start: needs a selection bias",
        [hold()],
    ),
    "bias noise or exact start": (
        MOE,
        BIAS,
        [hold(bias_noise=1e-3, exact_start=True)],
        "growth[0].experts.bias_noise = 0.001: with exact_start no copy is chosen",
        [hold(exact_start=True)],
    ),
    "enough copies": (
        MOE,
        {},
        [hold(factor=4, utility={"steps": 2, "max_copies": 2})],
        "growth[0].experts.utility.max_copies = 2: too few for 4 times the experts; use 3 or more",
        [hold(factor=4, utility={"steps": 2, "max_copies": 3})],
    ),
    "utility leaves no groups": (
        MOE,
        GROUPS,
        [hold(utility={"steps": 2})],
        "growth[0].experts.utility: copies that are not spread evenly",
        [hold()],
    ),
    "gradients to choose by": (
        MOE,
        {},
        [hold(utility={"steps": 6})],
        "growth[0].experts.utility.steps = 6: the model is as it is for only 5 steps before the growth; use 5 or",
        [hold(utility={"steps": 5})],
    ),
    "gradients of this model to choose by": (
        MOE,
        {},
        [point(4), hold(utility={"steps": 2})],
        "growth[1].experts.utility.steps = 2: the model is as it is for only 1 steps",
        [point(4), hold(utility={"steps": 1})],
    ),
    "an axis of the model": (
        MOE,
        {},
        [point(shared_expert_ffn={})],
        "growth[0].shared_expert_ffn: the model has no such axis (model.shared_expert_ffn_size = 0);",
        [point(expert_ffn={})],
    ),
    "a whole size": (
        DENSE,
        {},
        [point(hidden={"factor": 1.3})],
        "growth[0].hidden.factor = 1.3: 32 times that is no larger whole number;",
        [point(hidden={"factor": 1.25})],
    ),
    "a larger size": (
        DENSE,
        {},
        [point(hidden={"factor": 1 + 1e-12})],
        "growth[0].hidden.factor = 1.000000000001: 32 times that is no larger whole number;",
        [point(hidden={"factor": 1 + 1 / 32})],
    ),
    "whole groups of heads": (
        DENSE,
        {},
        [point(query_groups={"factor": 1.25})],
        "growth[0].query_groups.factor = 1.25: 2 times that",
        [point(query_groups={"factor": 1.5})],
    ),
    "uneven needs a split": (
        DENSE,
        {},
        [point(hidden={"init": "uneven"})],
        'growth[0].hidden.init = "uneven": needs growth[0].hidden.split; set it',
        [point(hidden={"init": "uneven", "split": 0.3})],
    ),
    "only uneven has a split": (
        DENSE,
        {},
        [point(hidden={"split": 0.3})],
        'growth[0].hidden.init = "copy": has no use for growth[0].hidden.split; leave it out',
        [point(hidden={})],
    ),
    "uneven in two": (
        DENSE,
        {},
        [point(hidden={"init": "uneven", "split": 0.3, "factor": 1.5})],
        'growth[0].hidden.factor = 1.5: init = "uneven" splits each channel in two; use 2',
        [point(hidden={"init": "uneven", "split": 0.3, "factor": 2})],
    ),
    "noise on copies": (
        DENSE,
        {},
        [point(hidden={"init": "random", "noise": 0.01})],
        'growth[0].hidden.noise = 0.01: for copies, and init = "random" is not',
        [point(hidden={"init": "copy", "noise": 0.01})],
    ),
    "copies of one channel": (
        DENSE,
        {},
        [point(hidden={"factor": 3})],
        "growth[0].hidden.factor = 3.0: several copies of one channel would stay equal for ever; grow by 2 twice, or",
        [point(hidden={"factor": 3, "noise": 1e-3})],
    ),
    "copies of one channel and nothing": (
        DENSE,
        {},
        [point(ffn={"factor": 2.5, "init": "copy-zero"})],
        "growth[0].ffn.factor = 2.5: several copies of one channel would stay equal for ever; grow by 2 twice",
        [point(ffn={"factor": 2.5, "init": "copy-random"})],
    ),
    "exact with noise": (
        MOE,
        {},
        [point(experts={"noise": 0.01}, **EXACT)],
        'growth[0].optimizer_state = "exact": known only for experts alone',
        [point(experts={"noise": 0.0}, **EXACT)],
    ),
    "exact with another operator": (
        MOE,
        {},
        [point(experts={"noise": 0.0}, hidden={}, **EXACT)],
        'growth[0].optimizer_state = "exact": known only for experts alone',
        [point(experts={"noise": 0.0, "factor": 3}, **EXACT)],  # that they stay equal is what is asked for
    ),
    "exact with held top_k": (
        MOE,
        {},
        [{**hold(noise=0.0), **EXACT}],
        'growth[0].optimizer_state = "exact": known only for experts alone',
        [point(experts={"noise": 0.0}, **EXACT)],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    start, changes, breaking, expected, mended = RULES[name]
    (line,) = check(make_config(start, {**changes, "growth": breaking}))
    assert line.startswith(expected), line
    assert "; " in line
    assert "\n" not in line
    assert check(make_config(start, {**changes, "growth": mended})) == []


@pytest.mark.parametrize("init", ["zero-copy", "copy-zero", "random", "random-copy", "copy-random", "random-zero"])
def test_only_what_is_random_or_noisy_grows_by_more_than_two(init):
    problems = check(make_config(DENSE, {"growth": [point(hidden={"factor": 4, "init": init})]}))
    assert (problems == []) is ("random" in init)
    # Noise is refused there, so it is no remedy.
    assert all("noise" not in line for line in problems)


# Rules of every model and layout that growth makes one break. Each row: start, its changes, growth points, what is said
# after the words on the growth, the mended points, world size.
AFTER = {
    "pipeline divides layers": (
        DENSE,
        {"parallel.pipeline": 4},
        [point(depth={"keep_first": 2})],
        "after growth[0], layers 4 -> 6 (interpose, first 2 and last 0 once): parallel.pipeline = 4: must divide "
        "model.num_layers = 6; use growth[0].parallel.pipeline = 3, or change the growth",
        [point(depth={"keep_first": 2}, parallel={"pipeline": 3})],
        None,
    ),
    "tensor divides ffn": (
        DENSE,
        {"parallel.tensor": 2, "model.ffn_size": 6},
        [point(ffn={"factor": 1.5})],
        "after growth[0], ffn 6 -> 9 (copy): parallel.tensor = 2: must divide model.ffn_size = 9; use "
        "growth[0].parallel.tensor = 1, or change the growth",
        [point(ffn={"factor": 1.5}, parallel={"tensor": 1})],
        None,
    ),
    "tensor divides query groups": (
        DENSE,
        {},
        [point(query_groups={}, parallel={"tensor": 8})],
        "after growth[0], query groups 2 -> 4 (copy): parallel.tensor = 8: must divide model.num_query_groups = 4;",
        [point(query_groups={}, parallel={"tensor": 4})],
        None,
    ),
    "expert divides experts": (
        MOE,
        {},
        [point(experts={}, parallel={"expert": 32})],
        "after growth[0], experts 8 -> 16 (top-k 2 -> 4, noise 0.01): parallel.expert = 32: must divide",
        [point(experts={}, parallel={"expert": 16})],
        None,
    ),
    "expert parallel on dense": (
        DENSE,
        {},
        [point(**DEPTH, parallel={"expert": 2})],
        "after growth[0], layers 4 -> 8 (interpose): parallel.expert = 2: a dense model (model.num_experts = 0) has no "
        "experts to spread; set growth[0].parallel.expert = 1, or change the growth",
        [point(**DEPTH, parallel={"expert": 1})],
        None,
    ),
    "the second of two": (
        DENSE,
        {"parallel.pipeline": 4},
        [point(5), point(6, depth={"keep_first": 6})],
        "after growth[1], layers 8 -> 10 (interpose, first 6 and last 0 once): parallel.pipeline = 4: must divide",
        [point(5), point(6, depth={"keep_first": 4})],
        None,
    ),
    "the layout fits the ranks": (
        DENSE,
        {},
        [point(**DEPTH, parallel={"context": 8})],
        "after growth[0], layers 4 -> 8 (interpose): parallel.tensor * parallel.pipeline * parallel.context = 8: must "
        "divide world size = 4; use growth[0].parallel.tensor * growth[0].parallel.pipeline *",
        [point(**DEPTH, parallel={"context": 4})],
        4,
    ),
    "the batch divides": (
        DENSE,
        {"parallel.pipeline": 4, "batch.micro_batch_size": 8},
        [point(**DEPTH, parallel={"pipeline": 1})],
        "after growth[0], layers 4 -> 8 (interpose): batch.global_batch_size = 8: must be a multiple of "
        "batch.micro_batch_size * data-parallel size = 8 * 4; use 32, or batch.micro_batch_size = 2, or change",
        [point(**DEPTH)],
        4,
    ),
}


@pytest.mark.parametrize("name", AFTER)
def test_rules_of_every_model_hold_for_the_grown_one(name):
    start, changes, breaking, expected, mended, world_size = AFTER[name]
    (line,) = check(make_config(start, {**changes, "growth": breaking}), world_size)
    assert line.startswith(expected), line
    assert "\n" not in line
    assert check(make_config(start, {**changes, "growth": mended}), world_size) == []


@pytest.mark.parametrize("order", ["append", "interleave"])
@pytest.mark.parametrize("top_k", ["double", "hold"])
def test_groups_of_experts_grow_by_the_rules_of_groups(order, top_k):
    growth = [point(step, experts={"factor": 2, "order": order, "top_k": top_k}) for step in (5, 6)]
    assert check(make_config(MOE, {**GROUPS, "growth": growth})) == []


def test_every_problem_of_all_points_at_once():
    growth = [point(11, depth={"keep_first": 4}, experts={}), point(3, hidden={"factor": 1.3})]
    # What the second point finds is not known, when it comes is.
    assert [
        line.partition(":")[0] for line in check(make_config(DENSE, {"model.num_query_groups": 3, "growth": growth}))
    ] == [
        "model.num_query_groups = 3",
        "growth[0].at_step = 11",
        "growth[1].at_step = 3",
        "growth[0].depth.keep_first + keep_last = 4",
        "growth[0].experts",
    ]


def test_a_model_that_breaks_rules_itself_can_be_checked_with_growth():
    changes = {"model.first_dense_layers": 4, "model.ffn_size": 64, "growth": [point(), point(6, query_groups={})]}
    (line,) = check(make_config(MOE, changes))
    assert line.startswith("model.first_dense_layers = 4: ")


def test_context_parallelism_that_comes_with_a_growth_needs_transformer_engine(monkeypatch):
    changes = {"data.train": [{"prefix": "x"}], "growth": [point(**DEPTH, parallel={"context": 2})]}
    config = make_config(DENSE, changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = check_runnable(config)
    assert line.startswith("growth[0].parallel.context = 2: needs Transformer Engine")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert check_runnable(config) == []


def test_every_width_is_refused_where_the_model_has_no_such_axis_and_only_there():
    for name in WIDTH_AXES:
        for start, missing in ((DENSE, {"expert_ffn", "shared_expert_ffn"}), (MOE, {"ffn", "shared_expert_ffn"})):
            problems = check(make_config(start, {"growth": [point(**{name: {}})]}))
            assert bool(problems) is (name in missing), (name, problems)
