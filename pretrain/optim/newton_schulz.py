"""Newton-Schulz iteration: the approximate orthogonal factor of a batch of matrices, with matrix products only."""

from __future__ import annotations

import torch

# Keller Jordan's quintic, steep at zero: singular values above 3e-3 of the Frobenius norm land in [0.68, 1.21] after
# five steps, not at exactly one. https://kellerjordan.github.io/posts/muon/
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Smallest Frobenius norm that is still scaled up to one, so that zero stays zero (torch.optim.Muon's value).
EPS = 1e-7


def newton_schulz(x: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """U V^T of every matrix U S V^T in `x`, roughly.

    x: [N, out, in]. Returns the same shape and dtype; iterates in `dtype`. A zero matrix gives zero.
    """
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    y = (x / norm).to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    if tall:  # the Gram matrix of the short side is the small one
        y = y.mT
    for _ in range(steps):
        gram = torch.bmm(y, y.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


def newton_schulz_flops(shape: tuple[int, int, int], steps: int) -> int:
    """Floating point operations of `newton_schulz` on [N, out, in]: 4 m^2 n + 2 m^3 a step and matrix, m <= n."""
    count, m, n = shape[0], min(shape[1:]), max(shape[1:])
    return count * steps * (4 * m * m * n + 2 * m**3)
