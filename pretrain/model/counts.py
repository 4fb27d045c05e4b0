"""Parameters and FLOPs of a model, counted on its logical tensors.

Conventions, stated once:

- Parameters are the trained weights; selection biases of the router are buffers and not counted.
- *Active* counts a routed expert's weights top_k / num_experts times and everything else in full: the router, and
  each embedding table once (a tied table is one table), as published counts of active parameters do.
- *Non-embedding* counts weight matrices outside the embedding and the output layer; norm gains are left out, as in
  the scaling-law studies that give 20 tokens to each non-embedding parameter.
- FLOPs of training are 3 times the forward pass, 2 per multiply-add of each active matrix including the output layer
  (the embedding lookup multiplies nothing). Attention scores and their product with the values count half of the
  full S x S square, which is what a causal kernel computes. Recomputation does not count: these are the
  FLOPs of the model, not of the hardware. `flops_6nd` is the papers' 6 * active parameters per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.rules import Layout
from pretrain.config.schema import BatchConfig, ModelConfig
from pretrain.model.logical import LogicalTensor, logical_tensors

PARTS = ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms", "output")


@dataclass(frozen=True)
class ParameterCounts:
    """Trained weights of a model, by the conventions of this module."""

    total: int
    active: int
    non_embedding: int
    active_non_embedding: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training on one token, forward and backward."""

    per_token: int
    per_token_full_attention: int
    """With the whole S x S square of attention scores counted, as a kernel that only masks computes it."""
    per_token_6nd: int


def part(tensor: LogicalTensor) -> str:
    """Which of PARTS a trained weight belongs to."""
    by_kind = {"embedding": "embedding", "output": "output", "norm": "norms", "router": "router"}
    by_axis = {"expert": "routed_experts", "shared_ffn": "shared_experts", "ffn": "dense_ffn", "kv_group": "attention"}
    if tensor.kind in by_kind:
        return by_kind[tensor.kind]
    return next(name for axis, name in by_axis.items() if axis in tensor.axes)


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the trained weights."""
    by_part = dict.fromkeys(PARTS, 0)
    for tensor in logical_tensors(model):
        if tensor.trainable:
            by_part[part(tensor)] += tensor.numel
    total = sum(by_part.values())
    outside = by_part["embedding"] + by_part["output"] + by_part["norms"]
    idle = _idle_experts(model, by_part["routed_experts"])
    return ParameterCounts(
        total=total,
        active=total - idle,
        non_embedding=total - outside,
        active_non_embedding=total - outside - idle,
        by_part=by_part,
    )


def _idle_experts(model: ModelConfig, routed: int) -> int:
    """Weights of the experts a token does not pass."""
    return routed * (model.num_experts - model.top_k) // model.num_experts if model.is_moe else 0


def count_flops(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs per trained token at one sequence length."""
    counts = count_parameters(model)
    matrices = counts.active_non_embedding + model.vocab_size * model.hidden_size
    # Scores and values: a multiply-add per channel, head and earlier position each.
    attention = 2 * 2 * sequence_length * model.num_attention_heads * model.channels * model.num_layers
    return Flops(
        per_token=3 * (2 * matrices + attention // 2),
        per_token_full_attention=3 * (2 * matrices + attention),
        per_token_6nd=6 * counts.active,
    )


def tokens_per_expert(model: ModelConfig, tokens: int) -> float:
    """Rows one expert computes when `tokens` are spread evenly over the experts."""
    return tokens * model.top_k / model.num_experts if model.is_moe else 0.0


def local_tokens(batch: BatchConfig, layout: Layout) -> int:
    """T: tokens of one micro-batch outside attention on one rank, cut by context and sequence parallelism."""
    return batch.micro_batch_size * batch.sequence_length // (layout.tensor * layout.context)
