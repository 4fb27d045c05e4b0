"""Causal grouped-query attention against a formula in fp64."""

from __future__ import annotations

import pytest
import torch

from pretrain.model import attention
from pretrain.model.attention import causal_attention

# S, B, H, G, C: one position; groups of one and of several heads; odd sizes.
SHAPES = [(1, 2, 2, 2, 8), (37, 2, 4, 2, 6), (129, 1, 6, 2, 16), (40, 2, 3, 1, 5)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values, and the gradient of the output."""
    S, B, H, G, C = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, B, H, C), (S, B, G, C), (S, B, G, C), (S, B, H * C)]
    return [torch.randn(*each, generator=generator, dtype=torch.float64).to(dtype) for each in shapes]


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """softmax(scale * q k + mask) v, head by head."""
    S, _, H, C = query.shape
    future = torch.full((S, S), float("-inf"), dtype=query.dtype).triu(1)
    heads = []
    for head in range(H):
        group = head // (H // key.shape[2])
        scores = torch.einsum("sbc,tbc->bst", query[:, :, head], key[:, :, group]) * (scale or C**-0.5)
        heads.append(torch.einsum("bst,tbc->sbc", (scores + future).softmax(-1), value[:, :, group]))
    return torch.cat(heads, dim=-1)


def results(function, tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Output and gradients, in fp64."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = function(*leaves, **options)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, tensors[3]))]


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest relative error."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.norm() > 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("plain_up_to", [0, 512])
def test_equals_the_formula(
    shape: tuple[int, ...], scale: float | None, plain_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_PLAIN_UP_TO", plain_up_to)
    tensors = inputs(shape, torch.float64)
    assert error(results(causal_attention, tensors, scale=scale), results(formula, tensors, scale=scale)) < 1e-12


def test_another_grouping_is_seen() -> None:
    tensors = inputs((37, 2, 4, 2, 6), torch.float64)
    swapped = [tensors[0], tensors[1].flip(2), *tensors[2:]]
    assert error(results(causal_attention, tensors), results(formula, swapped)) > 0.1


def test_the_two_ways_differ_in_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((140, 2, 4, 2, 8), torch.float32)
    plain = results(causal_attention, tensors)
    monkeypatch.setattr(attention, "CPU_PLAIN_UP_TO", 0)
    assert 0 < error(plain, results(causal_attention, tensors)) < 1e-6
