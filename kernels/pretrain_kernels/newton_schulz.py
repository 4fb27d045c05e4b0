"""Newton-Schulz iteration: the approximate orthogonal factor of a batch of matrices, with matrix products only.

Two forms of the same iteration, for m x n matrices X with m <= n and P(G) = a I + b G + c G^2, where (a, b, c) may be
another for every step (`COEFFICIENTS`):

- plain: G = X X^T, X <- P(G) X, every step;
- Gram: all factors P are polynomials of the first G, so they commute, and the steps run on small m x m matrices:
  Q <- P(G) Q, G <- P(G) G P(G), and X <- Q X at the end. G loses the small singular values to rounding while Q
  magnifies them, so X is formed, and its Gram matrix taken anew, every few steps (`CoefficientSet.between_restarts`).

Every product but Q X (or P X) has a symmetric result, of which a kernel may compute one triangle (`triton_symmetric`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from pretrain_kernels import triton_support
from pretrain_kernels.experts import ROW_ALIGNMENT_BYTES, TRITON_DTYPES

# Smallest Frobenius norm that is still scaled up to one, so that zero stays zero (torch.optim.Muon's value).
EPS = 1e-7

# Steps of the Gram form between restarts. Measured on spectra from flat to seven decades of decay and a square Gaussian
# matrix, 5 to 10 steps, error against fp64 over that of the plain form, in fp32: Keller Jordan's set 0.6 to 4.1, and up
# to 18 when the first restart comes after 2 steps; Polar Express 0.2 to 3.6 with the first restart after 2 steps, and
# up to 15 after 3, as its first step is 2.4 times as steep. No restart: up to 93 at 5 steps, above 1000 at 8.
RESTART = 3

# From this side on the kernel that computes one triangle leaves out enough. On an H100 the iteration in its best form
# is then 1.2 to 1.6 times as fast as the plain form with torch's products; with sides of 512, in blocks of 64, 0.7.
SYMMETRIC_FROM = 768
# Older GPUs have no bulk copy engine for its operands: on 8.0 its large blocks spill registers.
SYMMETRIC_CAPABILITY = (9, 0)

Form = Literal["plain", "gram"]
Backend = Literal["torch", "triton"]
Coefficients = Literal["keller_jordan", "polar_express", "deepseek_v4"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """The polynomials of an iteration: step k maps a singular value s to a s + b s^3 + c s^5."""

    triples: tuple[Triple, ...]
    """(a, b, c) of each step; the last one is repeated."""
    first_restart: int = RESTART
    """Steps of the Gram form before its first restart."""
    min_steps: int = 1
    """With fewer steps the set would be another one."""

    def schedule(self, steps: int) -> list[Triple]:
        """One triple per step. Raises ValueError below `min_steps`."""
        if steps < self.min_steps:
            raise ValueError(f"{steps} steps: this set of coefficients needs at least {self.min_steps}")
        return [self.triples[min(step, len(self.triples) - 1)] for step in range(steps)]

    def between_restarts(self, steps: int) -> list[list[Triple]]:
        """The schedule of the Gram form, cut where X is formed and its Gram matrix taken anew."""
        schedule = self.schedule(steps)
        cuts = [0, *range(self.first_restart, steps, RESTART), steps]
        return [schedule[start:end] for start, end in pairwise(cuts)]


KELLER_JORDAN = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/

# Amsel et al., arXiv 2505.16932, algorithm 1: the polynomial of each step has the smallest greatest error on what the
# steps before make of [1e-3, 1], whose lower end counts as at least 0.024 of the upper one.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS_LIMIT = (1.875, -1.25, 0.375)
# The paper divides the arguments of all steps but the last by this: rounding pushes values out of the interval, above
# which the polynomials grow steeply.
SAFETY = 1.01

# The ranges are those of exact arithmetic, for singular values from the given ratio to the Frobenius norm on.
COEFFICIENTS: dict[Coefficients, CoefficientSet] = {
    # 5 steps: 0.68 to 1.21 from 3e-3 on. Values around one never settle.
    "keller_jordan": CoefficientSet((KELLER_JORDAN,)),
    # From 1e-3 on, 5 steps: 0.84 to 1.13, 6 steps: 0.99 to 1.01, 8 steps: 1.000.
    "polar_express": CoefficientSet(
        (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS), POLAR_EXPRESS_LIMIT),
        first_restart=2,
    ),
    # DeepSeek-V4's: two last steps with a polynomial whose value and slope at one are one and zero.
    # 10 steps: 1.000 to 1.001 from 1e-3 on.
    "deepseek_v4": CoefficientSet((*(KELLER_JORDAN,) * 8, (2.0, -1.5, 0.5)), min_steps=10),
}


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
    coefficients: Coefficients = "keller_jordan",
    eps: float = EPS,
    form: Literal["auto"] | Form = "auto",
    backend: Literal["auto"] | Backend = "auto",
) -> torch.Tensor:
    """U V^T of every matrix U S V^T in `x`, roughly: how roughly, `coefficients` and `steps` say (`COEFFICIENTS`).

    x: [N, out, in]. Returns the same shape and dtype; iterates in `dtype`. A matrix is divided by its Frobenius norm,
    or by `eps` (above zero) where that is larger: a zero matrix gives zero. The Gram form of a bf16 iteration runs in
    fp16: all of its entries are below 150, and bf16's eight bits are too few for it (0.6 to 6 times the error of the
    plain form in bf16; in fp16 0.1 to 0.9 times).

    Bitwise repeatable. `form` and `backend`: see `choose_form` and `choose_backend`. Raises ValueError where a set of
    coefficients needs more steps.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    tall = x.shape[-2] > x.shape[-1]
    m, n = sorted(x.shape[-2:])
    if backend == "auto":
        backend = choose_backend(x.device, dtype, m, n)
    if form == "auto":
        form = choose_form(x.device, (len(x), m, n), steps, backend, coefficients)
    y = (x / norm).to(torch.float16 if form == "gram" and dtype == torch.bfloat16 else dtype)
    if tall:  # the Gram matrix of the short side is the small one
        y = y.mT
    products = _triton_products() if backend == "triton" else TORCH
    chosen = COEFFICIENTS[coefficients]
    if form == "gram":
        y = _gram(y, chosen.between_restarts(steps), products)
    else:
        y = _plain(y, chosen.schedule(steps), products)
    return (y.mT if tall else y).to(x.dtype)


def choose_form(
    device: torch.device,
    shape: tuple[int, int, int],
    steps: int,
    backend: Backend,
    coefficients: Coefficients = "keller_jordan",
) -> Form:
    """What "auto" stands for: on GPUs the form with fewer operations, elsewhere the plain one.

    Five steps with n the longer side: Gram from n = 1.5 m with torch's products, from n > m with triangles. On CPUs
    the Gram form is 1.0 to 1.5 times as fast (n = 2 m to 4 m); results that do not depend on the shape are worth more.
    """
    if device.type == "cpu":
        return "plain"
    plain, gram = (newton_schulz_flops(shape, steps, form, backend, coefficients) for form in ("plain", "gram"))
    return "gram" if gram < plain else "plain"


def choose_backend(device: torch.device, dtype: torch.dtype, m: int, n: int) -> Backend:
    """What "auto" stands for, with m <= n the sides of the matrices.

    triton (one triangle of symmetric products): an NVIDIA GPU of compute capability 9.0 or newer, bf16 or fp16,
    m >= 768, both sides multiples of 8 (rows of 16 bytes), Triton installed. torch: everything else. fp32 stays with
    torch as it gains nothing: without tensor cores, cuBLAS is ahead by more than the half that is left out.
    """
    fits = dtype in TRITON_DTYPES and m >= SYMMETRIC_FROM and m * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0
    fits = fits and n * dtype.itemsize % ROW_ALIGNMENT_BYTES == 0
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= SYMMETRIC_CAPABILITY
    return "triton" if fits and gpu and triton_support.installed() else "torch"


def newton_schulz_flops(
    shape: tuple[int, int, int],
    steps: int,
    form: Form = "plain",
    backend: Backend = "torch",
    coefficients: Coefficients = "keller_jordan",
) -> int:
    """Floating point operations of `newton_schulz` on [N, out, in], with triton half of those of symmetric products.

    For m <= n: plain, every step, 2 m^2 n + 2 m^3 symmetric and 2 m^2 n others. Gram, every restart, 2 m^2 n symmetric
    and 2 m^2 n others; every step a product of 2 m^3, all symmetric, and three more except right after a restart.
    Only the number of restarts depends on the coefficients.
    """
    count, m, n = shape[0], min(shape[1:]), max(shape[1:])
    restarts = len(COEFFICIENTS[coefficients].between_restarts(steps))
    wide = steps if form == "plain" else restarts  # products with X: as many symmetric ones as others
    small = steps if form == "plain" else steps + 3 * (steps - restarts)
    symmetric = wide * 2 * m * m * n + small * 2 * m**3
    return count * (symmetric // (2 if backend == "triton" else 1) + wide * 2 * m * m * n)


def _plain(y: torch.Tensor, schedule: list[Triple], products: Products) -> torch.Tensor:
    for a, b, c in schedule:
        gram = products.gram(y)
        polynomial = products.multiply(gram, gram, add=gram, alpha=c, beta=b)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y


def _gram(y: torch.Tensor, schedule: list[list[Triple]], products: Products) -> torch.Tensor:
    for first, *others in schedule:
        a, b, c = first
        gram = products.gram(y)
        polynomial = products.multiply(gram, gram, add=gram, alpha=c, beta=b)  # P(G) - a I
        factor = polynomial.clone()
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        for following in others:
            half = products.multiply(polynomial, gram, add=gram, alpha=1.0, beta=a)
            gram = products.multiply(half, polynomial, add=half, alpha=1.0, beta=a)
            a, b, c = following
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
