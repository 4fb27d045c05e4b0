"""Which rule and decay each tensor of a real mixture-of-experts model gets."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.config.rules import check
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import Route, check_routes, describe_routes, route, rules_of
from tests.helpers import configs
from tests.optim.build import KINDS, MOE

# Every trained tensor of the model, by what decides on its rule. Sizes: vocabulary 64, hidden 32, 4 groups of 2 queries
# of 6 channels; layer 0 is dense with ffn 48; layer 1 has 4 experts of 24 and a shared one of 16.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "hidden": {
        **{f"decoder.layers.{i}.self_attention.linear_qkv.weight": (4, 4, 6, 32) for i in range(2)},
        **{f"decoder.layers.{i}.self_attention.linear_proj.weight": (32, 4, 2, 6) for i in range(2)},
        "decoder.layers.0.mlp.linear_fc1.weight": (2, 48, 32),
        "decoder.layers.0.mlp.linear_fc2.weight": (32, 48),
        "decoder.layers.1.mlp.experts.linear_fc1.weight": (4, 2, 24, 32),
        "decoder.layers.1.mlp.experts.linear_fc2.weight": (4, 32, 24),
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (2, 16, 32),
        "decoder.layers.1.mlp.shared_experts.linear_fc2.weight": (32, 16),
    },
    "router": {"decoder.layers.1.mlp.router.weight": (4, 32)},
    "embedding": {"embedding.word_embeddings.weight": (64, 32)},
    "output": {"output_layer.weight": (64, 32)},
    "norm": {
        "decoder.final_layernorm.weight": (32,),
        **{f"decoder.layers.{i}.{name}_layernorm.weight": (32,) for i in range(2) for name in ("input", "pre_mlp")},
        **{f"decoder.layers.{i}.self_attention.{name}_layernorm.weight": (6,) for i in range(2) for name in "qk"},
    },
}
UNDECAYED = {*SHAPES["embedding"], *SHAPES["norm"]}

# Rules of hidden matrices, output layer, and all the rest.
RULES: dict[str, tuple[str, str, str]] = {
    **{kind: (kind, kind, kind) for kind in KINDS},
    **{kind: (kind, "adamw", "adamw") for kind in ("muon", "soap", "kron")},
    "scion": ("scion", "signum", "signum"),
    **{kind: (kind, "adamh", "adamw") for kind in ("muonh", "adamh")},
}


def routes(config: OptimConfig, model=MOE):
    return {t.key: route(t, config) for t in logical_tensors(model) if t.trainable}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_its_rule(kind):
    """By name and by shape: that a tensor has two axes does not say what it is."""
    own = {kind: {"lr": 2e-2}} if kind in ("muon", "scion", "soap", "kron") else {}
    own |= {"hyperball": {"lr": 2e-2}} if kind in ("muonh", "adamh") else {}
    config = OptimConfig.model_validate({"kind": kind, "lr": 1e-3, "weight_decay": 0.1, **own})
    hidden, output, rest = RULES[kind]
    table, shapes = routes(config), {t.key: t.shape for t in logical_tensors(MOE) if t.trainable}
    assert {key: shape for group in SHAPES.values() for key, shape in group.items()} == shapes
    for group, members in SHAPES.items():
        rule = {"hidden": hidden, "output": output}.get(group, rest)
        lr = 2e-2 if own and rule in (kind, "adamh") else 1e-3
        decay = 0.0 if group in ("embedding", "norm") or rule in ("muonh", "adamh") else 0.1
        assert {table[key] for key in members} == {Route(rule, lr, decay)}, group
    assert {hidden, output, rest} == set(rules_of(config.kind))


def test_patterns_say_otherwise_and_the_last_match_counts():
    patterns = {"*.router.weight": "muon", "*linear_fc*": "adamw", "*.1.mlp.experts.*": "muon"}
    table = routes(OptimConfig(kind="muon", routes=patterns))
    dense = {key for key in SHAPES["hidden"] if "fc" in key and ".experts." not in key}
    expected = ({*SHAPES["hidden"]} | {*SHAPES["router"]}) - dense
    assert {key for key, r in table.items() if r.rule == "muon"} == expected
    turned = routes(OptimConfig(kind="muon", routes=dict(reversed(patterns.items()))))
    assert all(turned[key].rule == "adamw" for key in SHAPES["hidden"] if "fc" in key)


def test_decay_mask():
    table = routes(OptimConfig(weight_decay=0.1))
    assert {key for key, r in table.items() if r.weight_decay == 0} == UNDECAYED
    assert {r.weight_decay for key, r in table.items() if key not in UNDECAYED} == {0.1}
    norms = {key for key in UNDECAYED if "norm" in key}
    table = routes(OptimConfig(decay_embeddings=True))
    assert {key for key, r in table.items() if r.weight_decay == 0} == norms
    table = routes(OptimConfig(decay_norms=True))
    assert {key for key, r in table.items() if r.weight_decay == 0} == UNDECAYED - norms


def test_tied_output_is_an_embedding():
    tied = MOE.model_copy(update={"tie_embeddings": True})
    assert "output_layer.weight" not in routes(OptimConfig(), tied)
    assert routes(OptimConfig(), tied)["embedding.word_embeddings.weight"].weight_decay == 0


def test_table_covers_every_parameter_once():
    config = OptimConfig(kind="muon", lr=1e-3, muon=MuonConfig(lr=2e-2))
    text = describe_routes(logical_tensors(MOE), config)
    rows = [line.split() for line in text.splitlines()[1:]]
    trainable = [t for t in logical_tensors(MOE) if t.trainable]
    assert sum(int(row[3]) for row in rows) == len(trainable)
    assert sum(int(row[4].replace(",", "")) for row in rows) == sum(t.numel for t in trainable)
    by_name = {row[5]: row for row in rows}
    assert by_name["decoder.layers.*.self_attention.linear_qkv.weight"][:4] == ["muon", "0.02", "0.1", "2"]
    assert by_name["decoder.layers.*.mlp.router.weight"][:3] == ["adamw", "0.001", "0.1"]
    assert by_name["decoder.final_layernorm.weight"][2] == "0"
    assert "expert_bias" not in text


# What the tensors of a run's models do not let a rule do: kind, other keys, what is said, keys that mend it.
GROWTH: dict[str, Any] = {"growth": [{"at_step": 5, "depth": {"identity": True}}]}
EXACT: dict[str, Any] = {"growth": [{"at_step": 5, "experts": {"noise": 0.0}, "optimizer_state": "exact"}]}
PROBLEMS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "rule of another kind": (
        "muon",
        {"optim.routes": {"*.router.weight": "soap"}},
        'optim.routes."*.router.weight" = "soap": optim.kind = "muon" has the rules "muon", "adamw"; use one',
        {"optim.routes": {"*.router.weight": "muon"}},
    ),
    "no match": (
        "muon",
        {"optim.routes": {"*.rooter.weight": "muon"}},
        'optim.routes."*.rooter.weight" = "muon": matches no tensor; names are decoder.final_layernorm.weight, ',
        {"optim.routes": {"*.router.weight": "muon"}},
    ),
    "a vector": (
        "scion",
        {"optim.routes": {"*layernorm*": "scion"}},
        'optim.routes."*layernorm*" = "scion": decoder.layers.0.input_layernorm.weight is a vector and scion needs',
        {"optim.routes": {"*layernorm*": "signum"}},
    ),
    "blocks across ranks": (
        "soap",
        {"optim.soap": {"block_size": 64}, "parallel.tensor": 2, "parallel.expert_tensor": 2},
        "optim.soap.block_size = 64: makes blocks of ",
        {"optim.soap": {"block_size": 8}},
    ),
    "zeros of a growth": (
        "muonh",
        GROWTH,
        "growth[0].depth.identity = true: new layers begin with matrices of zeros, and muonh keeps the norm of ",
        {"optim.routes": {"*linear_proj*": "adamw", "*linear_fc2*": "adamw"}},
    ),
    "exact state of a router": (
        "muon",
        {**EXACT, "optim.routes": {"*.router.weight": "muon"}},
        'growth[0].optimizer_state = "exact": muon mixes the rows of decoder.layers.',
        {"optim.routes": {}},
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_a_rule_cannot_do_is_said(name):
    kind, keys, expected, mending = PROBLEMS[name]
    config = configs.make_config(configs.MOE, {"optim.kind": kind, **keys})
    assert check(config) == []
    lines = check_routes(config)
    assert lines
    assert lines[0].startswith(expected)
    assert all("; " in line and "\n" not in line for line in lines)
    assert len(lines) == len(set(lines))
    mended = configs.make_config(configs.MOE, {"optim.kind": kind, **keys, **mending})
    assert check_routes(mended) == []


def test_adamw_may_start_layers_from_zeros():
    assert check_routes(configs.make_config(configs.MOE, GROWTH)) == []
