"""The peer outside megatron-core: Hugging Face transformers' Qwen3-MoE with torch's AdamW, in a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from pretrain.bench.variants import Step, Weights
from pretrain.config.schema import Config, ModelConfig
from pretrain.model.transformer_config import compute_dtype
from pretrain.parallel.engine import Batch
from pretrain.parallel.mesh import Mesh


def qwen3_moe(config: Config, mesh: Mesh, batches: Iterator[Batch], weights: Weights) -> Step:
    """Its default layers (SDPA attention, grouped products in the experts) and torch's fused AdamW.

    In bf16 everything is bf16, weights and moments included: its fastest way, with less to do than ours, which keeps
    fp32 masters. Under autocast, its experts stay in fp32.
    """
    dtype = compute_dtype(config.run.precision)
    model = transformers.AutoModelForCausalLM.from_config(_qwen3_config(config), dtype=dtype)
    model.load_state_dict(_state_dict(config.model, weights), strict=True)
    model = model.to(mesh.device).train()
    optim = config.optim
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    norms = [parameter for parameter in parameters if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )

    def step() -> float:
        batch = next(batches)
        # Our labels are shifted already.
        loss = model(input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _qwen3_config(config: Config) -> transformers.Qwen3MoeConfig:
    model = config.model
    return transformers.Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups,
        head_dim=model.channels,
        max_position_embeddings=config.batch.sequence_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        moe_intermediate_size=model.expert_ffn_size,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.router.normalize_top_k,
        use_cache=False,
    )


def _state_dict(model: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    """Our logical tensors under transformers' names and in its shapes."""
    D = model.hidden_size
    q = model.num_attention_heads // model.query_groups
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = weights[f"{ours}.self_attention.linear_qkv.weight"]  # [groups, q + 2, channels, D]
        for name, part in (("q", qkv[:, :q]), ("k", qkv[:, q]), ("v", qkv[:, q + 1])):
            state[f"{theirs}.self_attn.{name}_proj.weight"] = part.reshape(-1, D)
        for name in ("q", "k"):
            state[f"{theirs}.self_attn.{name}_norm.weight"] = weights[f"{ours}.self_attention.{name}_layernorm.weight"]
        state[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.self_attention.linear_proj.weight"].flatten(1)
        state[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.input_layernorm.weight"]
        state[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.pre_mlp_layernorm.weight"]
        state[f"{theirs}.mlp.gate.weight"] = weights[f"{ours}.mlp.router.weight"]
        state[f"{theirs}.mlp.experts.gate_up_proj"] = weights[f"{ours}.mlp.experts.linear_fc1.weight"].flatten(1, 2)
        state[f"{theirs}.mlp.experts.down_proj"] = weights[f"{ours}.mlp.experts.linear_fc2.weight"]
    return state
