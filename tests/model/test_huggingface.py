"""Our models against transformers' with the same weights: logits, loss, and the gradient of every weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from pretrain.config.schema import Config, ModelConfig
from pretrain.model.logical import logical_tensors
from pretrain.parallel.engine import Engine
from tests.helpers.configs import DENSE, MOE, make_config
from tests.helpers.layouts import engine_of, single_process

B, S = 2, 16
ROPE_THETA = 5000.0

THEIR_CLASSES: dict[type[PretrainedConfig], type[PreTrainedModel]] = {
    LlamaConfig: LlamaForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    MixtralConfig: MixtralForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
}

# Ours, and what differs from the common fields in theirs.
MODELS: dict[str, tuple[Config, type[PretrainedConfig], dict[str, Any]]] = {
    "Llama": (make_config(DENSE), LlamaConfig, {}),
    "Llama, every head its own keys": (make_config(DENSE, {"model.num_query_groups": 4}), LlamaConfig, {}),
    "Qwen3, tied": (
        make_config(DENSE, {"model.tie_embeddings": True, "model.qk_norm": True, "model.head_dim": 12}),
        Qwen3Config,
        {},
    ),
    "Mixtral": (make_config(MOE), MixtralConfig, {"num_local_experts": 8, "intermediate_size": 16}),
    "Qwen3-MoE": (
        make_config(
            MOE,
            {
                "model.qk_norm": True,
                "model.head_dim": 12,
                "model.top_k": 3,
                "model.first_dense_layers": 1,
                "model.ffn_size": 48,
            },
        ),
        Qwen3MoeConfig,
        {"moe_intermediate_size": 16, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "Qwen3-MoE, softmax over all, tied": (
        make_config(MOE, {"model.qk_norm": True, "model.router.normalize_top_k": False, "model.tie_embeddings": True}),
        Qwen3MoeConfig,
        {"moe_intermediate_size": 16, "num_experts": 8, "norm_topk_prob": False},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def world_of_one() -> Iterator[None]:
    with single_process():
        yield


def their_model(model: ModelConfig, config_class: type[PretrainedConfig], fields: dict[str, Any]) -> PreTrainedModel:
    """transformers' model in fp32 with weights that are far from any initialisation, norms included."""
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.channels,
        "intermediate_size": model.ffn_size,
        "num_experts_per_tok": model.top_k,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attn_implementation": "eager",
    }
    config = config_class(**{**common, **fields})
    theirs = THEIR_CLASSES[config_class](config).float()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return theirs


def as_logical(named: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors under transformers' names (weights or gradients) as logical tensors."""
    D, G, C = model.hidden_size, model.query_groups, model.channels
    q = model.num_attention_heads // G
    out = {
        "embedding.word_embeddings.weight": named["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": named["model.norm.weight"],
    }
    if not model.tie_embeddings:
        out["output_layer.weight"] = named["lm_head.weight"]
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        queries, keys, values = (named[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv")
        slots = [queries.view(G, q, C, D), keys.view(G, 1, C, D), values.view(G, 1, C, D)]
        out[f"{ours}.self_attention.linear_qkv.weight"] = torch.cat(slots, dim=1)
        out[f"{ours}.self_attention.linear_proj.weight"] = named[f"{theirs}.self_attn.o_proj.weight"].view(D, G, q, C)
        out[f"{ours}.input_layernorm.weight"] = named[f"{theirs}.input_layernorm.weight"]
        out[f"{ours}.pre_mlp_layernorm.weight"] = named[f"{theirs}.post_attention_layernorm.weight"]
        if model.qk_norm:
            for name in "qk":
                out[f"{ours}.self_attention.{name}_layernorm.weight"] = named[f"{theirs}.self_attn.{name}_norm.weight"]
        mlp = f"{theirs}.mlp"
        if f"{mlp}.gate.weight" in named:
            fused = named[f"{mlp}.experts.gate_up_proj"]
            out[f"{ours}.mlp.router.weight"] = named[f"{mlp}.gate.weight"]
            out[f"{ours}.mlp.experts.linear_fc1.weight"] = fused.unflatten(1, (2, -1))
            out[f"{ours}.mlp.experts.linear_fc2.weight"] = named[f"{mlp}.experts.down_proj"]
        else:
            halves = [named[f"{mlp}.gate_proj.weight"], named[f"{mlp}.up_proj.weight"]]
            out[f"{ours}.mlp.linear_fc1.weight"] = torch.stack(halves)
            out[f"{ours}.mlp.linear_fc2.weight"] = named[f"{mlp}.down_proj.weight"]
    return out


def fill(engine: Engine, values: dict[str, torch.Tensor]) -> None:
    """Give every weight of a single process its logical tensor."""
    assert {shard.key for shard in engine.shards} == values.keys()
    with torch.no_grad():
        for shard in engine.shards:
            assert shard.shape == shard.logical.shape
            shard.view().copy_(values[shard.key])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def differences(name: str, **changes: Any) -> dict[str, float]:
    """Relative error of logits, loss and every gradient; `changes` are made to our model only."""
    config, config_class, fields = MODELS[name]
    theirs = their_model(config.model, config_class, fields)
    named = functools.partial(as_logical, model=config.model)
    batch = config.batch.model_copy(update={"sequence_length": S, "global_batch_size": B, "micro_batch_size": B})
    ours = config.model.model_copy(update={"rope_theta": ROPE_THETA, **changes})
    config = config.model_copy(update={"model": ours, "batch": batch})
    data = torch.randint(0, config.model.vocab_size, (B, S + 1), generator=torch.Generator().manual_seed(3))
    tokens, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    their_logits = theirs(tokens).logits
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    with engine_of(config) as engine:
        fill(engine, named(dict(theirs.named_parameters())))
        with torch.no_grad():
            logits = engine.chunks[0](tokens, torch.arange(S).expand(B, S), None)
        loss = engine.forward_backward(iter([{"tokens": tokens, "labels": labels}]))
        gradients = {shard.key: shard.view(shard.tensor.main_grad).clone() for shard in engine.shards}
    their_gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    expected = named(their_gradients)
    return {
        "logits": relative_error(logits, their_logits),
        "loss": relative_error(loss, their_loss),
        **{key: relative_error(gradients[key], expected[key]) for key in gradients},
    }


# fp32 on both sides; gradients pass four layers twice.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_theirs(name: str) -> None:
    errors = differences(name)
    config = MODELS[name][0]
    assert errors.keys() == {"logits", "loss", *(logical.key for logical in logical_tensors(config.model))}
    assert max(errors.values()) < TOLERANCE, max(errors, key=lambda key: errors[key])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Llama", {"rope_theta": ROPE_THETA * 1.1}),
        ("Llama", {"norm_eps": 1e-2}),
        ("Qwen3-MoE", {"top_k": 2}),
        ("Qwen3-MoE, softmax over all, tied", {"router": MODELS["Qwen3-MoE"][0].model.router}),
    ],
)
def test_another_model_is_noticed(name: str, change: dict[str, Any]) -> None:
    assert differences(name, **change)["logits"] > 100 * TOLERANCE


def test_layer_with_shared_expert_groups_and_bias_is_deepseeks() -> None:
    """DeepSeek-V3's mixture: sigmoid scores, selection bias, 4 groups of which 2 are chosen, scaling, shared expert."""
    config = make_config(
        MOE,
        {
            "model.num_layers": 1,
            "model.top_k": 4,
            "model.shared_expert_ffn_size": 16,
            "model.router": {
                "score_function": "sigmoid",
                "bias_update_rate": 1e-3,
                "num_groups": 4,
                "group_top_k": 2,
                "scaling_factor": 2.5,
            },
        },
    )
    model = config.model
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=model.hidden_size,
            moe_intermediate_size=model.expert_ffn_size,
            n_routed_experts=model.num_experts,
            num_local_experts=model.num_experts,
            num_experts_per_tok=model.top_k,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    ).float()
    generator = torch.Generator().manual_seed(5)
    tensors = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    shared = [tensors["shared_experts.gate_proj.weight"], tensors["shared_experts.up_proj.weight"]]
    values = {
        "router.weight": tensors["gate.weight"],
        "router.expert_bias": tensors["gate.e_score_correction_bias"],
        "experts.linear_fc1.weight": tensors["experts.gate_up_proj"].unflatten(1, (2, -1)),
        "experts.linear_fc2.weight": tensors["experts.down_proj"],
        "shared_experts.linear_fc1.weight": torch.stack(shared),
        "shared_experts.linear_fc2.weight": tensors["shared_experts.down_proj.weight"],
    }
    x = torch.randn(B, S, model.hidden_size, generator=generator)
    with engine_of(config) as engine, torch.no_grad():
        of_layer = {shard.key.removeprefix("decoder.layers.0.mlp."): shard for shard in engine.shards}
        for key, value in values.items():
            of_layer[key].view().copy_(value)
        layer = engine.chunks[0].decoder.layers[0].mlp
        out, bias = layer(x.transpose(0, 1).contiguous())
        assert bias is None
        assert relative_error(out.transpose(0, 1), theirs(x)) < TOLERANCE
        of_layer["router.expert_bias"].tensor.zero_()
        assert relative_error(layer(x.transpose(0, 1).contiguous())[0].transpose(0, 1), theirs(x)) > 0.1
