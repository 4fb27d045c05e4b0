"""The routed-expert SwiGLU MLP: one function, several backends, and the rule that chooses among them.

Letters: E experts on this rank, T tokens, K experts of a token, R routed rows, D model width, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from pretrain_kernels import triton_support
from pretrain_kernels.grouped import GROUPED_MM, LOOP, Parts, grouped_experts
from pretrain_kernels.permute import permute, sort_by_expert, unpermute

Backend = Literal["triton", "grouped_mm", "loop"]

# torch's grouped_mm and the tensor descriptors of Hopper want rows to start at a multiple of so many bytes.
ROW_ALIGNMENT_BYTES = 16
TRITON_DTYPES = (torch.bfloat16, torch.float16)
TRITON_CAPABILITY = (8, 0)


class BackendError(ValueError):
    """A backend that was asked for does not take these tensors or this machine; one line that says why."""


@dataclass(frozen=True)
class Grouped:
    """Rows that are grouped by expert already: x is [R, D], first the rows of expert 0."""

    rows_per_expert: torch.Tensor
    """int64 [E], on any device, summing to R (checked where it is on the CPU; anything else is undefined)."""
    scores: torch.Tensor
    """[R] combine weight of each row, fp32."""


@dataclass(frozen=True)
class Tokens:
    """Tokens and the experts they chose: x is [T, D]."""

    experts: torch.Tensor
    """int [T, K]: numbers from 0 to E - 1 (not checked)."""
    scores: torch.Tensor
    """[T, K] combine weight of each choice, fp32."""


def swiglu_experts(
    x: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    routing: Grouped | Tokens,
    *,
    trainable: torch.Tensor | None = None,
    backend: Literal["auto"] | Backend = "auto",
    accumulate_main_grad: bool = False,
    parts: tuple[Parts, Parts] | None = None,
) -> torch.Tensor:
    """`fc2 @ (silu(gate) * up * score)` of every routed row by its expert, with [gate, up] = fc1 @ row.

    The score multiplies the activation before the down projection, as in megatron-core's experts. Experts without
    rows are fine, and so is no row at all: their weight gradients are zeros. Results are bitwise repeatable.
    Differentiable once, in x, fc1, fc2 and the scores.

    Args:
        x: rows [R, D] with `Grouped`, tokens [T, D] with `Tokens`.
        fc1: [E, 2F, D], gate rows, then up rows. Of x's data type, like fc2.
        fc2: [E, D, F].
        trainable: bool [E]. Experts that do not train get zeros as weight gradients, at no cost; gradients flow
            through them to x and the scores.
        backend: see `choose_backend`.
        accumulate_main_grad: add the weight gradients to `fc1.main_grad` and `fc2.main_grad` (fp32) during backward
            instead of returning them, see `grouped.taken_over`. The weights have to be leaves, not views.
        parts: with accumulate_main_grad, the parameters to whose `main_grad` gradients are added, where those of fc1
            and of fc2 are views of them: all experts that train, and no others. fc1 and fc2 get no gradient then.

    Returns:
        [R, D] with `Grouped`; with `Tokens` [T, D], each token's sum over its K rows, in fp32 and in their order.

    Raises:
        BackendError: the backend asked for does not fit.
        ValueError: tensors that do not fit together.
    """
    assert accumulate_main_grad or parts is None, "parts are what main_grad is of"
    _check_tensors(x, fc1, fc2, routing)
    kind = (x.device, x.dtype, *fc2.shape[1:])
    if backend == "auto":
        backend = choose_backend(*kind)
    else:
        check_backend(backend, *kind)
    if backend == "triton":
        # Not at the top: the package works without Triton.
        from pretrain_kernels.triton_experts import swiglu_experts_triton  # noqa: PLC0415

        return swiglu_experts_triton(
            x, fc1, fc2, **vars(routing), trainable=trainable, accumulate_main_grad=accumulate_main_grad, parts=parts
        )
    products = GROUPED_MM if backend == "grouped_mm" else LOOP
    experts = partial(
        grouped_experts, trainable=trainable, products=products, accumulate_main_grad=accumulate_main_grad, parts=parts
    )
    if isinstance(routing, Grouped):
        return experts(x, fc1, fc2, routing.rows_per_expert, routing.scores)
    order = sort_by_expert(routing.experts, len(fc1))
    scores = routing.scores.flatten()[order.choice]
    return unpermute(experts(permute(x, order), fc1, fc2, order.rows_per_expert, scores), order)


def choose_backend(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Backend:
    """What "auto" stands for: the first of triton, grouped_mm and loop that fits.

    - triton: an NVIDIA GPU of compute capability 8.0 or newer, bf16 or fp16, D and F multiples of 8, Triton installed;
    - grouped_mm: any device, not fp64, rows of D and of F elements both a multiple of 16 bytes;
    - loop: everything.
    """
    if device.type == "cuda" and _misfit("triton", device, dtype, D, F) is None:
        return "triton"
    return "grouped_mm" if _misfit("grouped_mm", device, dtype, D, F) is None else "loop"


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype, D: int, F: int) -> None:
    """Raise a BackendError, one line, where `backend` does not take this device, data type and these widths.

    Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1), which is for tests: it takes minutes for what
    others do in milliseconds.
    """
    if problem := _misfit(backend, device, dtype, D, F):
        raise BackendError(f'experts backend "{backend}": {problem}; use "{choose_backend(device, dtype, D, F)}"')


def _misfit(backend: Backend, device: torch.device, dtype: torch.dtype, D: int, F: int) -> str | None:
    """Why a backend cannot be used, in words; None if it can."""
    if backend == "loop":
        return None
    if backend == "triton" and (problem := _triton_misfit(device, dtype)):
        return problem
    if backend == "grouped_mm" and dtype == torch.float64:
        return "torch's grouped_mm does not take fp64"
    if any(width * dtype.itemsize % ROW_ALIGNMENT_BYTES for width in (D, F)):
        return f"rows of D = {D} and F = {F} elements must be multiples of {ROW_ALIGNMENT_BYTES} bytes in {dtype}"
    return None


def _triton_misfit(device: torch.device, dtype: torch.dtype) -> str | None:
    if not triton_support.installed():
        return "Triton is not installed"
    if triton_support.interpreting():
        return None
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, and the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or newer"
    return None if dtype in TRITON_DTYPES else f"takes bf16 and fp16, not {dtype}"


def _check_tensors(x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, routing: Grouped | Tokens) -> None:
    """Raise a ValueError unless the shapes and data types belong together."""
    E, D, F = fc2.shape
    if fc1.shape != (E, 2 * F, D):
        raise ValueError(f"fc1 {tuple(fc1.shape)}: must be [E, 2F, D] of fc2 {tuple(fc2.shape)} [E, D, F]")
    if x.dim() != 2 or x.shape[1] != D:
        raise ValueError(f"x {tuple(x.shape)}: must be [rows, {D}], as wide as the experts")
    if not x.dtype == fc1.dtype == fc2.dtype:
        raise ValueError(f"x, fc1, fc2 in {x.dtype}, {fc1.dtype}, {fc2.dtype}: must be of one data type")
    scores = routing.scores
    rows = scores.shape if isinstance(routing, Grouped) else routing.experts.shape
    if scores.shape != rows or scores.dim() != (1 if isinstance(routing, Grouped) else 2) or len(scores) != len(x):
        raise ValueError(f"scores {tuple(scores.shape)}: must have one entry for every row that is routed")
    if isinstance(routing, Grouped):
        counts = routing.rows_per_expert
        if counts.shape != (E,):
            raise ValueError(f"rows_per_expert {tuple(counts.shape)}: must be [{E}], one entry for every expert")
        # Elsewhere the sum would make the host wait for the device.
        if counts.device.type == "cpu" and int(counts.sum()) != len(x):
            raise ValueError(f"rows_per_expert sums to {int(counts.sum())}: must be the {len(x)} rows of x")
