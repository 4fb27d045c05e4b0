"""Tensors between the sites of a round, through host buffers of bounded size.

Everything received is staged in host memory: nothing of the model changes before the round is committed. Lists of
tensors are, shape by shape, the same on the ranks of an outer group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.decentral.transport import Round
from pretrain.optim.exchange import gather_lanes, window


def mean_of_givers(
    round_: Round, tensors: Sequence[torch.Tensor], givers: Sequence[int], *, bucket_bytes: int
) -> list[torch.Tensor]:
    """The mean of each tensor over the sites `givers`: fp32 on the host, the same bits at every member.

    Raises RoundError when a member fails.
    """
    staged = [torch.empty(tensor.shape, dtype=torch.float32) for tensor in tensors]
    into = [tensor.view(-1) for tensor in staged]
    own = [tensor.detach().reshape(-1) for tensor in tensors]
    total = sum(flat.numel() for flat in into)
    bucket = torch.empty(min(total, max(1, bucket_bytes // 4)))
    for start in range(0, total, len(bucket) or 1):
        stop = min(total, start + len(bucket))
        part = bucket[: stop - start]
        pieces = list(window(into, start, stop))
        if round_.site in givers:
            _copy_into(part, list(window(own, start, stop)))
        else:
            part.zero_()
        round_.sum_(part)
        part /= len(givers)
        _copy_out(part, pieces)
    return staged


def from_source(
    round_: Round, tensors: Sequence[torch.Tensor], source: int, *, bucket_bytes: int
) -> list[torch.Tensor]:
    """What site `source` has in place of these fp32 tensors, on the host. Raises RoundError when a member fails."""
    return mean_of_givers(round_, tensors, [source], bucket_bytes=bucket_bytes)


def from_publishers(
    round_: Round, tensors: Sequence[torch.Tensor], publishers: Sequence[int], *, bucket_bytes: int
) -> list[torch.Tensor | None]:
    """Each tensor as its publisher, a member, has it, on the host, byte by byte; None for those this site publishes.

    Raises RoundError when a member fails.
    """
    staged = [
        None if publisher == round_.site else torch.empty(tensor.shape, dtype=tensor.dtype)
        for tensor, publisher in zip(tensors, publishers, strict=True)
    ]
    lanes: list[list[torch.Tensor]] = [[] for _ in round_.members]
    for tensor, copy, publisher in zip(tensors, staged, publishers, strict=True):
        lanes[round_.members.index(publisher)].append(_bytes_of(tensor if copy is None else copy))
    if len(round_.members) > 1 and tensors:
        # The buffer to send, and one to receive from every member.
        chunk = max(1, bucket_bytes // (len(lanes) + 1))
        gather_lanes(lanes, round_.members.index(round_.site), chunk, round_.all_gather, host=True)
    return staged


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a flat view of its bytes: gloo need not know the element type."""
    return tensor.detach().view(-1).view(torch.uint8)


def _copy_into(buffer: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    for piece, part in zip(pieces, buffer.split([piece.numel() for piece in pieces]), strict=True):
        part.copy_(piece)


def _copy_out(buffer: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    for piece, part in zip(pieces, buffer.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(part)
