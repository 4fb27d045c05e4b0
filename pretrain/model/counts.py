"""Parameters, FLOPs and memory of a model, counted on its logical tensors.

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

Letters: B micro-batch, S sequence, T = tokens of a micro-batch on one rank, D hidden, F ffn, E experts, K top-k, H
heads, G key/value groups, C channels per head, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.config.rules import Layout
from pretrain.config.schema import BatchConfig, Config, ModelConfig, OptimConfig
from pretrain.model.logical import LogicalTensor, MeshAxis, logical_tensors

PARTS = ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms", "output")

FP32_BYTES = 4
BYTES_PER_VALUE = {"bf16": 2, "fp32": FP32_BYTES}


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


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. Not in it: communication buffers, allocator fragmentation, the CUDA context."""

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


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


def rank_memory(config: Config, layout: Layout) -> RankMemory:
    """Memory of the pipeline rank that needs the most."""
    return max(
        (_stage_memory(config, layout, rank) for rank in range(layout.pipeline)), key=lambda memory: memory.total
    )


def _stage_memory(config: Config, layout: Layout, rank: int) -> RankMemory:
    sizes: dict[MeshAxis, int] = {
        "tensor": layout.tensor,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
    }
    tensors = _stage_tensors(config.model, layout, rank)
    local = [(tensor, math.prod(tensor.local_shape(sizes))) for tensor in tensors]
    numel = sum(size for _, size in local)
    width = BYTES_PER_VALUE[config.run.precision]
    return RankMemory(
        pipeline_rank=rank,
        weights=width * numel,
        gradients=FP32_BYTES * numel,  # gradients are summed over micro-batches and ranks in fp32
        optimizer=_optimizer_bytes(config, layout, local),
        activations=_activation_bytes(config, layout, rank),
        logits=_logit_bytes(config, layout, rank),
    )


def _stage_tensors(model: ModelConfig, layout: Layout, rank: int) -> list[LogicalTensor]:
    """Trained weights on one pipeline rank; a tied embedding has a copy where the output layer is."""
    layers = set(layout.stage_layers(rank))
    first, last = rank == 0, rank == layout.pipeline - 1

    def held(tensor: LogicalTensor) -> bool:
        if tensor.layer is not None:
            return tensor.layer in layers
        if tensor.kind == "embedding":
            return first or (last and model.tie_embeddings)
        return last

    return [tensor for tensor in logical_tensors(model) if tensor.trainable and held(tensor)]


def _optimizer_bytes(config: Config, layout: Layout, local: Iterable[tuple[LogicalTensor, int]]) -> int:
    """Masters and moments on the data-parallel rank that owns the most.

    Each shard is owned whole by one rank of the group that replicates it, dealt largest first to the emptiest. (With
    Muon the optimizer deals by arithmetic first; for equal matrices that is the same.)
    """
    master = FP32_BYTES if config.run.precision == "bf16" else 0  # fp32 weights are their own masters
    dense: list[int] = []
    expert: list[int] = []
    for tensor, numel in local:
        state = numel * (master + FP32_BYTES * _moments(tensor, config.optim))
        (expert if tensor.is_expert else dense).append(state)
    return _largest_share(dense, layout.data_parallel * layout.context) + _largest_share(
        expert, layout.expert_data_parallel
    )


def _moments(tensor: LogicalTensor, optim: OptimConfig) -> int:
    """fp32 values of optimizer state per weight: AdamW keeps two moments, Muon its momentum."""
    muon = optim.kind == "muon" and (tensor.kind == "matrix" or (tensor.kind == "router" and optim.muon.router))
    return 1 if muon else 2


def _largest_share(sizes: Iterable[int], owners: int) -> int:
    loads = [0] * owners
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)


def _activation_bytes(config: Config, layout: Layout, rank: int) -> int:
    """Activations kept for the backward pass, over all micro-batches in flight, and the layer being recomputed.

    After Korthikanti et al. 2022 (arXiv 2205.05198, sections 4 and 5), with sequence parallelism, a fused attention
    that keeps no scores, no dropout, and grouped queries, SwiGLU and routed experts in place of their layer. Values
    are those autograd keeps in the native backend on a GPU; RMSNorm and short attention on CPUs keep more.
    """
    model, recompute = config.model, config.parallel.recompute
    width = BYTES_PER_VALUE[config.run.precision]
    tokens = local_tokens(config.batch, layout)
    layers = layout.stage_layers(rank)
    whole = [_layer_bytes_per_token(model, layout, layer, width) for layer in layers]
    inside = [_moe_bytes_per_token(model, layout, width) if model.is_moe_layer(layer) else 0 for layer in layers]
    if recompute == "full":
        kept, again = [model.hidden_size * width] * len(layers), max(whole)
    elif recompute == "selective":
        kept, again = [w - i for w, i in zip(whole, inside, strict=True)], max(inside)
    else:
        kept, again = whole, 0
    # In flight are whole chunks; the chunks of a rank differ only where dense and MoE layers mix.
    in_flight = _chunks_in_flight(layout, rank) / layout.pipeline_chunks
    return math.ceil(tokens * (sum(kept) * in_flight + again))


def _chunks_in_flight(layout: Layout, rank: int) -> int:
    """Forward passes through one model chunk that wait for their backward pass, at the most.

    1F1B holds P - rank micro-batches on stage `rank`; interleaved with v chunks, megatron-core starts
    2 (P - rank - 1) + (v - 1) P of them before its steady state of one forward, one backward.
    """
    behind = layout.pipeline - rank - 1
    if layout.pipeline_chunks == 1:
        return min(behind + 1, layout.microbatches)
    warm_up = 2 * behind + (layout.pipeline_chunks - 1) * layout.pipeline
    return min(warm_up + 1, layout.microbatches * layout.pipeline_chunks)


def _layer_bytes_per_token(model: ModelConfig, layout: Layout, layer: int, width: int) -> int:
    """Kept by one layer per token of T. The 1 / tensor of head and ffn shards cancels against T, which has it, too."""
    D, F = model.hidden_size, model.ffn_size
    H, G, C = model.num_attention_heads, model.query_groups, model.channels
    norms = 2 * (D + D)  # input and output of both; an output is the input of the projections behind it
    # The fused projection (values stay a view of it), rotated queries and keys, what attention returns.
    heads = (H + 2 * G) * C + (H + G) * C + H * C
    if model.qk_norm:
        heads += H * C  # queries before their norm; keys are a view of the projection
    ffn = 0 if model.is_moe_layer(layer) else _swiglu_values(F)
    moe = _moe_bytes_per_token(model, layout, width) if model.is_moe_layer(layer) else 0
    log_sums = H * FP32_BYTES  # of the scores of each head
    return width * (norms + heads + ffn) + log_sums + moe


def _swiglu_values(F: int) -> int:
    """Gate and up fused, silu(gate), up, and the product that enters the down projection, of a dense MLP."""
    return 5 * F


def _moe_bytes_per_token(model: ModelConfig, layout: Layout, width: int) -> int:
    """Kept inside the MoE block, with tokens spread evenly over the expert-parallel ranks."""
    D, E, K, F = model.hidden_size, model.num_experts, model.top_k, model.expert_ffn_size
    router = 2 * E * FP32_BYTES  # logits and scores
    # A routed row enters every rank of its expert tensor group whole. Of its MLP only gate and up are kept.
    rows = K * (layout.expert_tensor * D + 2 * F) * width
    return router + rows + _swiglu_values(model.shared_expert_ffn_size) * width


def _logit_bytes(config: Config, layout: Layout, rank: int) -> int:
    """Logits of one micro-batch in the precision of the run and their softmax in fp32, on the last stage."""
    if rank != layout.pipeline - 1:
        return 0
    width = BYTES_PER_VALUE[config.run.precision]
    # Sequence parallelism ends before the output layer: each rank has all tokens and a part of the vocabulary.
    return local_tokens(config.batch, layout) * config.model.vocab_size * (width + FP32_BYTES)
