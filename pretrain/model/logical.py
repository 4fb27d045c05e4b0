"""Logical tensors: every weight of the model as if there were one device, with named axes.

This is the one place that knows how weights are fused and sharded. megatron-core stores gate and up as one
matrix, queries, keys and values interleaved by group, and shards some of them; here each is a tensor whose
named axes undo that, chosen such that *every rank's shard is a contiguous box* of the logical tensor and the
stored parameter is a plain reshape of that box:

    linear_qkv   [G*(q+2)*C, D]  ->  (kv_group G, qkv_slot q+2, head_dim C, hidden D)   slots: q query heads, key, value
    linear_proj  [D, G*q*C]      ->  (hidden, kv_group, head_of_group q, head_dim)
    linear_fc1   [2F, D]         ->  (gate_up 2, ffn F, hidden D)
    expert fc1   [E, 2F, D]      ->  (expert E, gate_up 2, expert_ffn F, hidden D)

Counting, initialisation, optimizer rules, checkpoints and growth see only these.
Letters: D hidden, F ffn, E experts, G key/value groups, q query heads per group, C channels per head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pretrain.config.schema import ModelConfig

MeshAxis = Literal["tensor", "expert", "expert_tensor"]
Kind = Literal["embedding", "output", "norm", "matrix", "router", "router_bias"]


@dataclass(frozen=True)
class LogicalTensor:
    """One unsharded weight (or persistent buffer) of the model."""

    key: str
    """Unique name with the global layer number, e.g. `decoder.layers.3.mlp.experts.linear_fc1.weight`."""
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    sharded: Mapping[str, MeshAxis]
    """Axis name -> parallel dimension that splits it into equal contiguous parts."""
    layer: int | None = None
    """Global layer number, from 0; None outside the decoder layers."""
    fan_in: tuple[str, ...] = ()
    """Axes that the linear map sums over: its inputs."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether the weight belongs to a routed expert, so that expert parallelism spreads it."""
        return "expert" in self.sharded.values()

    @property
    def writes_stream(self) -> bool:
        """Whether it is the last projection of a branch, whose output is added to the residual stream."""
        return self.kind == "matrix" and "hidden" not in self.fan_in

    @property
    def trainable(self) -> bool:
        return self.kind != "router_bias"

    def local_shape(self, sizes: Mapping[MeshAxis, int]) -> tuple[int, ...]:
        """Shape of one rank's shard for the given parallel sizes."""
        return tuple(
            size // sizes.get(self.sharded[axis], 1) if axis in self.sharded else size
            for axis, size in zip(self.axes, self.shape, strict=True)
        )


def _tensor(
    key: str, kind: Kind, layer: int | None, axes: dict[str, int], fan_in: str = "", **sharded: MeshAxis
) -> LogicalTensor:
    return LogicalTensor(key, tuple(axes), tuple(axes.values()), kind, sharded, layer, tuple(fan_in.split()))


def logical_tensors(model: ModelConfig) -> Iterator[LogicalTensor]:
    """Every tensor of the model in the order of the forward pass, selection biases included."""
    D, V = model.hidden_size, model.vocab_size
    yield _tensor("embedding.word_embeddings.weight", "embedding", None, {"vocab": V, "hidden": D}, vocab="tensor")
    for layer in range(model.num_layers):
        yield from _attention_tensors(model, layer)
        if model.is_moe_layer(layer):
            yield from _moe_tensors(model, layer)
        else:
            yield from _swiglu_tensors(f"decoder.layers.{layer}.mlp", layer, "ffn", model.ffn_size, D)
    yield _tensor("decoder.final_layernorm.weight", "norm", None, {"hidden": D})
    if not model.tie_embeddings:
        yield _tensor("output_layer.weight", "output", None, {"vocab": V, "hidden": D}, "hidden", vocab="tensor")


def _attention_tensors(model: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    D, G, C = model.hidden_size, model.query_groups, model.channels
    q = model.num_attention_heads // G
    prefix = f"decoder.layers.{layer}"
    yield _tensor(f"{prefix}.input_layernorm.weight", "norm", layer, {"hidden": D})
    yield _tensor(
        f"{prefix}.self_attention.linear_qkv.weight",
        "matrix",
        layer,
        {"kv_group": G, "qkv_slot": q + 2, "head_dim": C, "hidden": D},
        "hidden",
        kv_group="tensor",
    )
    if model.qk_norm:
        yield _tensor(f"{prefix}.self_attention.q_layernorm.weight", "norm", layer, {"head_dim": C})
        yield _tensor(f"{prefix}.self_attention.k_layernorm.weight", "norm", layer, {"head_dim": C})
    yield _tensor(
        f"{prefix}.self_attention.linear_proj.weight",
        "matrix",
        layer,
        {"hidden": D, "kv_group": G, "head_of_group": q, "head_dim": C},
        "kv_group head_of_group head_dim",
        kv_group="tensor",
    )
    yield _tensor(f"{prefix}.pre_mlp_layernorm.weight", "norm", layer, {"hidden": D})


def _swiglu_tensors(prefix: str, layer: int, ffn_axis: str, F: int, D: int) -> Iterator[LogicalTensor]:
    split: dict[str, MeshAxis] = {ffn_axis: "tensor"}
    fc1 = {"gate_up": 2, ffn_axis: F, "hidden": D}
    yield _tensor(f"{prefix}.linear_fc1.weight", "matrix", layer, fc1, "hidden", **split)
    yield _tensor(f"{prefix}.linear_fc2.weight", "matrix", layer, {"hidden": D, ffn_axis: F}, ffn_axis, **split)


def _moe_tensors(model: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    D, E, F = model.hidden_size, model.num_experts, model.expert_ffn_size
    prefix = f"decoder.layers.{layer}.mlp"
    yield _tensor(f"{prefix}.router.weight", "router", layer, {"expert": E, "hidden": D}, "hidden")
    if model.router.bias_update_rate > 0:
        yield _tensor(f"{prefix}.router.expert_bias", "router_bias", layer, {"expert": E})
    yield _tensor(
        f"{prefix}.experts.linear_fc1.weight",
        "matrix",
        layer,
        {"expert": E, "gate_up": 2, "expert_ffn": F, "hidden": D},
        "hidden",
        expert="expert",
        expert_ffn="expert_tensor",
    )
    yield _tensor(
        f"{prefix}.experts.linear_fc2.weight",
        "matrix",
        layer,
        {"expert": E, "hidden": D, "expert_ffn": F},
        "expert_ffn",
        expert="expert",
        expert_ffn="expert_tensor",
    )
    if model.shared_expert_ffn_size:
        yield from _swiglu_tensors(f"{prefix}.shared_experts", layer, "shared_ffn", model.shared_expert_ffn_size, D)
