"""A small megatron-core GPT with mixture-of-experts layers, trained for one step on whatever ranks there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES, LAYERS = 64, 16, 2, 4, 4


def transformer_config(**changes: Any) -> TransformerConfig:
    """Configuration of the small model; `changes` override its fields."""
    fields: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 32,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 1e-2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**{**fields, **changes})


def build(config: TransformerConfig, *, tied: bool = False) -> list[GPTModel]:
    """This rank's chunks, with weights that depend on the logical name alone."""
    chunks_per_rank = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for index in range(chunks_per_rank):
        stage = index if chunks_per_rank > 1 else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
            ),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            vp_stage=stage,
        )
        for name, parameter in logical_parameters(chunk).items():
            seed = sum(ord(letter) * 31**place % 1_000_003 for place, letter in enumerate(name))
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_(noise * 0.1 + (parameter.dim() == 1))
        chunks.append(chunk)
    return chunks


def logical_parameters(chunk: GPTModel) -> Mapping[str, torch.nn.Parameter]:
    """Parameters by a name that counts layers over the whole model."""
    named = {}
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        # A tied output layer on another stage than the embedding is a copy of it.
        tied = parts[0] == "output_layer" and chunk.share_embeddings_and_output_weights
        named["embedding.word_embeddings.weight" if tied else ".".join(parts)] = parameter
    return named


def _forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    losses = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return losses, mean


def one_step(
    layout: Mapping[str, int], *, overlap_grad_reduce: bool = False, tied: bool = False, **changes: Any
) -> dict[str, Any]:
    """Gradients by logical name, and losses, of one global batch.

    Args:
        layout: sizes for initialize_model_parallel.
        changes: fields of the model's configuration.
    """
    parallel_state.initialize_model_parallel(**layout)
    try:
        return _one_step(layout, overlap_grad_reduce=overlap_grad_reduce, tied=tied, **changes)
    finally:
        parallel_state.destroy_model_parallel()


def _one_step(layout: Mapping[str, int], *, overlap_grad_reduce: bool, tied: bool, **changes: Any) -> dict[str, Any]:
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    config = transformer_config(**{**layout, **changes})
    chunks = build(config, tied=tied)
    settings = DistributedDataParallelConfig(overlap_grad_reduce=overlap_grad_reduce, grad_reduce_in_fp32=True)
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    tokens = torch.randint(
        0, VOCAB, (MICRO_BATCHES, MICRO_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(3)
    )
    iterators = [iter(tokens) for _ in wrapped]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    gradients = {
        name: parameter.main_grad.clone() for chunk in chunks for name, parameter in logical_parameters(chunk).items()
    }
    return {"gradients": gradients, "losses": [output["loss"] for output in outputs]}
