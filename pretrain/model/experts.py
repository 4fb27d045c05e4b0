"""The routed-expert SwiGLU MLP on grouped rows.

Letters: E experts on this rank, R rows (tokens times experts chosen), D hidden, F expert ffn on this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# torch's grouped_mm wants every row of its operands to start at a multiple of so many bytes.
ROW_ALIGNMENT_BYTES = 16


def grouped_swiglu(
    x_RD: torch.Tensor,
    fc1_EHD: torch.Tensor,  # H = 2F: gate rows, then up rows
    fc2_EDF: torch.Tensor,
    rows_per_expert: torch.Tensor,
    scores_R: torch.Tensor,
) -> torch.Tensor:
    """Rows, grouped by expert, through `fc2 @ (silu(gate) * up * score)` of their expert -> [R, D].

    The score multiplies the activation before the down projection, in fp32, as in megatron-core's experts.
    Experts without rows are fine and get zero gradients, and so is a rank without any row.

    Args:
        rows_per_expert: int64 [E], on any device, summing to R.
        scores_R: combine weight of each row.
    """
    h_RH = grouped_linear(x_RD, fc1_EHD, rows_per_expert)
    gate_RF, up_RF = h_RH.chunk(2, dim=-1)
    a_RF = (F.silu(gate_RF) * up_RF * scores_R.unsqueeze(-1)).to(x_RD.dtype)
    return grouped_linear(a_RF, fc2_EDF, rows_per_expert)


def grouped_linear(x_RI: torch.Tensor, weight_EOI: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
    """Rows [R, I] times the transposed weight [O, I] of their expert -> [R, O]."""
    if _fits_grouped_mm(weight_EOI):
        ends = rows_per_expert.to(x_RI.device).cumsum(0).to(torch.int32)
        out = F.grouped_mm(x_RI.contiguous(), weight_EOI.transpose(-2, -1), offs=ends)
        if out.requires_grad:
            # It refuses gradients in other memory layouts, such as the broadcast one of a sum.
            out.register_hook(torch.Tensor.contiguous)
        return out
    parts = zip(x_RI.split(rows_per_expert.tolist()), weight_EOI, strict=True)
    return torch.cat([rows @ weight.T for rows, weight in parts])


def _fits_grouped_mm(weight_EOI: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes the product and its gradients: no fp64, and no odd widths."""
    widths = weight_EOI.shape[1:]
    aligned = all(width * weight_EOI.element_size() % ROW_ALIGNMENT_BYTES == 0 for width in widths)
    return aligned and weight_EOI.dtype != torch.float64
