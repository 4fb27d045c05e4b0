"""Bring the rows of tokens into the order of their experts, and sum them up again: a pair, each the other's gradient.

Letters: T tokens, K experts of a token, R = T K rows, E experts, D width. Nothing here waits for the device, and
nothing depends on the order in which threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Order:
    """Rows sorted by expert; those of one expert in the order of their tokens."""

    choice: torch.Tensor
    """int64 [R]: which choice a row is, t K + k for choice k of token t."""
    position: torch.Tensor
    """int64 [T, K]: the row of each choice; the inverse of `choice`."""
    rows_per_expert: torch.Tensor
    """int64 [E]."""


Move = Callable[[torch.Tensor, Order], torch.Tensor]


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> Order:
    """The order of the rows that `experts`, int [T, K] with entries from 0 to num_experts - 1, asks for."""
    sorted_experts, choice = experts.flatten().sort(stable=True)
    position = torch.empty_like(choice)
    position[choice] = torch.arange(choice.numel(), device=choice.device)
    starts = torch.searchsorted(sorted_experts, torch.arange(num_experts + 1, device=choice.device).to(experts.dtype))
    return Order(choice=choice, position=position.view(experts.shape), rows_per_expert=starts.diff())


def permute(x: torch.Tensor, order: Order) -> torch.Tensor:
    """Tokens [T, D] -> their rows [R, D], sorted by expert."""
    return _Move.apply(x, order, _gather, unpermute)


def unpermute(rows: torch.Tensor, order: Order) -> torch.Tensor:
    """Rows [R, D] -> each token's sum over its K rows [T, D], in at least fp32 and in the order of its choices."""
    return _Move.apply(rows, order, _sum, permute)


def _gather(x: torch.Tensor, order: Order) -> torch.Tensor:
    return x[order.choice // order.position.shape[1]]


def _sum(rows: torch.Tensor, order: Order) -> torch.Tensor:
    T, K = order.position.shape
    total = rows.new_zeros(T, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for k in range(K):
        total += rows[order.position[:, k]]
    return total.to(rows.dtype)


class _Move(torch.autograd.Function):
    """One of the pair, with the other as its gradient: autograd's own gradient of a gather adds atomically on a GPU."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: Order, move: Move, back: Move) -> torch.Tensor:
        ctx.order, ctx.back = order, back
        return move(rows, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.back(grad, ctx.order), None, None, None
