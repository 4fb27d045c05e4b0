"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioners, block by block.

    g' = QL^T g QR;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g'^2
    u  = QL [(QL^T m QR) / (sqrt(v) + eps)] QR^T * sqrt(1 - b2^n) / (1 - b1^n)
    L  = s L + (1 - s) g g^T;  R = s R + (1 - s) g^T g

n counts the updates after the first step, which only makes L, R and their eigenbases QL, QR (largest eigenvalue first).
After every `every_steps` updates the bases move by one power iteration, Q = qr(L Q), with columns in the order of their
Rayleigh quotients, and v follows that order. m stays in the weights' own basis. This is the order of the authors' code
(github.com/nikhilvyas/SOAP): L and R have the step's gradient before Q follows them. arXiv 2509.02046 ran another one:
its power iteration takes L and R of the step before, and its n counts the first step.

A block is *fresh* while its bases are zero: at the start of the run, and when a growth brought it in or changed the
size of blocks. Its first gradient gets the treatment of the first step, whatever other blocks do, and m begins at zero:
together with v = 0, an m from before would make updates of up to 1 / sqrt(1 - b2) the usual size. n counts the steps of
the run for it, too, so that its first update is (1 - b1) / sqrt(1 - b2) of a usual one.

After one gradient, a Gram matrix says nothing of as many directions as a rectangular block is longer than wide; their
eigenvectors are any that are orthogonal to the rest. Updates along them hang on the last bits of the products, which
batches of another size may change on a GPU; the next gradients settle them.

A block without gradient, as of an expert without tokens, keeps its bases; moments fade and the update with them, as
Adam's does. A fresh one stays fresh and does not move. Decay applies at all times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pretrain.config.optim import OptimConfig
from pretrain.optim.blocks import BlockRule, have_gradient


class Soap(BlockRule):
    """SOAP on hidden matrices; fp32 throughout."""

    def __init__(self, config: OptimConfig) -> None:
        super().__init__(config.soap.block_size)
        self._config = config

    def block_flops(self, rows: int, columns: int) -> float:
        """Three changes of basis and both Gram matrices; the basis updates' share of a step.

        An n x n QR is 4/3 n^3 for the reflections and as much for Q (Golub and Van Loan, Matrix Computations, 5.2).
        """
        every_step = (3 * 2 + 2) * rows * columns * (rows + columns)
        basis_update = (2 + 8 / 3) * (rows**3 + columns**3)
        return every_step + basis_update / self._config.soap.every_steps

    def block_directions(
        self, grads: torch.Tensor, state: Mapping[str, torch.Tensor], *, key: str, numbers: Sequence[int], step: int
    ) -> torch.Tensor:
        """The Adam step of every block in its basis; zero for fresh blocks, whose basis is zero."""
        b1, b2 = self._config.beta1, self._config.beta2
        left, right, second = state["basis_left"], state["basis_right"], state["exp_avg_sq"]
        is_set = left[:, :, 0].any(1)
        average = state["exp_avg"].lerp_(grads, 1 - b1).mul_(is_set.view(-1, 1, 1))
        second.lerp_((left.mT @ grads @ right).square_(), 1 - b2)
        found = left @ ((left.mT @ average @ right) / (second.sqrt() + self._config.eps)) @ right.mT
        updates = max(step - 1, 1)  # in the first step all is zero, and so is what this divides
        found *= math.sqrt(1 - b2**updates) / (1 - b1**updates)

        for name, gram in (("gram_left", grads @ grads.mT), ("gram_right", grads.mT @ grads)):
            state[name].lerp_(gram, 1 - self._config.soap.shampoo_beta)
        moves = have_gradient(grads)
        _set_bases(state, (moves & ~is_set).nonzero().flatten())
        if (step - 1) % self._config.soap.every_steps == 0:
            _move_bases(state, (moves & is_set).nonzero().flatten())
        return found


def _set_bases(state: Mapping[str, torch.Tensor], fresh: torch.Tensor) -> None:
    """Set the bases of some blocks, by place, to the eigenvectors of their Gram matrices."""
    for side in ("left", "right"):
        vectors = torch.linalg.eigh(state[f"gram_{side}"][fresh]).eigenvectors
        state[f"basis_{side}"][fresh] = vectors.flip(-1)


def _move_bases(state: Mapping[str, torch.Tensor], which: torch.Tensor) -> None:
    """Move the bases of some blocks, by place, by one power iteration; the second moment follows their order."""
    second = state["exp_avg_sq"][which]
    for side, dim in (("left", 1), ("right", 2)):
        basis = state[f"basis_{side}"][which]
        product = state[f"gram_{side}"][which] @ basis
        order = (basis * product).sum(1).argsort(dim=1, descending=True, stable=True)
        state[f"basis_{side}"][which] = torch.linalg.qr(product.take_along_dim(order.unsqueeze(1), 2)).Q
        second = second.take_along_dim(order.unsqueeze(3 - dim), dim)
    state["exp_avg_sq"][which] = second
