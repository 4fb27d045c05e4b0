"""Every rule across keys, with a configuration that breaks it and one that does not; and the layout."""

import pytest

from pretrain.config.rules import Layout, check, check_runnable, smallest_world_size
from tests.helpers.configs import DENSE, MOE, make_config

GROUPS = {"model.router.num_groups": 4, "model.router.group_top_k": 2}

# Each row: start, what breaks the rule, the key that is named, what mends it, world size.
RULES = {
    "query groups divide heads": (DENSE, {"model.num_query_groups": 3}, "model.num_query_groups", {}, None),
    "heads divide hidden": (
        DENSE,
        {"model.hidden_size": 34},
        "model.num_attention_heads",
        {"model.head_dim": 8},
        None,
    ),
    "even head_dim": (DENSE, {"model.head_dim": 7}, "model.head_dim", {"model.head_dim": 6}, None),
    "even derived head_dim": (DENSE, {"model.hidden_size": 36}, "model.head_dim", {"model.hidden_size": 40}, None),
    "dense layers need ffn": (DENSE, {"model.ffn_size": 0}, "model.ffn_size", {"model.ffn_size": 8}, None),
    "first dense layers need ffn": (
        MOE,
        {"model.first_dense_layers": 1},
        "model.ffn_size",
        {"model.ffn_size": 64},
        None,
    ),
    "first dense layers leave some": (
        MOE,
        {"model.first_dense_layers": 4, "model.ffn_size": 64},
        "model.first_dense_layers",
        {"model.first_dense_layers": 3},
        None,
    ),
    "ffn without dense layers": (
        MOE,
        {"model.ffn_size": 64},
        "model.ffn_size",
        {"model.first_dense_layers": 1},
        None,
    ),
    "top_k on dense": (DENSE, {"model.top_k": 2}, "model.top_k", {"model.top_k": 0}, None),
    "shared expert on dense": (
        DENSE,
        {"model.shared_expert_ffn_size": 8},
        "model.shared_expert_ffn_size",
        {"model.shared_expert_ffn_size": 0},
        None,
    ),
    "router on dense": (
        DENSE,
        {"model.router.aux_loss": 0.01},
        "model.router.aux_loss",
        {"model.router.aux_loss": 0.0},
        None,
    ),
    "expert parallel on dense": (DENSE, {"parallel.expert": 2}, "parallel.expert", {"parallel.expert": 1}, None),
    "expert tensor parallel on dense": (
        DENSE,
        {"parallel.expert_tensor": 2},
        "parallel.expert_tensor",
        {"parallel.expert_tensor": 1},
        None,
    ),
    "top_k at most experts": (MOE, {"model.top_k": 9}, "model.top_k", {"model.top_k": 8}, None),
    "top_k at least one": (MOE, {"model.top_k": 0}, "model.top_k", {"model.top_k": 2}, None),
    "expert_ffn_size": (MOE, {"model.expert_ffn_size": 0}, "model.expert_ffn_size", {"model.expert_ffn_size": 4}, None),
    "softmax over one": (
        MOE,
        {"model.top_k": 1},
        "model.router.normalize_top_k",
        {"model.router.score_function": "sigmoid"},
        None,
    ),
    "bias needs sigmoid": (
        MOE,
        {"model.router.bias_update_rate": 0.001},
        "model.router.bias_update_rate",
        {"model.router.score_function": "sigmoid"},
        None,
    ),
    "num_groups alone": (MOE, {"model.router.num_groups": 4}, "model.router.group_top_k", GROUPS, None),
    "group_top_k alone": (MOE, {"model.router.group_top_k": 2}, "model.router.num_groups", GROUPS, None),
    "groups divide experts": (
        MOE,
        {**GROUPS, "model.router.num_groups": 3},
        "model.router.num_groups",
        {"model.router.num_groups": 2},
        None,
    ),
    "group_top_k at most groups": (
        MOE,
        {**GROUPS, "model.top_k": 8, "model.router.group_top_k": 8},
        "model.router.group_top_k",
        {"model.router.group_top_k": 4},
        None,
    ),
    "group_top_k divides top_k": (
        MOE,
        {**GROUPS, "model.top_k": 3},
        "model.router.group_top_k",
        {"model.top_k": 4},
        None,
    ),
    "groups hold enough experts": (
        MOE,
        {**GROUPS, "model.top_k": 4, "model.router.group_top_k": 1},
        "model.router.group_top_k",
        {"model.router.group_top_k": 2},
        None,
    ),
    "chunks need pipeline": (
        DENSE,
        {"parallel.pipeline_chunks": 2},
        "parallel.pipeline_chunks",
        {"parallel.pipeline": 2},
        None,
    ),
    "pipeline divides layers": (DENSE, {"parallel.pipeline": 3}, "parallel.pipeline", {"parallel.pipeline": 4}, None),
    "chunks divide layers": (
        DENSE,
        {"parallel.pipeline": 2, "parallel.pipeline_chunks": 3},
        "parallel.pipeline * parallel.pipeline_chunks",
        {"parallel.pipeline_chunks": 2},
        None,
    ),
    "tensor divides vocabulary": (
        DENSE,
        {"parallel.tensor": 2, "model.vocab_size": 97},
        "parallel.tensor",
        {"model.vocab_size": 98},
        None,
    ),
    "tensor divides query groups": (
        DENSE,
        {"parallel.tensor": 4},
        "parallel.tensor",
        {"model.num_query_groups": 4},
        None,
    ),
    "tensor divides ffn": (
        DENSE,
        {"parallel.tensor": 2, "model.ffn_size": 63},
        "parallel.tensor",
        {"model.ffn_size": 64},
        None,
    ),
    "tensor divides shared ffn": (
        MOE,
        {"parallel.tensor": 2, "model.shared_expert_ffn_size": 7},
        "parallel.tensor",
        {"model.shared_expert_ffn_size": 8},
        None,
    ),
    "expert divides experts": (MOE, {"parallel.expert": 3}, "parallel.expert", {"parallel.expert": 4}, None),
    "expert_tensor divides expert ffn": (
        MOE,
        {"parallel.expert_tensor": 3},
        "parallel.expert_tensor",
        {"parallel.expert_tensor": 4},
        None,
    ),
    "tensor divides sequence": (
        DENSE,
        {"parallel.tensor": 2, "batch.sequence_length": 33},
        "parallel.tensor",
        {"batch.sequence_length": 34},
        None,
    ),
    "context divides sequence twice": (
        DENSE,
        {"parallel.context": 2, "batch.sequence_length": 34},
        "2 * parallel.context",
        {"batch.sequence_length": 36},
        None,
    ),
    "tensor times context divides sequence": (
        {**DENSE, "model": {**DENSE["model"], "num_query_groups": 4}},
        {"parallel.context": 2, "parallel.tensor": 4, "batch.sequence_length": 36},
        "parallel.tensor * parallel.context",
        {"batch.sequence_length": 40},
        None,
    ),
    "a budget": (DENSE, {"budget.steps": 0}, "budget.tokens", {"budget.tokens": 10_000}, None),
    "one budget": (DENSE, {"budget.tokens": 10_000}, "budget.tokens", {"budget.steps": 0}, None),
    "warm-up in budget": (
        DENSE,
        {"schedule.warmup_steps": 10},
        "schedule.warmup_steps",
        {"schedule.warmup_steps": 9},
        None,
    ),
    "decay after warm-up": (
        DENSE,
        {"schedule.kind": "wsd", "schedule.warmup_steps": 5, "schedule.decay_fraction": 0.6},
        "schedule.decay_fraction",
        {"schedule.decay_fraction": 0.5},
        None,
    ),
    "kept checkpoints exist": (
        DENSE,
        {"checkpoint.keep_every_steps": 15, "checkpoint.every_steps": 10},
        "checkpoint.keep_every_steps",
        {"checkpoint.keep_every_steps": 20},
        None,
    ),
    "validation has data": (
        DENSE,
        {"eval.every_steps": 5},
        "eval.every_steps",
        {"data.valid": [{"prefix": "x"}]},
        None,
    ),
    "world size holds the model": (
        DENSE,
        {"parallel.tensor": 2, "parallel.pipeline": 2, "batch.global_batch_size": 6},
        "parallel.tensor * parallel.pipeline * parallel.context",
        {"parallel.pipeline": 1},
        6,
    ),
    "world size holds the experts": (
        MOE,
        {"parallel.expert": 4, "parallel.pipeline": 2, "batch.global_batch_size": 6},
        "parallel.expert * parallel.expert_tensor * parallel.pipeline",
        {"parallel.expert": 2, "parallel.pipeline": 1},
        6,
    ),
    "batch divides": (
        DENSE,
        {"batch.global_batch_size": 10, "batch.micro_batch_size": 2},
        "batch.global_batch_size",
        {"batch.micro_batch_size": 2, "batch.global_batch_size": 16},
        4,
    ),
    "interleaved micro-batches": (
        DENSE,
        {"parallel.pipeline": 2, "parallel.pipeline_chunks": 2, "batch.global_batch_size": 3},
        "batch.global_batch_size",
        {"batch.global_batch_size": 4},
        2,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    start, breaking, key, mending, world_size = RULES[name]
    (line,) = check(make_config(start, breaking), world_size)
    assert line.startswith(f"{key} = "), line
    assert ": " in line
    assert "; " in line or name == "one budget"
    assert "\n" not in line
    mended = {**breaking, **mending} if mending else {}
    assert check(make_config(start, mended), world_size) == []


def test_remedy_names_values_that_would_do():
    (line,) = check(make_config(MOE, {"parallel.expert": 3}))
    assert (
        line
        == "parallel.expert = 3: must divide model.num_experts = 8; use parallel.expert = 2 or model.num_experts = 9"
    )


def test_remedy_of_a_batch_that_does_not_divide():
    (line,) = check(make_config(DENSE, {"batch.global_batch_size": 12, "batch.micro_batch_size": 4}), 2)
    assert line.endswith("= 4 * 2; use 16, or batch.micro_batch_size = 3")
    (line,) = check(make_config(DENSE, {"batch.global_batch_size": 13}), 2)
    assert line.endswith("= 1 * 2; use 14")


def test_world_size_is_positive():
    assert check(make_config(DENSE), 0) == ["world size = 0: must be at least 1; a run alone has 1"]
    assert check(make_config(DENSE), 1) == []


def test_every_rule_at_once():
    config = make_config(
        MOE, {"model.top_k": 9, "model.num_query_groups": 3, "parallel.pipeline": 3, "schedule.warmup_steps": 99}
    )
    assert [line.split(" = ")[0] for line in check(config)] == [
        "model.num_query_groups",
        "model.top_k",
        "parallel.pipeline",
        "schedule.warmup_steps",
    ]


def test_planning_needs_neither_data_nor_transformer_engine_but_training_does(monkeypatch):
    config = make_config(DENSE, {"parallel.context": 2, "model.backend": "transformer_engine"})
    assert check(config, 2) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [line.split(" = ")[0] for line in check_runnable(config)] == [
        "data.train",
        "parallel.context",
        "model.backend",
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert check_runnable(make_config(DENSE, {"data.train": [{"prefix": "x"}], "parallel.context": 2})) == []


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"model.top_k": 1}, False),
        ({"model.top_k": 1, "model.router.normalize_top_k": False}, True),
        ({"model.router.bias_update_rate": 0.1}, False),
        ({"model.router.bias_update_rate": 0.1, "model.router.score_function": "sigmoid"}, True),
        ({"model.router.num_groups": 3, "model.router.group_top_k": 1}, False),
        ({"model.router.num_groups": 2, "model.router.group_top_k": 1}, True),
        ({"model.router.group_top_k": 1}, False),
    ],
)
def test_megatron_core_refuses_and_accepts_the_same(changes, fits):
    from pretrain.model.transformer_config import transformer_config

    config = make_config(MOE, changes)
    assert (check(config) == []) is fits
    if fits:
        transformer_config(config.model, config.parallel, "fp32")
    else:
        with pytest.raises((ValueError, AssertionError)):
            transformer_config(config.model, config.parallel, "fp32")


def test_layout_sizes():
    config = make_config(
        MOE,
        {
            "parallel.tensor": 2,
            "parallel.pipeline": 2,
            "parallel.pipeline_chunks": 2,
            "parallel.expert": 4,
            "batch.global_batch_size": 32,
            "batch.micro_batch_size": 2,
        },
    )
    assert smallest_world_size(config) == 8
    assert check(config, 16) == []
    layout = Layout.of(config, 16)
    assert (layout.data_parallel, layout.expert_data_parallel) == (4, 2)
    assert layout.microbatches == 4
    assert (layout.layers_per_chunk, layout.layers_per_stage, layout.experts_per_rank) == (1, 2, 2)
    assert [layout.stage_layers(rank) for rank in range(2)] == [(0, 2), (1, 3)]


def test_smallest_world_size_of_odd_layouts():
    config = make_config(MOE, {"parallel.tensor": 2, "parallel.expert": 8, "parallel.pipeline": 4})
    assert smallest_world_size(config) == 32
