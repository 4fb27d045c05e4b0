"""Routing rules that the router is tested with, and inputs for them."""

from __future__ import annotations

import torch

from pretrain_kernels.router import TopK

EXPERTS = 24  # not a power of two; divisible by 3, 4 and 6
RULES = [
    TopK(top_k=4),
    TopK(top_k=1),
    TopK(top_k=4, num_groups=3, group_top_k=2, scaling_factor=1.5),
    TopK(top_k=3, score="all_softmax", scaling_factor=2.5),
    TopK(top_k=6, score="all_softmax", num_groups=4, group_top_k=2),
    TopK(top_k=4, score="sigmoid"),
    TopK(top_k=1, score="sigmoid", scaling_factor=1.5),
    TopK(top_k=EXPERTS, score="sigmoid"),
    TopK(top_k=7, score="sigmoid", num_groups=6, group_top_k=3, scaling_factor=2.5),
]


def inputs(rule: TopK, *, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Logits [T, E]; a bias [E] for sigmoid (large enough to change choices), else None; factors [T, K] of a loss."""
    generator = torch.Generator().manual_seed(rule.top_k)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    bias = 0.3 * torch.randn(EXPERTS, generator=generator)
    factors = torch.randn(tokens, rule.top_k, generator=generator)
    return logits, bias if rule.score == "sigmoid" else None, factors
