# ruff: noqa: ANN001, ANN201 - the arguments of Triton kernels have no Python types
"""The fused top-k router: one kernel forward, one backward. A program owns some tokens, with all of their scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain_kernels.router import NORMALISATION_EPS, TopK
from pretrain_kernels.triton_support import Launch

# Scores held by one program of four warps: 16 a thread, each with a key of two registers.
SCORES = 2048

SOFTMAX, ALL_SOFTMAX, SIGMOID = (tl.constexpr(value) for value in range(3))
KINDS = {"softmax": SOFTMAX.value, "all_softmax": ALL_SOFTMAX.value, "sigmoid": SIGMOID.value}

NOTHING = tl.constexpr(-(1 << 63))  # below the key of every score
LOW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def keys_of(value, column):
    """int64 keys of fp32 values: sorted by value, then by lower column first. `router._ordered` in Triton."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & LOW)
    return (rank.to(tl.int64) << 32) | (-column + LOW).to(tl.int64)


@triton.jit
def value_of(key):
    """The fp32 value of a key."""
    rank = (key >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & LOW)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(key):
    """The column of a key."""
    return -(key & LOW).to(tl.int32) + LOW


@triton.jit
def group_keys(
    keys, BT: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BEST: tl.constexpr,
    GROUP_K: tl.constexpr,
):  # fmt: skip
    """`keys` [BT, BG BP] with NOTHING outside of the best GROUP_K groups, by the sum of their BEST largest values."""
    left = keys.reshape(BT, BG, BP)
    total = tl.zeros([BT, BG], tl.float32)
    for _ in range(BEST):
        largest = tl.max(left, axis=2)
        total += value_of(largest)
        left = tl.where(left == largest[:, :, None], NOTHING, left)
    group = tl.arange(0, BG)[None, :]
    ranked = tl.where(group < GROUPS, keys_of(total, group), NOTHING)
    allowed = tl.zeros([BT, BG], tl.int1)
    for _ in range(GROUP_K):
        best = ranked == tl.max(ranked, axis=1)[:, None]
        allowed = allowed | best
        ranked = tl.where(best, NOTHING, ranked)
    return tl.where(allowed[:, :, None], keys.reshape(BT, BG, BP), NOTHING).reshape(BT, BG * BP)


@triton.jit
def softmax_rows(value):
    """Softmax along axis 1 of finite numbers and -inf."""
    power = tl.exp(value - tl.max(value, axis=1)[:, None])
    return power * (1 / tl.sum(power, axis=1))[:, None]


@triton.jit
def forward_kernel(
    logits, bias, experts, scores, T, E, scale, eps,
    KIND: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, BEST: tl.constexpr,
    GROUP_K: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """experts, scores [T, K] from logits [T, E]. Columns are padded group by group: BG groups of BP; BK >= K."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    at = row.to(tl.int64)[:, None]
    padded = tl.arange(0, BG * BP)
    size = E // GROUPS
    member = padded % BP
    column = (padded // BP * size + member)[None, :]
    valid = ((member < size) & (padded // BP < GROUPS))[None, :]
    inside = (row < T)[:, None]
    value = tl.load(logits + at * E + column, mask=inside & valid, other=0.0).to(tl.float32)
    if KIND == ALL_SOFTMAX:
        value = softmax_rows(tl.where(valid, value, float("-inf")))
    elif KIND == SIGMOID:
        value = tl.sigmoid(value)
    ranked = value
    if BIASED:
        ranked += tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    keys = tl.where(valid, keys_of(ranked, column), NOTHING)
    if GROUPS > 1:
        keys = group_keys(keys, BT, GROUPS, BG, BP, BEST, GROUP_K)
    choice = tl.arange(0, BK)[None, :]
    expert = tl.zeros([BT, BK], tl.int32)
    score = tl.full([BT, BK], float("-inf"), tl.float32)
    for k in range(K):
        largest = tl.max(keys, axis=1)[:, None]
        best = tl.sum(tl.where(keys == largest, value, 0.0), axis=1)[:, None] if BIASED else value_of(largest)
        expert = tl.where(choice == k, column_of(largest), expert)
        score = tl.where(choice == k, best, score)
        keys = tl.where(keys == largest, NOTHING, keys)
    if KIND == SOFTMAX:
        score = softmax_rows(score)
    elif KIND == SIGMOID and K > 1:
        score = score / (tl.sum(tl.where(choice < K, score, 0.0), axis=1)[:, None] + eps)
    needed = inside & (choice < K)
    tl.store(experts + at * K + choice, expert.to(tl.int64), mask=needed)
    tl.store(scores + at * K + choice, score * scale, mask=needed)


@triton.jit
def backward_kernel(
    logits, experts, d_scores, d_logits, T, E, scale, eps,
    KIND: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """d_logits [T, E] from d_scores [T, K]: the scores anew, then the derivative of softmax, sigmoid and division."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.arange(0, BE)[None, :]
    inside = row < T
    at = row.to(tl.int64)
    chosen = tl.zeros([BT, BE], tl.int1)
    gradient = tl.zeros([BT, BE], tl.float32)
    for k in range(K):
        mine = column == tl.load(experts + at * K + k, mask=inside, other=0)[:, None]
        chosen = chosen | mine
        gradient = tl.where(mine, tl.load(d_scores + at * K + k, mask=inside, other=0.0)[:, None] * scale, gradient)
    needed = inside[:, None] & (column < E)
    value = tl.load(logits + at[:, None] * E + column, mask=needed, other=0.0).to(tl.float32)
    if KIND == SIGMOID:
        sigmoid = tl.where(chosen, tl.sigmoid(value), 0.0)
        if K > 1:
            inverse = 1 / (tl.sum(sigmoid, axis=1)[:, None] + eps)
            gradient = (gradient - tl.sum(gradient * sigmoid, axis=1)[:, None] * inverse) * inverse
        result = gradient * sigmoid * (1 - sigmoid)
    else:
        support = chosen if KIND == SOFTMAX else column < E
        weight = softmax_rows(tl.where(support, value, float("-inf")))
        result = weight * (gradient - tl.sum(gradient * weight, axis=1)[:, None])
    tl.store(d_logits + at[:, None] * E + column, result.to(d_logits.dtype.element_ty), mask=needed)


def forward_launch(logits: Tensor, rule: TopK, bias: Tensor | None, experts: Tensor, scores: Tensor) -> Launch:
    """The launch that writes `experts` and `scores`."""
    T, E = logits.shape
    groups = max(1, rule.num_groups)
    BG, BP = triton.next_power_of_2(groups), triton.next_power_of_2(E // groups)
    BT = max(1, SCORES // (BG * BP))
    arguments = {
        "logits": logits,
        "bias": bias,
        "experts": experts,
        "scores": scores,
        "T": T,
        "E": E,
        "scale": float(rule.scaling_factor),
        "eps": NORMALISATION_EPS,
        "KIND": KINDS[rule.score],
        "BIASED": bias is not None,
        "K": rule.top_k,
        "GROUPS": groups,
        "BEST": rule.top_k // max(1, rule.group_top_k),
        "GROUP_K": rule.group_top_k,
        "BT": BT,
        "BG": BG,
        "BP": BP,
        "BK": triton.next_power_of_2(rule.top_k),
    }
    return Launch(kernel=forward_kernel, grid=(triton.cdiv(T, BT),), arguments=arguments, warps=4, stages=1)


def backward_launch(logits: Tensor, rule: TopK, experts: Tensor, d_scores: Tensor, d_logits: Tensor) -> Launch:
    """The launch that writes `d_logits`."""
    T, E = logits.shape
    BE = triton.next_power_of_2(E)
    BT = max(1, SCORES // BE)
    arguments = {
        "logits": logits,
        "experts": experts,
        "d_scores": d_scores,
        "d_logits": d_logits,
        "T": T,
        "E": E,
        "scale": float(rule.scaling_factor),
        "eps": NORMALISATION_EPS,
        "KIND": KINDS[rule.score],
        "K": rule.top_k,
        "BT": BT,
        "BE": BE,
    }
    return Launch(kernel=backward_kernel, grid=(triton.cdiv(T, BT),), arguments=arguments, warps=4, stages=1)


class _Route(torch.autograd.Function):
    """Saves the logits and the experts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rule: TopK, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        shape = (len(logits), rule.top_k)
        experts = torch.empty(shape, dtype=torch.int64, device=logits.device)
        scores = torch.empty(shape, dtype=torch.float32, device=logits.device)
        forward_launch(logits, rule, bias, experts, scores).run()
        ctx.rule = rule
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts)
        return experts, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_scores: Tensor) -> tuple[Tensor, None, None]:
        logits, experts = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        backward_launch(logits, ctx.rule, experts, d_scores.contiguous(), d_logits).run()
        return d_logits, None, None


def route_triton(logits: Tensor, rule: TopK, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, K] and scores fp32 [T, K]; `rule` has been checked. See `pretrain_kernels.router.route`."""
    experts, scores = _Route.apply(logits, rule, bias)
    return experts, scores
