"""Norm and clipping on one process."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.optim.clip import clip_, global_norm

CPU = torch.device("cpu")


def test_norm_is_torchs_in_fp64():
    tensors = [torch.randn(shape) for shape in [(3,), (17, 5), (4, 8, 2), (300, 400)]]
    expected = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    assert global_norm(tensors, CPU) == pytest.approx(float(expected), rel=2e-7)
    assert global_norm([], CPU) == 0.0


def test_norm_of_a_large_tensor_does_not_lose_digits():
    x = torch.randn(1 << 23)
    exact = float(x.double().square().sum().sqrt())
    assert global_norm([x], CPU) == pytest.approx(exact, rel=5e-7)
    # Negative control: why it is summed in blocks.
    assert abs(float(x.norm()) / exact - 1) > 1e-5


def test_clip_is_torchs():
    for max_norm in (0.5, 1e6):
        tensors = [torch.randn(5), torch.randn(6, 7)]
        params = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
        for param, tensor in zip(params, tensors, strict=True):
            param.grad = tensor.clone()
        norm = global_norm(tensors, CPU)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        clipped = clip_(tensors, norm, max_norm)
        assert clipped == (norm > max_norm)
        for param, tensor in zip(params, tensors, strict=True):
            torch.testing.assert_close(tensor, param.grad)
        assert global_norm(tensors, CPU) == pytest.approx(min(norm, max_norm), rel=1e-5)


def test_zero_means_no_clipping():
    tensor = torch.ones(4)
    assert not clip_([tensor], 2.0, 0.0)
    assert torch.equal(tensor, torch.ones(4))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_shows(bad):
    assert not math.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, bad])], CPU))
