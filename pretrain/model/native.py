"""Our layer implementations for megatron-core, running wherever torch runs: the `native` backend.

They plug into megatron-core through its BackendSpecProvider: our attention, an RMSNorm that knows about sequence
parallelism, experts with stacked weights. Everything else (parallel linears, dispatcher, layers) is
megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Collection
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
from pretrain.model.stacked_weight import StackedWeight
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


class GroupedExperts(MegatronModule):
    """The routed experts of one layer on this rank, of which some may be frozen.

    trained: the experts that train, by their number in the whole layer; None: all. Gradients flow through the others,
    but have no product, no buffer and no optimizer state for their weights.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        submodules: MLPSubmodules | None = None,
        backend: Literal["auto", "triton", "grouped_mm", "loop"] = "auto",
        trained: Collection[int] | None = None,
    ) -> None:
        super().__init__(config=config)
        self.backend = backend
        self.groups = pg_collection
        self.num_local_experts = num_local_experts
        D, F_local = config.hidden_size, config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        first = num_local_experts * pg_collection.ep.rank()
        trains = [trained is None or first + expert in trained for expert in range(num_local_experts)]
        kind = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.linear_fc1 = StackedWeight(torch.empty(num_local_experts, 2 * F_local, D, **kind), trains)
        self.linear_fc2 = StackedWeight(torch.empty(num_local_experts, D, F_local, **kind), trains)
        mask = None if all(trains) else torch.tensor(trains, device=kind["device"])
        self.register_buffer("trainable", mask, persistent=False)

    def forward(
        self, x_RD: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Rows grouped by local expert -> (their outputs [R, D], no bias). See `swiglu_experts`."""
        routing = Grouped(tokens_per_expert, permuted_probs)
        fc1, fc2 = self.linear_fc1.stack(), self.linear_fc2.stack()
        # megatron-core's DDP sums gradients up in `main_grad` of parameters that train. Added there by the kernel that
        # computes them, they are not written down and read again: 9 to 15 % of a layer's step on an H100.
        parts = self.linear_fc1.trained(), self.linear_fc2.trained()
        accumulate = all(hasattr(weight, "main_grad") for of_one in parts for _, weight in of_one)
        y = swiglu_experts(
            x_RD,
            fc1,
            fc2,
            routing,
            trainable=self.trainable,
            backend=self.backend,
            accumulate_main_grad=accumulate,
            parts=parts if accumulate else None,
        )
        return y, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """The stacked weights as boxes of [E, 2, F, D] and [E, D, F] (see `pretrain.model.logical`), one for each
        parameter."""
        assert not sharded_offsets, "layers are keyed by their number, not stacked"
        ep, etp = self.groups.ep, self.groups.expt_tp
        E, first = self.num_local_experts * ep.size(), self.num_local_experts * ep.rank()
        D, F_all = self.config.hidden_size, self.config.moe_ffn_hidden_size
        F_local = F_all // etp.size()
        f = F_local * etp.rank()
        replica_id = (0, 0, self.groups.expt_dp.rank())
        boxes = {}
        for name, stacked, offset, local, shape in (
            ("linear_fc1", self.linear_fc1, (0, f, 0), (2, F_local, D), (2, F_all, D)),
            ("linear_fc2", self.linear_fc2, (0, f), (D, F_local), (D, F_all)),
        ):
            for start, weight in stacked.parts():
                data = weight.view(len(weight), *local)
                boxes[f"{prefix}{name}.weight@{first + start}"] = ShardedTensor(
                    key=f"{prefix}{name}.weight",
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_shape=(E, *shape),
                    global_offset=(first + start, *offset),
                    axis_fragmentations=None,
                    replica_id=replica_id,
                )
        return boxes


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
