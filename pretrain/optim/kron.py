"""Kron: PSGD with a Kronecker product of triangular factors (arXiv 1512.04202, 2402.04553), block by block, after
arXiv 2509.02046.

    m = b1 m + (1 - b1) g / ||g||;  G = m / (1 - b1^t);  u = QL^T QL G QR^T QR, its RMS clipped to 1.1

QL and QR are upper triangular, and whiten: they are learnt such that u of noise has the identity as its covariance.
An update of theirs, with V a standard normal matrix:

    D = G + sqrt(2^-23) mean|G| V;  A = QL D QR^T;  B = QL^-T V QR^-1
    QL = QL - lr triu(A A^T - B B^T) QL / |A A^T + B B^T|,  QR likewise with A^T A and B^T B

|.| is a lower bound of the spectral norm. Both factors start at the identity. Every 100th update first scales them to
the same largest entry. All of the first `full_steps` steps update them, then a share of steps that falls as
exp(-0.001 n) to `update_share`; by a counter, so that the same steps do so in every run.

Where we differ from the study: gradients are normalised, and updates clipped, per block, not over the stack of all
layers; V is drawn per block from (tensor, number of the block, step), the same on every layout and after a resume.
Normalised gradients are of one size, so that clipping before does nothing.

A block is *fresh* while its factors are zero: at the start, and when a growth brought it in or changed the size of
blocks. They become the identity with its first gradient and learn when those of all others do: late in a run, that is a
share of the steps only. Its momentum has no bias correction of its own.

A block without gradient, as of an expert without tokens, keeps its factors, which would otherwise whiten what is left
of its momentum to a step of full size; its update fades by b1. Decay applies at all times.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from pretrain.config.optim import KronConfig, OptimConfig
from pretrain.optim.blocks import BlockRule, have_gradient

# Of the study's implementation, levanter (github.com/stanford-crfm/levanter).
LARGEST_RMS = 1.1
SHARE_DECAY = 0.001
BALANCE_EVERY = 100
DAMPING = math.sqrt(2**-23)
SMALLEST_NORM = 1e-16


class Kron(BlockRule):
    """Kron on hidden matrices; fp32 throughout."""

    def __init__(self, config: OptimConfig) -> None:
        super().__init__(config.kron.block_size)
        self._config = config
        self._updates = Updates(config.kron)

    def block_flops(self, rows: int, columns: int) -> float:
        """A step that updates the factors: products for A and u (2 + 4 of 2 n^3 if square), B by two triangular solves
        (n^3), four Gram matrices, and the factors' own products."""
        return (2 * 2 + 2 * 4 + 2 * 2 + 1) * rows * columns * (rows + columns) / 2 + 2 * (rows**3 + columns**3)

    def block_directions(
        self, grads: torch.Tensor, state: Mapping[str, torch.Tensor], *, key: str, numbers: Sequence[int], step: int
    ) -> torch.Tensor:
        """The preconditioned momentum of every block; zero for fresh blocks without gradient."""
        left, right = state["factor_left"], state["factor_right"]
        moves = have_gradient(grads)
        fresh = (moves & (left[:, 0, 0] == 0)).nonzero().flatten()
        for factor in (left, right):
            factor[fresh] = torch.eye(factor.shape[-1], device=factor.device)
        if self._config.kron.normalize_gradients:
            norms = torch.linalg.matrix_norm(grads, keepdim=True)
            grads = grads / (norms + SMALLEST_NORM)
        average = state["exp_avg"].lerp_(grads, 1 - self._config.beta1)
        momentum = average / (1 - self._config.beta1**step)
        number = self._updates.number(step)
        if number is not None:
            which = moves.nonzero().flatten()
            noise = probes(key, step, numbers, grads.shape[1:], grads.device)
            factors = left[which], right[which]
            if number % BALANCE_EVERY == 0:
                factors = balanced(*factors)
            left[which], right[which] = moved_factors(
                *factors, momentum[which], noise[which], lr=self._config.kron.preconditioner_lr
            )
        found = left.mT @ (left @ momentum @ right.mT) @ right
        rms = found.square().mean((1, 2), keepdim=True).sqrt_()
        return found.mul_(LARGEST_RMS / rms.clamp_(min=LARGEST_RMS))


class Updates:
    """Which steps update the factors: those on which a counter of the steps since the last one reaches 1 / share."""

    def __init__(self, config: KronConfig) -> None:
        self._config = config
        self._step = self._count = self._waited = 0

    def share(self, step: int) -> float:
        """Share of steps around `step` (from 1) that update the factors."""
        falling = math.exp(-SHARE_DECAY * max(step - self._config.full_steps, 0))
        return max(self._config.update_share, falling)

    def number(self, step: int) -> int | None:
        """The how manieth update step `step` makes, from 1; None if it makes none.

        A function of `step` alone: after a resume the counter goes through all steps again.
        """
        if step < self._step:
            self._step = self._count = self._waited = 0
        while self._step < step:
            self._step += 1
            self._waited += 1
            if self._waited >= 1 / self.share(self._step):
                self._count += 1
                self._waited = 0
        return self._count if self._waited == 0 else None


def probes(key: str, step: int, numbers: Sequence[int], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Standard normal [N, rows, columns], each block seeded by the tensor's key, its number and the step."""
    generator = torch.Generator(device)
    drawn = torch.empty(len(numbers), *shape, device=device)
    for probe, number in zip(drawn, numbers, strict=True):
        digest = hashlib.sha256(f"{key}/{step}/{number}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        probe.normal_(generator=generator)
    return drawn


def moved_factors(
    left: torch.Tensor, right: torch.Tensor, momentum: torch.Tensor, noise: torch.Tensor, *, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors [N, n, n] of a batch of blocks after one update; `noise` is V."""
    damped = momentum + DAMPING * momentum.abs().mean((1, 2), keepdim=True) * noise
    a = left @ damped @ right.mT
    b = torch.linalg.solve_triangular(left.mT, noise, upper=False)
    b = torch.linalg.solve_triangular(right, b, upper=True, left=False)
    return _moved(left, a @ a.mT, b @ b.mT, lr), _moved(right, a.mT @ a, b.mT @ b, lr)


def _moved(factor: torch.Tensor, ours: torch.Tensor, noise: torch.Tensor, lr: float) -> torch.Tensor:
    """A factor after a step that shrinks it where `ours` is larger than `noise`."""
    tiny = torch.finfo(factor.dtype).tiny
    bound = spectral_norm_bound(ours + noise) + tiny
    return factor - (lr / bound) * torch.triu(ours - noise) @ factor


def spectral_norm_bound(matrices: torch.Tensor) -> torch.Tensor:
    """A lower bound of the spectral norms of symmetric matrices [N, n, n], [N, 1, 1]; at most a factor of sqrt(2) below
    them in PSGD's experience: two products from the longest column on."""
    tiny = torch.finfo(matrices.dtype).tiny
    largest = matrices.abs().amax((1, 2), keepdim=True).clamp_(min=tiny)
    scaled = matrices / largest
    longest = scaled.square().sum(1).argmax(1)
    vector = scaled @ scaled.take_along_dim(longest.view(-1, 1, 1), 2)
    vector /= vector.norm(dim=1, keepdim=True).clamp_(min=tiny)
    return largest * (scaled @ vector).norm(dim=1, keepdim=True)


def balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [N, n, n] with the same product and equal largest entries."""
    sizes = [factor.abs().amax((1, 2), keepdim=True) for factor in (left, right)]
    ratio = (sizes[1] / sizes[0]).sqrt_()
    return left * ratio, right / ratio
