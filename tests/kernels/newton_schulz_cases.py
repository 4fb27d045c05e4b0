"""Cases of the symmetric-product kernel, run by test_newton_schulz.py in a process of its own with TRITON_INTERPRET=1.

The interpreter's casts to bf16 cut off instead of rounding: bf16 is held to that, and fp16, which it rounds, to more.
"""

from __future__ import annotations

import pytest
import torch

from pretrain_kernels import triton_symmetric
from pretrain_kernels.newton_schulz import newton_schulz
from pretrain_kernels.triton_symmetric import symmetric_product

# Relative error of a norm: one cast of the result, 2^-24, 2^-12 and (cut off) 2^-8 on average or less.
BOUND = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (136, 72), (8, 200)])
def test_gram_equals_fp64_and_is_symmetric(n, k, dtype):
    x = torch.randn(3, n, k).to(dtype)
    y = symmetric_product(x, x)
    assert y.dtype == dtype
    assert distance(y, x.double() @ x.double().mT) < BOUND[dtype]
    assert torch.equal(y, y.mT)


def commuting(count: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric stacks that share their eigenvectors, as polynomials of a Gram matrix do."""
    q = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64))[0]
    a, b, add = (q @ torch.diag_embed(torch.rand(count, n, dtype=torch.float64)) @ q.mT for _ in range(3))
    return a.to(dtype), b.to(dtype), add.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_with_sum_equals_fp64(dtype):
    a, b, add = commuting(2, 136, dtype)
    y = symmetric_product(a, b, add=add, alpha=2.0315, beta=-4.775)
    assert distance(y, 2.0315 * a.double() @ b.double().mT - 4.775 * add.double()) < BOUND[dtype]
    assert torch.equal(y, y.mT)


def test_large_blocks(monkeypatch):
    monkeypatch.setattr(triton_symmetric, "LARGE_FROM", 100)
    a, b, add = commuting(1, 136, torch.float32)
    assert distance(symmetric_product(a, b, add=add, beta=0.5), a @ b.mT + 0.5 * add) < 1e-6


def test_only_the_upper_triangle_of_the_addend_is_read():
    a, b, add = commuting(1, 136, torch.float32)
    poisoned = add.clone()
    poisoned[:, 64:, :64] = torch.nan
    assert torch.equal(symmetric_product(a, b, add=poisoned), symmetric_product(a, b, add=add))


def test_matrices_do_not_leak_into_each_other():
    x = torch.randn(3, 72, 40)
    alone = symmetric_product(x, x)
    x[1] = torch.nan
    y = symmetric_product(x, x)
    assert torch.equal(y[::2], alone[::2])
    assert y[1].isnan().all()


def test_repeatable_and_layout_free():
    x = torch.randn(2, 40, 72)
    strided = x.mT.contiguous().mT
    assert torch.equal(symmetric_product(strided, strided), symmetric_product(x, x))
    assert symmetric_product(x[:0], x[:0]).shape == (0, 40, 40)
    with pytest.raises(ValueError, match="two equal stacks"):
        symmetric_product(x, x[:1])


@pytest.mark.parametrize(
    ("coefficients", "form", "dtype", "bound"),
    [
        ("keller_jordan", "plain", torch.float32, 1e-5),
        ("keller_jordan", "plain", torch.bfloat16, 8e-2),
        ("keller_jordan", "gram", torch.bfloat16, 1e-2),
        ("polar_express", "gram", torch.bfloat16, 1e-2),
    ],
)
def test_iteration_equals_fp64(coefficients, form, dtype, bound):
    x = torch.randn(3, 72, 24)  # tall, and more columns than one block when it lies down
    x[1] = 0
    y = newton_schulz(x, 5, dtype, coefficients=coefficients, form=form, backend="triton")
    expected, fewer = (
        newton_schulz(x.double(), steps, torch.float64, coefficients=coefficients, backend="torch") for steps in (5, 4)
    )
    assert distance(y, expected) < bound
    assert distance(y, fewer) > 0.1, "one step less must show"
    assert not y[1].any()
