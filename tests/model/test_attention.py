"""Attention by explicit products against torch's scaled_dot_product_attention in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.model import attention
from pretrain.model.attention import causal_attention

# S, B, H, G, C: one position; fewer than a block; a block and a bit; several; odd sizes, every share of heads.
SHAPES = [(1, 2, 2, 2, 8), (37, 2, 4, 2, 6), (129, 1, 6, 2, 16), (300, 2, 3, 1, 5)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as slices of one fused projection, and the gradient of the output."""
    S, B, H, G, C = shape
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(S, B, G, (H // G + 2) * C, generator=generator, dtype=torch.float64).to(dtype)
    query, key, value = fused.split([H // G * C, C, C], dim=-1)
    leaves = [x.detach().requires_grad_() for x in (query.reshape(S, B, H, C), key, value)]
    return [*leaves, torch.randn(S, B, H * C, generator=generator, dtype=torch.float64).to(dtype)]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def results(function, tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Output and gradients, in fp64."""
    *leaves, grad = tensors
    out = function(*leaves, **options)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest relative error."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.norm() > 0)


def truth(tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    *leaves, grad = tensors
    return results(reference, [*(x.detach().double().requires_grad_() for x in leaves), grad.double()], **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_torch(shape: tuple[int, ...], scale: float | None) -> None:
    tensors = inputs(shape, torch.float64)
    assert error(results(causal_attention, tensors, scale=scale), truth(tensors, scale=scale)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-9)])
def test_rounds_as_its_precision_does(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    tensors = inputs(shape, dtype)
    # Scores, probabilities, output and their gradients are rounded one after another.
    assert error(results(causal_attention, tensors), truth(tensors)) < 8 * rounding


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((140, 2, 4, 2, 8), torch.float32)
    by_blocks = results(causal_attention, tensors)
    monkeypatch.setattr(attention, "CPU_BY_BLOCKS_UP_TO", 0)
    by_torch = results(causal_attention, tensors)
    assert 0 < error(by_blocks, by_torch) < 1e-6


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((140, 1, 2, 2, 8), torch.float64)
    triu = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda tensor, diagonal: triu(tensor, diagonal + 1))
    assert error(results(causal_attention, tensors), truth(tensors)) > 1e-2
