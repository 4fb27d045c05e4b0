"""The routed-expert SwiGLU MLP on grouped rows.

Letters: E experts on this rank, R rows (tokens times experts chosen), D hidden, F expert ffn on this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    offsets = rows_per_expert.to(x_RD.device).cumsum(0).to(torch.int32)
    h_RH = F.grouped_mm(x_RD, fc1_EHD.transpose(-2, -1), offs=offsets)
    gate_RF, up_RF = h_RH.chunk(2, dim=-1)
    a_RF = (F.silu(gate_RF) * up_RF * scores_R.unsqueeze(-1)).to(x_RD.dtype)
    return F.grouped_mm(a_RF, fc2_EDF.transpose(-2, -1), offs=offsets)
