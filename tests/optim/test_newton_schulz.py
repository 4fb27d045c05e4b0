"""Newton-Schulz: singular values, symmetries, and an independent fp64 reference by singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from pretrain.optim.newton_schulz import COEFFICIENTS, newton_schulz, newton_schulz_flops

torch.manual_seed(0)


def reference(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """fp64: the odd polynomial applied to singular values, no matrix iteration."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh


def planted(m: int, n: int, spectrum: torch.Tensor) -> torch.Tensor:
    """[1, m, n] with the given singular values."""
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    k = len(spectrum)
    return (u[:, :k] @ torch.diag(spectrum.double()) @ v[:, :k].T).float()[None]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 48), (2, 48, 24), (1, 7, 129)])
def test_fp32_is_the_fp64_reference(shape):
    x = torch.randn(shape)
    expected = reference(x)
    torch.testing.assert_close(newton_schulz(x, 5, torch.float32).double(), expected, rtol=0, atol=2e-6)
    off = (newton_schulz(x, 4, torch.float32).double() - expected).abs().max()
    assert off > 1e-2, "one step less must show"


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.0), (torch.bfloat16, 0.02)])
def test_planted_spectrum_lands_in_the_band(dtype, slack):
    # Ratios to the Frobenius norm from 3e-3 to nearly 1: the range the band is stated for.
    spectrum = torch.logspace(0, -2.4, 32)
    assert spectrum[-1] / spectrum.norm() > 3e-3 / 1.6
    x = planted(32, 64, spectrum.clamp(min=3e-3 * float(spectrum.norm())))
    values = torch.linalg.svdvals(newton_schulz(x, 5, dtype).double())
    assert values.min() > 0.68 - slack
    assert values.max() < 1.21 + slack


def test_far_smaller_singular_values_stay_small():
    # Negative control of the band: it does not hold below 3e-3 of the norm.
    x = planted(16, 16, torch.tensor([1.0] * 15 + [1e-5]))
    assert torch.linalg.svdvals(newton_schulz(x, 5, torch.float32)).min() < 0.1


def test_equivariance():
    x = torch.randn(1, 24, 40)
    y = newton_schulz(x, 5, torch.float32)
    q = torch.linalg.qr(torch.randn(24, 24))[0]
    torch.testing.assert_close(newton_schulz(q @ x, 5, torch.float32), q @ y, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(x.mT, 5, torch.float32), y.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(1e-3 * x, 5, torch.float32), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(1e3 * x, 5, torch.float32), y, rtol=0, atol=1e-5)
    assert (newton_schulz(-x, 5, torch.float32) - y).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(dtype):
    x = torch.randn(3, 8, 16)
    x[1] = 0
    y = newton_schulz(x, 5, dtype)
    assert not y[1].any()
    assert y[0].any()
    assert y[2].any()
    assert y.isfinite().all()


def test_batch_is_a_loop():
    x = torch.randn(5, 24, 32)
    y = newton_schulz(x, 5, torch.float32)
    assert torch.equal(y, torch.cat([newton_schulz(x[i : i + 1], 5, torch.float32) for i in range(5)]))
    stacked_rows = newton_schulz(x.reshape(1, -1, 32), 5, torch.float32).view_as(x)
    assert (y - stacked_rows).norm() / y.norm() > 0.1, "experts as rows of one matrix are something else"


def test_flops():
    # A square matrix, five steps: 30 m^3.
    assert newton_schulz_flops((1, 8, 8), 5) == 30 * 8**3
    assert newton_schulz_flops((3, 8, 16), 5) == newton_schulz_flops((3, 16, 8), 5) == 3 * 5 * (4 * 64 * 16 + 2 * 512)
