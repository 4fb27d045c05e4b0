"""Newton-Schulz iteration: the approximate orthogonal factor of a batch of matrices, with matrix products only.

Two forms of the same iteration, for m x n matrices X with m <= n and P(G) = a I + b G + c G^2:

- plain: G = X X^T, X <- P(G) X, every step;
- Gram: all factors P are polynomials of the first G, so they commute, and the steps run on small m x m matrices:
  Q <- P(G) Q, G <- P(G) G P(G), and X <- Q X at the end. G loses the small singular values to rounding while Q
  magnifies them, so X is formed, and its Gram matrix taken anew, after every `RESTART` steps.

Every product but Q X (or P X) has a symmetric result, of which a kernel may compute one triangle (`triton_symmetric`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pretrain_kernels import triton_support
from pretrain_kernels.experts import ROW_ALIGNMENT_BYTES, TRITON_DTYPES

# Keller Jordan's quintic, steep at zero: singular values above 3e-3 of the Frobenius norm land in [0.68, 1.21] after
# five steps, not at exactly one. https://kellerjordan.github.io/posts/muon/
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Smallest Frobenius norm that is still scaled up to one, so that zero stays zero (torch.optim.Muon's value).
EPS = 1e-7

# Measured on spectra from flat to seven decades of decay, five steps, error against fp64: steps 3 + 2 give 0.7 to 4.1
# times the plain form's error in fp32; 2 + 3 up to 8, with singular values up to 1.43 in bf16; no restart up to 43.
RESTART = 3

# From this side on the kernel that computes one triangle leaves out enough: its blocks are 64 or 128 wide, so that a
# side of 256 has 10 of 16 or 3 of 4 blocks left. The published symmetric kernels draw the line there, too.
SYMMETRIC_ABOVE = 256
# Older GPUs have no bulk copy engine for its operands: on 8.0 its large blocks spill registers.
SYMMETRIC_CAPABILITY = (9, 0)

Form = Literal["plain", "gram"]
Backend = Literal["torch", "triton"]


@dataclass(frozen=True)
class Products:
    """The products whose results are symmetric. Tensors are [N, m, n] and [N, m, m]."""

    gram: Callable[[torch.Tensor], torch.Tensor]
    """y y^T."""
    multiply: Callable[..., torch.Tensor]
    """(a, b, *, add, alpha, beta): alpha a b + beta add, for symmetric a, b and add, where a and b commute."""


def newton_schulz(
    x: torch.Tensor,
    steps: int,
    dtype: torch.dtype,
    *,
    form: Literal["auto"] | Form = "auto",
    backend: Literal["auto"] | Backend = "auto",
) -> torch.Tensor:
    """U V^T of every matrix U S V^T in `x`, roughly.

    x: [N, out, in]. Returns the same shape and dtype; iterates in `dtype`. A zero matrix gives zero. The Gram form of
    a bf16 iteration runs in fp16: all of its entries are below 50, and bf16's eight bits are too few for it (0.6 to 6
    times the error of the plain form in bf16; in fp16 0.1 to 0.5 times).

    Bitwise repeatable. `form` and `backend`: see `choose_form` and `choose_backend`.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    tall = x.shape[-2] > x.shape[-1]
    m, n = sorted(x.shape[-2:])
    if backend == "auto":
        backend = choose_backend(x.device, dtype, m, n)
    if form == "auto":
        form = choose_form(x.device, (len(x), m, n), steps, backend)
    y = (x / norm).to(torch.float16 if form == "gram" and dtype == torch.bfloat16 else dtype)
    if tall:  # the Gram matrix of the short side is the small one
        y = y.mT
    iterate = _gram if form == "gram" else _plain
    y = iterate(y, steps, _triton_products() if backend == "triton" else TORCH)
    return (y.mT if tall else y).to(x.dtype)


def choose_form(device: torch.device, shape: tuple[int, int, int], steps: int, backend: Backend) -> Form:
    """What "auto" stands for: on GPUs the form with fewer operations, elsewhere the plain one.

    Five steps with n the longer side: Gram from n = 1.5 m with torch's products, from n > m with triangles. On CPUs
    the Gram form is 1.0 to 1.5 times as fast (n = 2 m to 4 m); results that do not depend on the shape are worth more.
    """
    if device.type == "cpu":
        return "plain"
    plain, gram = (newton_schulz_flops(shape, steps, form, backend) for form in ("plain", "gram"))
    return "gram" if gram < plain else "plain"


def choose_backend(device: torch.device, dtype: torch.dtype, m: int, n: int) -> Backend:
    """What "auto" stands for, with m <= n the sides of the matrices.

    triton (one triangle of symmetric products): an NVIDIA GPU of compute capability 9.0 or newer, bf16 or fp16,
    m > 256, both sides multiples of 8 (rows of 16 bytes), Triton installed. torch: everything else. fp32 stays with
    torch as it gains nothing: without tensor cores, cuBLAS is ahead by more than the half that is left out.
    """
    fits = dtype in TRITON_DTYPES and m > SYMMETRIC_ABOVE and m * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0
    fits = fits and n * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= SYMMETRIC_CAPABILITY
    return "triton" if fits and gpu and triton_support.installed() else "torch"


def newton_schulz_flops(
    shape: tuple[int, int, int], steps: int, form: Form = "plain", backend: Backend = "torch"
) -> int:
    """Floating point operations of `newton_schulz` on [N, out, in], with triton half of those of symmetric products.

    For m <= n: plain, every step, 2 m^2 n + 2 m^3 symmetric and 2 m^2 n others. Gram, every restart, 2 m^2 n symmetric
    and 2 m^2 n others; every step a product of 2 m^3, all symmetric, and three more except right after a restart.
    """
    count, m, n = shape[0], min(shape[1:]), max(shape[1:])
    restarts = -(-steps // RESTART)
    wide = steps if form == "plain" else restarts  # products with X: as many symmetric ones as others
    small = steps if form == "plain" else steps + 3 * (steps - restarts)
    symmetric = wide * 2 * m * m * n + small * 2 * m**3
    return count * (symmetric // (2 if backend == "triton" else 1) + wide * 2 * m * m * n)


def _plain(y: torch.Tensor, steps: int, products: Products) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = products.gram(y)
        polynomial = products.multiply(gram, gram, add=gram, alpha=c, beta=b)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y


def _gram(y: torch.Tensor, steps: int, products: Products) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    for start in range(0, steps, RESTART):
        gram = products.gram(y)
        polynomial = products.multiply(gram, gram, add=gram, alpha=c, beta=b)  # P(G) - a I
        factor = polynomial.clone()
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        for _ in range(start + 1, min(start + RESTART, steps)):
            half = products.multiply(polynomial, gram, add=gram, alpha=1.0, beta=a)
            gram = products.multiply(half, polynomial, add=half, alpha=1.0, beta=a)
            polynomial = products.multiply(gram, gram, add=gram, alpha=c, beta=b)
            factor = products.multiply(polynomial, factor, add=factor, alpha=1.0, beta=a)
        y = torch.bmm(factor, y)
    return y


def _torch_multiply(a: torch.Tensor, b: torch.Tensor, *, add: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    return torch.baddbmm(add, a, b, alpha=alpha, beta=beta)


TORCH = Products(gram=lambda y: torch.bmm(y, y.mT), multiply=_torch_multiply)


def _triton_products() -> Products:
    # Not at the top: the package works without Triton.
    from pretrain_kernels.triton_symmetric import symmetric_product  # noqa: PLC0415

    return Products(gram=lambda y: symmetric_product(y, y), multiply=symmetric_product)
