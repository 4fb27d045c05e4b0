"""Kernels of mixture-of-experts training, usable without `pretrain`. Importing this needs neither Triton nor CUDA."""

from __future__ import annotations

from pretrain_kernels.experts import BackendError, Grouped, Tokens, check_backend, choose_backend, swiglu_experts
from pretrain_kernels.permute import Order, permute, sort_by_expert, unpermute

__all__ = [
    "BackendError",
    "Grouped",
    "Order",
    "Tokens",
    "check_backend",
    "choose_backend",
    "permute",
    "sort_by_expert",
    "swiglu_experts",
    "unpermute",
]
