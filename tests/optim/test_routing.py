"""Which rule and decay each tensor of a real mixture-of-experts model gets."""

from __future__ import annotations

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import describe_routes, route
from tests.optim.build import MOE

ADAMW_ONLY = {
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
    "decoder.layers.1.mlp.router.weight",
    *(f"decoder.layers.{i}.{norm}.weight" for i in range(2) for norm in ("input_layernorm", "pre_mlp_layernorm")),
    *(f"decoder.layers.{i}.self_attention.{norm}_layernorm.weight" for i in range(2) for norm in "qk"),
}
MUON = {
    *(f"decoder.layers.{i}.self_attention.linear_{name}.weight" for i in range(2) for name in ("qkv", "proj")),
    *(f"decoder.layers.0.mlp.linear_fc{i}.weight" for i in (1, 2)),
    *(f"decoder.layers.1.mlp.experts.linear_fc{i}.weight" for i in (1, 2)),
    *(f"decoder.layers.1.mlp.shared_experts.linear_fc{i}.weight" for i in (1, 2)),
}
UNDECAYED = {key for key in ADAMW_ONLY if "norm" in key or "embedding" in key}


def routes(config: OptimConfig, model=MOE):
    return {t.key: route(t, config) for t in logical_tensors(model) if t.trainable}


def test_muon_takes_hidden_matrices_only():
    config = OptimConfig(kind="muon", lr=1e-3, muon=MuonConfig(lr=2e-2))
    table = routes(config)
    assert {key for key, r in table.items() if r.rule == "muon"} == MUON
    assert {key for key, r in table.items() if r.rule == "adamw"} == ADAMW_ONLY
    assert {r.lr for r in table.values() if r.rule == "muon"} == {2e-2}
    assert {r.lr for r in table.values() if r.rule == "adamw"} == {1e-3}


def test_router_goes_to_muon_on_request():
    table = routes(OptimConfig(kind="muon", routes={"*.router.weight": "muon"}))
    assert {key for key, r in table.items() if r.rule == "muon"} == MUON | {"decoder.layers.1.mlp.router.weight"}


def test_adamw_takes_everything():
    assert {r.rule for r in routes(OptimConfig()).values()} == {"adamw"}


def test_decay_mask():
    table = routes(OptimConfig(kind="muon", weight_decay=0.1))
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
