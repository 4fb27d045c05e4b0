"""Collectives of the optimizer. Each is called by all ranks of a group with tensors of the same shapes.

gloo gathers equal sizes only, so gathers are padded; uneven all_to_all_single it has.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.distributed import ProcessGroup

# Elements received per gather over all ranks: enough to fill any link, little beside a model. A guess.
GATHER_NUMEL = 1 << 26


def spread(
    tensors: Sequence[torch.Tensor],
    owners: Sequence[int],
    group: ProcessGroup | None,
    *,
    gather_numel: int = GATHER_NUMEL,
) -> None:
    """Overwrite every tensor (contiguous) with that of its owner, a rank of `group`.

    Tensors of one dtype travel together: owners' tensors are laid end to end and gathered in equal chunks.
    """
    size = get_pg_size(group)
    if size == 1:
        return
    lanes_of: dict[torch.dtype, list[list[torch.Tensor]]] = defaultdict(lambda: [[] for _ in range(size)])
    for tensor, owner in zip(tensors, owners, strict=True):
        lanes_of[tensor.dtype][owner].append(tensor.view(-1))
    for lanes in lanes_of.values():
        gather_lanes(lanes, int(get_pg_rank(group)), max(1, gather_numel // size), partial(_all_gather, group=group))


def gather_lanes(
    lanes: Sequence[Sequence[torch.Tensor]],
    rank: int,
    chunk: int,
    all_gather: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    *,
    host: bool = False,
) -> None:
    """`lanes[r]` are the flat tensors rank r owns; fill everyone else's, up to `chunk` elements of each at a time.

    all_gather: a tensor of this rank -> those of all ranks, in order. `host`: it takes tensors on the CPU, wherever the
    lanes are.
    """
    longest = max(sum(flat.numel() for flat in lane) for lane in lanes)
    # Equal parts: what fills up the last one is sent, too.
    chunk = -(-longest // -(-longest // chunk))
    like = next(flat for lane in lanes for flat in lane)
    # Lanes that are shorter are padded with whatever is in the buffer.
    sent = like.new_empty(chunk, device="cpu" if host else None)
    for start in range(0, longest, chunk):
        pieces = [list(window(lane, start, start + chunk)) for lane in lanes]
        numels = [[piece.numel() for piece in lane] for lane in pieces]
        if pieces[rank]:
            torch._foreach_copy_(list(sent[: sum(numels[rank])].split(numels[rank])), pieces[rank])
        for other, row in enumerate(all_gather(sent)):
            if other != rank and pieces[other]:
                torch._foreach_copy_(pieces[other], list(row[: sum(numels[other])].split(numels[other])))


def _all_gather(tensor: torch.Tensor, *, group: ProcessGroup | None) -> list[torch.Tensor]:
    received = tensor.new_empty(get_pg_size(group), len(tensor))
    dist.all_gather(list(received.unbind()), tensor, group=group)
    return list(received.unbind())


def window(lane: Sequence[torch.Tensor], start: int, stop: int) -> Iterator[torch.Tensor]:
    """Views of the elements [start, stop) of flat tensors laid end to end."""
    position = 0
    for flat in lane:
        piece = flat[max(0, start - position) : max(0, stop - position)]
        if piece.numel():
            yield piece
        position += flat.numel()


def map_whole(
    parts: Sequence[torch.Tensor],
    axes: Sequence[int],
    fn: Callable[[int, torch.Tensor], torch.Tensor],
    group: ProcessGroup | None,
) -> list[torch.Tensor]:
    """`fn(i, whole)` of at most as many tensors as `group` has ranks, one on each; returns this rank's parts.

    parts[i] is this rank's equal part of tensor i along axis axes[i], in rank order; `fn` keeps the shape. Rank i gets
    the parts of tensor i, puts them together, and sends the parts of the result back.
    """
    size, rank = get_pg_size(group), get_pg_rank(group)
    assert len(parts) <= size, f"{len(parts)} tensors for {size} ranks"
    numels = [part.numel() for part in parts] + [0] * (size - len(parts))
    sent = torch.cat([part.reshape(-1) for part in parts])
    collected = sent.new_empty(size * numels[rank])
    dist.all_to_all_single(
        collected, sent, output_split_sizes=[numels[rank]] * size, input_split_sizes=numels, group=group
    )
    results = collected
    if rank < len(parts):
        axis = axes[rank]
        whole = torch.cat([piece.view(parts[rank].shape) for piece in collected.chunk(size)], dim=axis)
        results = torch.cat([piece.reshape(-1) for piece in fn(rank, whole).chunk(size, dim=axis)])
    mine = torch.empty_like(sent)
    dist.all_to_all_single(
        mine, results, output_split_sizes=numels, input_split_sizes=[numels[rank]] * size, group=group
    )
    return [piece.view(part.shape) for piece, part in zip(mine.split(numels), parts, strict=False)]


def check_same(text: str, group: ProcessGroup | None, *, what: str, device: torch.device) -> None:
    """Raise RuntimeError on all ranks of `group` unless `text` is the same on all: collectives would mix up tensors."""
    if get_pg_size(group) == 1:
        return
    mine = torch.tensor([zlib.crc32(text.encode())], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(get_pg_size(group))]
    dist.all_gather(gathered, mine, group=group)
    values = [int(value) for value in gathered]
    if len(set(values)) > 1:
        raise RuntimeError(f"{what} differ between the ranks of a group (checksums {values})")
