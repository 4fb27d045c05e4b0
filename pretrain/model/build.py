"""Build this rank's part of the model: one megatron-core GPTModel per pipeline chunk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from pretrain.config.schema import ModelConfig, ParallelConfig
from pretrain.errors import ConfigError
from pretrain.model import transformer_engine
from pretrain.model.native import NativeBackend
from pretrain.model.router import CountingRouter, PlainSigmoidRouter
from pretrain.model.transformer_config import compute_dtype, transformer_config
from pretrain_kernels import BackendError, check_backend
from pretrain_kernels import choose_backend as choose_products


def choose_backend(model: ModelConfig, parallel: ParallelConfig) -> BackendSpecProvider:
    """The layer implementations for `model.backend` on this machine; a ConfigError where they do not fit the layout."""
    use_te = torch.cuda.is_available() and transformer_engine.is_available()
    if model.backend == "transformer_engine" or (model.backend == "auto" and use_te):
        return transformer_engine.backend()
    if parallel.context > 1:
        raise ConfigError(
            [
                f'parallel.context = {parallel.context}: needs model.backend = "transformer_engine" and a GPU; '
                "set them up, or parallel.context = 1"
            ]
        )
    return NativeBackend()


def choose_experts_backend(model: ModelConfig, parallel: ParallelConfig, precision: str) -> str:
    """What `model.experts_backend` stands for on this machine, or "transformer_engine" where that has the experts.

    Raises:
        ConfigError: the backend asked for does not take the device, the precision or the widths, in one line.
    """
    asked = model.experts_backend
    if not isinstance(choose_backend(model, parallel), NativeBackend):
        if asked != "auto":
            raise ConfigError(
                [
                    f'model.experts_backend = "{asked}": Transformer Engine has experts of its own; '
                    'set model.backend = "native", or model.experts_backend = "auto"'
                ]
            )
        return "transformer_engine"
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype, D, F = compute_dtype(precision), model.hidden_size, model.expert_ffn_size // parallel.expert_tensor
    if asked == "auto":
        return choose_products(device, dtype, D, F)
    try:
        check_backend(asked, device, dtype, D, F)
    except BackendError as error:
        raise ConfigError([f'model.experts_backend = "{asked}": {error}']) from error
    return asked


def build_chunks(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    precision: str,
    sequence_length: int,
    groups: ProcessGroupCollection,
    trained: Collection[int] | None = None,
) -> list[GPTModel]:
    """This rank's pipeline chunks, in order, with uninitialised weights (see `pretrain.model.initialise`).

    trained: the experts of each layer that train, the others are frozen; None: all train.

    Raises:
        ConfigError: the backend does not fit, see `choose_backend` and `choose_experts_backend`, or knows no frozen
            experts.
    """
    config = transformer_config(model, parallel, precision)
    backend = choose_backend(model, parallel)
    experts = _expert_parameters(model, parallel, precision, trained) if model.is_moe else {}
    stage, stages, chunks = groups.pp.rank(), groups.pp.size(), parallel.pipeline_chunks
    built = []
    for chunk in range(chunks):
        vp_stage = chunk if chunks > 1 else None
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(model, config, backend, experts, vp_stage=vp_stage, stage=stage),
            vocab_size=model.vocab_size,
            max_sequence_length=sequence_length,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == stages - 1 and chunk == chunks - 1,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if gpt.post_process and model.logit_scale != 1.0:
            # On the input of the output layer, which is smaller than its output and differs by nothing else.
            gpt.output_layer.register_forward_pre_hook(partial(_scale_input, scale=model.logit_scale))
        built.append(gpt)
    return built


def _expert_parameters(
    model: ModelConfig, parallel: ParallelConfig, precision: str, trained: Collection[int] | None
) -> dict[str, object]:
    """What our experts are made with; Transformer Engine's take nothing of it."""
    backend = choose_experts_backend(model, parallel, precision)
    if backend != "transformer_engine":
        return {"backend": backend, "trained": trained}
    if trained is not None:
        raise ConfigError(
            [
                f'model.backend = "{model.backend}": Transformer Engine cannot freeze a part of the experts; set '
                'model.backend = "native"'
            ]
        )
    return {}


def _scale_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], *, scale: float) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook that multiplies the first input of a module."""
    hidden, *rest = inputs
    return hidden * scale, *rest


def _block_spec(
    model: ModelConfig,
    config: TransformerConfig,
    backend: BackendSpecProvider,
    experts: Mapping[str, object],
    *,
    vp_stage: int | None,
    stage: int,
) -> TransformerBlockSubmodules:
    """Specs of the layers in one chunk of one stage."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
    numbers = range(first, first + count)
    layers = [_layer_spec(model, backend, experts, is_moe=model.is_moe_layer(number)) for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True))


def _layer_spec(
    model: ModelConfig, backend: BackendSpecProvider, experts: Mapping[str, object], *, is_moe: bool
) -> ModuleSpec:
    """One decoder layer: pre-norm attention and pre-norm MLP or experts."""
    fused_norm = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=True)
    qk_norm = backend.layer_norm(rms_norm=True, for_qk=True) if model.qk_norm else IdentityOp
    mlp = get_mlp_module_spec_for_backend(
        backend, num_experts=model.num_experts if is_moe else None, moe_grouped_gemm=True
    )
    if is_moe:
        mlp.submodules.experts.params.update(experts)
        plain_sigmoid = model.router.score_function == "sigmoid" and not model.router.normalize_top_k
        mlp.submodules.router = PlainSigmoidRouter if plain_sigmoid else CountingRouter
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused_norm else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_layer_norm_linear()
                    if fused_norm
                    else backend.column_parallel_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # TE fuses the norm into a dense MLP's first projection, but never into experts.
            pre_mlp_layernorm=IdentityOp if fused_norm and not is_moe else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
