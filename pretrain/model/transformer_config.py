"""Our model and layout in megatron-core's words: a TransformerConfig."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config.schema import ModelConfig, ParallelConfig

# Router keys of our configuration and megatron-core's names for the losses they weigh.
AUX_LOSSES = {"aux_loss": "aux_loss", "sequence_aux_loss": "seq_aux_loss", "global_aux_loss": "global_aux_loss"}


def compute_dtype(precision: str) -> torch.dtype:
    """Data type of weights and activations for `run.precision`."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def transformer_config(model: ModelConfig, parallel: ParallelConfig, precision: str) -> TransformerConfig:
    """megatron-core's configuration for one rank's layers."""
    dtype = compute_dtype(precision)
    with warnings.catch_warnings():
        # megatron-core warns that recomputing attention is needless where it is fused, which we know.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as")
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_size or model.expert_ffn_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            kv_channels=model.channels,
            qk_layernorm=model.qk_norm,
            layernorm_epsilon=model.norm_eps,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            # `initialise` draws the logical weights; megatron-core's own draw depends on the layout.
            perform_initialization=False,
            tensor_model_parallel_size=parallel.tensor,
            sequence_parallel=parallel.tensor > 1,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.pipeline_chunks if parallel.pipeline_chunks > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            # The interleaved schedule of two stages sends forward and backward to the same neighbour. Batched sends are
            # told apart by their order alone and get mixed up; overlapped ones go through two groups.
            overlap_p2p_comm=parallel.pipeline_chunks > 1,
            batch_p2p_comm=parallel.pipeline_chunks == 1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            # Fusions below need CUDA extensions that megatron-core does not ship in its wheel.
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            **_recompute_fields(parallel, is_moe=model.is_moe),
            **(_moe_fields(model) if model.is_moe else {}),
        )


def _recompute_fields(parallel: ParallelConfig, *, is_moe: bool) -> dict[str, object]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "moe"] if is_moe else ["core_attn"],
        }
    return {}


def _moe_fields(model: ModelConfig) -> dict[str, object]:
    router = model.router
    losses = {theirs: getattr(router, ours) for ours, theirs in AUX_LOSSES.items() if getattr(router, ours) > 0}
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_router_topk": model.top_k,
        "moe_layer_freq": [int(model.is_moe_layer(layer)) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": model.shared_expert_ffn_size or None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": router.score_function,
        "moe_router_pre_softmax": router.score_function == "softmax" and not router.normalize_top_k,
        "moe_router_topk_scaling_factor": router.scaling_factor if router.scaling_factor != 1.0 else None,
        "moe_router_num_groups": router.num_groups or None,
        "moe_router_group_topk": router.group_top_k or None,
        "moe_router_load_balancing_type": list(losses) if losses else "none",
        "moe_aux_loss_coeff": list(losses.values()) if losses else 0.0,
        "moe_z_loss_coeff": router.z_loss or None,
        "moe_router_enable_expert_bias": router.bias_update_rate > 0,
        "moe_router_bias_update_rate": router.bias_update_rate,
    }
