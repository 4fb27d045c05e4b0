"""Top-k routing: from router logits to each token's experts and their combine weights.

The rule is that of megatron-core's `topk_routing_with_score_function`, on fp32: softmax over all experts or over the
chosen ones, or sigmoid; a selection bias; a choice limited to groups of experts; normalisation and a factor.

megatron-core's dispatchers want a dense map instead of lists: `dense_map` makes it, and a subclass of its TopKRouter
whose `routing` calls `route` and `dense_map` between the z-loss and the auxiliary losses would put this in its place.

Letters: T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pretrain_kernels import triton_support
from pretrain_kernels.experts import TRITON_CAPABILITY, Tokens

# Added to the sum of sigmoid scores before they are divided by it (megatron-core's value).
NORMALISATION_EPS = 1e-20

# The Triton kernel keeps the scores of a token in registers.
TRITON_MAX_EXPERTS = 1024

Backend = Literal["triton", "torch"]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """How a token chooses its experts."""

    top_k: int
    """Experts of a token."""
    score: Literal["softmax", "all_softmax", "sigmoid"] = "softmax"
    """softmax: over the chosen experts, which are those of the largest logits. all_softmax: over all experts, so that
    the weights of the chosen ones sum to less than one (megatron-core's pre-softmax). sigmoid: of every expert on its
    own, divided by the sum over the chosen ones if there are several."""
    num_groups: int = 0
    """Experts form this many groups of equal size, neighbours together (0: no groups)."""
    group_top_k: int = 0
    """Groups that a token may choose from: those with the largest sum of their best `top_k // group_top_k` scores."""
    scaling_factor: float = 1.0
    """Factor on the combine weights."""

    def check(self, num_experts: int, *, biased: bool) -> None:
        """Raise a ValueError, one line, unless the rule fits `num_experts` and the presence of a bias."""
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k = {self.top_k}: must be from 1 to the {num_experts} experts")
        if biased and self.score != "sigmoid":
            raise ValueError(f'score = "{self.score}": a selection bias needs "sigmoid"')
        if not self.num_groups and not self.group_top_k:
            return
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(f"num_groups = {self.num_groups}: must divide the {num_experts} experts")
        if not 1 <= self.group_top_k <= min(self.num_groups, self.top_k):
            raise ValueError(f"group_top_k = {self.group_top_k}: must be from 1 to num_groups and to top_k")
        size = num_experts // self.num_groups
        if self.top_k > self.group_top_k * size:
            raise ValueError(f"top_k = {self.top_k}: {self.group_top_k} groups have {self.group_top_k * size} experts")


def route(
    logits: torch.Tensor,
    rule: TopK,
    *,
    bias: torch.Tensor | None = None,
    backend: Literal["auto"] | Backend = "auto",
) -> Tokens:
    """The experts of every token, best first, and their combine weights, which are differentiable in the logits.

    Equal scores go to the expert (and the group) of the lower number, on every backend; torch.topk, and so
    megatron-core, leaves open who wins. Copies of an expert with the same logit are thus chosen in order. A positive
    NaN, as operations on numbers make it, ranks first.

    Computes in fp32: with bf16 logits megatron-core rounds the scores to bf16 before it compares them, we do not.

    Args:
        logits: [T, E], of any floating type.
        rule: how to choose.
        bias: [E] fp32, added to the sigmoid scores for the choice alone. Gets no gradient.
        backend: auto is triton on NVIDIA GPUs of compute capability 8.0 or newer for up to 1024 experts, where Triton
            is installed, and torch elsewhere. Neither waits for the device, and both are bitwise repeatable.

    Returns:
        experts int64 [T, K] and scores fp32 [T, K].

    Raises:
        ValueError: a rule that does not fit.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)}: must be [T, E]")
    num_experts = logits.shape[1]
    rule.check(num_experts, biased=bias is not None)
    if backend == "auto":
        backend = choose_backend(logits.device, num_experts)
    if backend == "triton":
        # Not at the top: the package works without Triton.
        from pretrain_kernels.triton_router import route_triton  # noqa: PLC0415

        experts, scores = route_triton(logits, rule, bias)
    else:
        experts, scores = _route_torch(logits.float(), rule, bias)
    return Tokens(experts, scores)


def choose_backend(device: torch.device, num_experts: int) -> Backend:
    """What "auto" stands for; see `route`."""
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
    return "triton" if gpu and num_experts <= TRITON_MAX_EXPERTS and triton_support.installed() else "torch"


def dense_map(tokens: Tokens, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What megatron-core's router returns: combine weights [T, E], zero where not chosen, and the choice, bool."""
    shape = (len(tokens.experts), num_experts)
    weights = tokens.scores.new_zeros(shape).scatter(1, tokens.experts, tokens.scores)
    chosen = torch.zeros(shape, dtype=torch.bool, device=weights.device).scatter(1, tokens.experts, True)
    return weights, chosen


def _route_torch(logits: torch.Tensor, rule: TopK, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if rule.score == "all_softmax":
        scores = torch.softmax(logits, dim=1)
    else:
        scores = torch.sigmoid(logits) if rule.score == "sigmoid" else logits
    ranked = scores.detach() if bias is None else scores.detach() + bias
    experts = _choose(ranked, rule)
    chosen = scores.gather(1, experts)
    if rule.score == "softmax":
        chosen = torch.softmax(chosen, dim=1)
    elif rule.score == "sigmoid" and rule.top_k > 1:
        chosen = chosen / (chosen.sum(dim=1, keepdim=True) + NORMALISATION_EPS)
    return experts, chosen * rule.scaling_factor


def _choose(ranked: torch.Tensor, rule: TopK) -> torch.Tensor:
    """int64 [T, K]: the experts of the largest `ranked` [T, E], within the best groups if there are any."""
    keys = _ordered(ranked)
    if rule.num_groups:
        groups = ranked.unflatten(1, (rule.num_groups, -1))
        best = groups.topk(rule.top_k // rule.group_top_k, dim=2).values.sum(dim=2)
        allowed = _ordered(best).topk(rule.group_top_k, dim=1).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, allowed, False)
        keys = keys.masked_fill(outside.repeat_interleave(groups.shape[2], dim=1), torch.iinfo(torch.int64).min)
    return keys.topk(rule.top_k, dim=1).indices


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different within a row of fp32 `values`: sorted by value, then by lower column first."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: both zeros have one key
    ranks = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats are sorted backwards as integers
    columns = torch.arange(values.shape[1], device=values.device)
    return (ranks.long() << 32) | (0x7FFFFFFF - columns)
