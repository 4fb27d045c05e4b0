"""What the expert layer computes, written down as plainly as possible: what tests and the benchmark compare with."""

from __future__ import annotations

import torch

from pretrain_kernels.experts import Grouped, Tokens


def reference_experts(
    x: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    routing: Grouped | Tokens,
    *,
    trainable: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`swiglu_experts` in `dtype`, expert by expert and left to autograd; differentiable in the same tensors.

    With a narrow `dtype` it is the error that such a data type brings with it, for others to be measured against.
    """
    if isinstance(routing, Grouped):
        numbers = torch.arange(len(fc1), device=x.device)
        experts = numbers.repeat_interleave(routing.rows_per_expert.to(x.device)).unsqueeze(-1)
        scores = routing.scores.unsqueeze(-1)
    else:
        experts, scores = routing.experts, routing.scores
    y = torch.zeros_like(x, dtype=dtype)
    for expert, (up, down) in enumerate(zip(fc1.to(dtype), fc2.to(dtype), strict=True)):
        if trainable is not None and not trainable[expert]:
            up, down = up.detach(), down.detach()  # noqa: PLW2901
        row, choice = (experts == expert).nonzero(as_tuple=True)
        gate, value = (x[row].to(dtype) @ up.T).chunk(2, dim=-1)
        active = gate * torch.sigmoid(gate) * value
        y = y.index_add(0, row, (active * scores[row, choice].unsqueeze(-1)).to(dtype) @ down.T)
    return y
