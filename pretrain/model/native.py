"""Our layer implementations for megatron-core, running wherever torch runs: the `native` backend.

They plug into megatron-core through its BackendSpecProvider: our attention, an RMSNorm that knows about sequence
parallelism, experts with stacked weights. Everything else (parallel linears, dispatcher, layers) is
megatron-core's own.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.model.attention import causal_attention
from pretrain_kernels import Grouped, swiglu_experts


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose gain tells megatron-core to sum its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """Causal grouped-query attention; see `causal_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, config.context_parallel_size
        assert attn_mask_type is AttnMaskType.causal, attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """query [S, B, H, C], key and value [S, B, G, C] -> [S, B, H*C]; the mask is always causal."""
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        return causal_attention(query, key, value, scale=self.softmax_scale)


class StackedWeight(torch.nn.Module):
    """The same projection of every local expert as one parameter [E, out, in]."""

    def __init__(self, shape: tuple[int, int, int], config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # megatron-core's mark for gradients that are reduced over the expert data-parallel group. Set at every
        # expert-parallel size: with expert tensor parallelism the groups differ even when that size is 1.
        self.weight.allreduce = False  # type: ignore[attr-defined]


class GroupedExperts(MegatronModule):
    """The routed experts of one layer on this rank."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        submodules: MLPSubmodules | None = None,
        backend: Literal["auto", "triton", "grouped_mm", "loop"] = "auto",
    ) -> None:
        super().__init__(config=config)
        self.backend = backend
        self.groups = pg_collection
        self.num_local_experts = num_local_experts
        D, F_local = config.hidden_size, config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = StackedWeight((num_local_experts, 2 * F_local, D), config)
        self.linear_fc2 = StackedWeight((num_local_experts, D, F_local), config)

    def forward(
        self, x_RD: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Rows grouped by local expert -> (their outputs [R, D], no bias). See `swiglu_experts`."""
        routing = Grouped(tokens_per_expert, permuted_probs)
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        return swiglu_experts(x_RD, fc1, fc2, routing, backend=self.backend), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """The stacked weights as boxes of [E, 2, F, D] and [E, D, F] (see `pretrain.model.logical`)."""
        assert not sharded_offsets, "layers are keyed by their number, not stacked"
        E_local, D, F_local = self.linear_fc2.weight.shape
        ep, etp = self.groups.ep, self.groups.expt_tp
        E, F_all = E_local * ep.size(), F_local * etp.size()
        e, f = E_local * ep.rank(), F_local * etp.rank()
        replica_id = (0, 0, self.groups.expt_dp.rank())

        def box(
            name: str, weight: torch.Tensor, shape: tuple[int, ...], offset: tuple[int, ...], local: tuple[int, ...]
        ) -> ShardedTensor:
            fragments = tuple(g // s for g, s in zip(shape, local, strict=True))
            key = f"{prefix}{name}.weight"
            data = weight.view(local)
            return ShardedTensor(key, data, data.dtype, local, shape, offset, fragments, replica_id)

        boxes = (
            box("linear_fc1", self.linear_fc1.weight, (E, 2, F_all, D), (e, 0, f, 0), (E_local, 2, F_local, D)),
            box("linear_fc2", self.linear_fc2.weight, (E, D, F_all), (e, 0, f), (E_local, D, F_local)),
        )
        return {tensor.key: tensor for tensor in boxes}


class NativeBackend(BackendSpecProvider):
    """Which module megatron-core uses for which role."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        return None

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CausalAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules | None]:
        return GroupedExperts, None

    def activation_func(self) -> None:
        return None
