"""One projection of all local experts in one tensor, of which some train and the others are frozen.

Kernels want the experts of a rank end to end, [E, out, in]; megatron-core's DDP and the optimizer go by parameters, and
give memory to those that require a gradient. So the parameters are views of the one tensor: each has consecutive
experts that all train or are all frozen. Where every expert trains, the tensor is the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pretrain_kernels.grouped import taken_over


class StackedWeight(torch.nn.Module):
    """The same projection of every local expert, [E, out, in].

    storage: its memory, taken over. trains: whether an expert does, [E].

    Parameters are called `weight` if there is one, and `weight_<first expert>` otherwise.
    """

    def __init__(self, storage: torch.Tensor, trains: Sequence[bool]) -> None:
        super().__init__()
        assert len(trains) == len(storage), f"{len(trains)} marks for {len(storage)} experts"
        # A plain attribute: as a parameter or a buffer it would be found beside its own parts.
        self._storage = None if all(trains) else storage
        self._starts: list[int] = []
        for train, members in groupby(range(len(storage)), key=trains.__getitem__):
            experts = list(members)
            weight = torch.nn.Parameter(storage[experts[0] : experts[-1] + 1], requires_grad=train)
            # megatron-core's mark for gradients that are reduced over the expert data-parallel group. Set at every
            # expert-parallel size: with expert tensor parallelism the groups differ even when that size is 1.
            weight.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter("weight" if all(trains) else f"weight_{experts[0]}", weight)
            self._starts.append(experts[0])

    def parts(self) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """(its first local expert, the parameter), in the order of the experts."""
        return zip(self._starts, self.parameters(), strict=True)

    def trained(self) -> list[tuple[int, torch.nn.Parameter]]:
        """The `parts` that train."""
        return [(start, weight) for start, weight in self.parts() if weight.requires_grad]

    def stack(self) -> torch.Tensor:
        """All experts [E, out, in] for a kernel.

        Its gradient, which has to have room for all of them, reaches the experts that train. A kernel that has added to
        the `main_grad` of `trained` gives none.
        """
        if self._storage is None:
            return next(self.parameters())
        starts, weights = [start for start, _ in self.trained()], [weight for _, weight in self.trained()]
        return _Stack.apply(self._storage, starts, *weights)  # type: ignore[no-untyped-call, no-any-return]

    def check_views(self) -> None:
        """Raise AssertionError if something gave a parameter memory of its own, which the kernels would not see."""
        if self._storage is None:
            return
        for start, weight in self.parts():
            expected = self._storage[start : start + len(weight)]
            found = (weight.data_ptr(), weight.dtype, weight.device, weight.stride())
            assert found == (expected.data_ptr(), expected.dtype, expected.device, expected.stride()), (
                f"experts from {start} on have left the stack of all experts"
            )


class _Stack(torch.autograd.Function):
    """The storage as it is, differentiable in the parameters that are views of it."""

    @staticmethod
    def forward(ctx: Any, storage: torch.Tensor, starts: Sequence[int], *weights: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.parts = list(zip(starts, weights, strict=True))
        return storage

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = grads
        if gradient is None:
            return (None, None, *(taken_over(weight) for _, weight in ctx.parts))
        return (None, None, *(gradient[start : start + len(weight)] for start, weight in ctx.parts))
