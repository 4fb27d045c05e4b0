"""Memory of a rank: weights, gradients, optimizer state, activations and logits, from the configuration alone.

Letters: B micro-batch, S sequence, T = tokens of a micro-batch on one rank, D hidden, F ffn, E experts, K top-k, H
heads, G key/value groups, C channels per head, V vocabulary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain.config.ownership import trained_experts
from pretrain.config.rules import Layout
from pretrain.config.schema import Config, ModelConfig
from pretrain.model.counts import local_tokens
from pretrain.model.logical import LogicalTensor, MeshAxis, logical_tensors
from pretrain.optim.routing import route
from pretrain.optim.states import state_numel, states_of

FP32_BYTES = 4
BYTES_PER_VALUE = {"bf16": 2, "fp32": FP32_BYTES}


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


def rank_memory(config: Config, layout: Layout) -> RankMemory:
    """Memory of the pipeline rank that needs the most."""
    return max(
        (_stage_memory(config, layout, rank) for rank in range(layout.pipeline)), key=lambda memory: memory.total
    )


def _stage_memory(config: Config, layout: Layout, rank: int) -> RankMemory:
    tensors = _stage_tensors(config.model, layout, rank)
    boxes = trained_boxes(config, layout, rank)
    width = BYTES_PER_VALUE[config.run.precision]
    return RankMemory(
        pipeline_rank=rank,
        weights=width * sum(math.prod(tensor.local_shape(shard_sizes(layout))) for tensor in tensors),
        gradients=FP32_BYTES * sum(box.numel for box in boxes),  # summed over micro-batches and ranks in fp32
        optimizer=_optimizer_bytes(layout, boxes),
        activations=_activation_bytes(config, layout, rank),
        logits=_logit_bytes(config, layout, rank),
    )


def shard_sizes(layout: Layout) -> dict[MeshAxis, int]:
    """How many parts each parallel dimension cuts its axes into."""
    return {"tensor": layout.tensor, "expert": layout.expert, "expert_tensor": layout.expert_tensor}


def _stage_tensors(model: ModelConfig, layout: Layout, rank: int) -> list[LogicalTensor]:
    """Weights on one pipeline rank; a tied embedding has a copy where the output layer is."""
    layers = set(layout.stage_layers(rank))
    first, last = rank == 0, rank == layout.pipeline - 1

    def held(tensor: LogicalTensor) -> bool:
        if tensor.layer is not None:
            return tensor.layer in layers
        if tensor.kind == "embedding":
            return first or (last and model.tie_embeddings)
        return last

    return [tensor for tensor in logical_tensors(model) if tensor.trainable and held(tensor)]


@dataclass(frozen=True)
class Box:
    """The part of a logical tensor that is one trained parameter of a rank."""

    numel: int
    state_bytes: int
    """Master and states, on the rank that owns it."""
    is_expert: bool


def trained_boxes(config: Config, layout: Layout, rank: int) -> list[Box]:
    """What one pipeline rank trains; under `decentral.kind = "spes"` each of its site's experts is a box of its own."""
    trained = trained_experts(config)
    boxes = []
    for tensor in _stage_tensors(config.model, layout, rank):
        shape, count = tensor.local_shape(shard_sizes(layout)), 1
        if tensor.is_expert and trained is not None:
            # Every expert-parallel rank has as many of them.
            count = len(trained) // layout.expert
            shape = tuple(1 if axis == "expert" else size for axis, size in zip(tensor.axes, shape, strict=True))
        boxes += [_box(config, tensor, shape)] * count
    return boxes


def _box(config: Config, tensor: LogicalTensor, shape: Sequence[int]) -> Box:
    states = states_of(tensor, route(tensor, config.optim).rule, config.optim)
    master = config.run.precision == "bf16"  # fp32 weights are their own masters
    values = master * math.prod(shape) + state_numel(states, tensor, shape)
    return Box(math.prod(shape), FP32_BYTES * values, tensor.is_expert)


def owned_boxes(layout: Layout, boxes: Iterable[Box], *, experts: bool) -> list[list[Box]]:
    """The boxes of each data-parallel rank, dense ones or those of experts.

    Each is owned whole by one rank of the group that replicates it, dealt largest first to the emptiest. (What needs
    arithmetic, as Muon's matrices, the optimizer deals by that first; for equal matrices that is the same.)
    """
    owners = layout.expert_data_parallel if experts else layout.data_parallel * layout.context
    owned: list[list[Box]] = [[] for _ in range(owners)]
    loads = [(0, owner) for owner in range(owners)]
    for box in sorted((box for box in boxes if box.is_expert == experts), key=lambda box: -box.state_bytes):
        load, owner = loads[0]
        owned[owner].append(box)
        heapq.heapreplace(loads, (load + box.state_bytes, owner))
    return owned


def _optimizer_bytes(layout: Layout, boxes: Sequence[Box]) -> int:
    """Masters and states on the data-parallel rank that owns the most."""
    families = (owned_boxes(layout, boxes, experts=experts) for experts in (False, True))
    return sum(max(sum(box.state_bytes for box in mine) for mine in owned) for owned in families)


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
