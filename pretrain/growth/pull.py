"""Boxes of keyed, sharded tensors, from the ranks that hold them to the ranks that want them.

Every rank says which boxes of which global tensors it holds (megatron-core ShardedTensors) and which boxes it wants.
No rank ever has a whole global tensor, unless it wants one: only metadata is known everywhere.

1. Ranks tell each other what they hold; copies of a box become one entry with several holders.
2. Each rank finds the held boxes that its wanted boxes meet, chooses a holder for each of these pieces, and sends the
   holder the list.
3. Pieces a rank holds itself are handed over as views. The others travel as raw bytes, in rounds of all-to-all through
   buffers of bounded size. Both ends of a pair derive the same rounds from the same list.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint.boxes import Box, lies_in, tiling_problem
from pretrain.checkpoint.format import DTYPE_NAMES, DTYPES
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.stages import BUFFER_BYTES

# Bytes. A piece has to start at a multiple of its element size (8 at most) to be viewed as its dtype; GPUs copy in
# units of up to 16.
ALIGNMENT = 16

Place = Callable[[tuple[int, ...], torch.Tensor], None]


@dataclass(frozen=True)
class Wanted:
    """A box of a global tensor that this rank wants."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place
    """Called with every piece that arrives: its offset in the global tensor, and its entries in the holder's dtype on
    the device of the pull. The pieces tile the box exactly, in no particular order. They are views of memory that is
    overwritten later, or of the held tensors: copy what is to stay, write to neither."""

    @property
    def box(self) -> Box:
        return Box(tuple(self.offset), tuple(self.shape))


@dataclass(frozen=True)
class Traffic:
    """What a pull moved, seen from this rank."""

    sent_bytes: int
    received_bytes: int
    """From other ranks, as `sent_bytes` without padding."""
    local_bytes: int
    """Held by this rank itself."""
    rounds: int
    """Calls of all-to-all; the same on all ranks."""
    buffer_bytes: int
    """Send and receive buffer together."""


@torch.no_grad()
def pull(
    wanted: Sequence[Wanted],
    held: Sequence[ShardedTensor],
    *,
    device: torch.device,
    ranks: Ranks,
    group: dist.ProcessGroup | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Traffic:
    """Call `place` of every wanted box with the pieces that make it up, wherever they are held.

    Collective over `group` (default: the default group), whose backend moves the data and has to take tensors on
    `device`. `ranks` are the same processes, for small values on the host. `buffer_bytes`, the same on all ranks,
    bounds the send buffer and the receive buffer each.

    Several ranks may hold equal copies of a box; all boxes of a key, copies aside, are disjoint. The tensors in `held`
    must not change during the call. `place` must not raise: the other ranks would wait for this one.

    Raises:
        RuntimeError: on all ranks, before anything moves, if an entry of a wanted box is held nowhere, or in boxes
            that overlap, or if ranks disagree about a key. Names the key and the box.
    """
    if ranks.size > 1:
        assert (dist.get_rank(group), dist.get_world_size(group)) == (ranks.rank, ranks.size), "two sets of processes"
    sources = _share(held, ranks)
    with ranks.together():
        requests = _choose_holders(wanted, sources, ranks)
    local, requests[ranks.rank] = requests[ranks.rank], []
    asked = _exchange([[request.row() for request in of_one] for of_one in requests], ranks)
    incoming = [[request.piece() for request in of_one] for of_one in requests]
    outgoing = [[_outgoing(held, row) for row in of_one] for of_one in asked]
    for request in local:
        request.wanted.place(request.box.offset, _entries(held[request.position], request.box).to(device))
    rounds, allocated = _move(outgoing, incoming, device=device, ranks=ranks, group=group, buffer_bytes=buffer_bytes)
    return Traffic(
        sent_bytes=sum(piece.nbytes for of_one in outgoing for piece in of_one),
        received_bytes=sum(piece.nbytes for of_one in incoming for piece in of_one),
        local_bytes=sum(request.piece().nbytes for request in local),
        rounds=rounds,
        buffer_bytes=allocated,
    )


@dataclass(frozen=True)
class _Source:
    """A box that some ranks hold."""

    box: Box
    dtype: torch.dtype
    positions: Mapping[int, int]
    """Rank -> place in its list of held tensors."""


@dataclass(frozen=True)
class _Piece:
    """Entries on their way: the common part of a wanted box and a held one, as either end sees it."""

    box: Box
    dtype: torch.dtype
    visit: Callable[[Box, torch.Tensor], object]
    """Called with a part of the box and its stretch of a buffer, which the holder fills and the other end reads."""

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _Request:
    """A piece that this rank wants, and where the chosen holder has it."""

    wanted: Wanted
    box: Box
    dtype: torch.dtype
    position: int

    def row(self) -> list[Any]:
        """What the holder has to know."""
        return [self.position, self.box.offset, self.box.shape]

    def piece(self) -> _Piece:
        return _Piece(self.box, self.dtype, lambda part, entries: self.wanted.place(part.offset, entries))


def _outgoing(held: Sequence[ShardedTensor], row: Sequence[Any]) -> _Piece:
    """The piece that another rank's `_Request.row` asks for."""
    position, offset, shape = row
    tensor = held[position]
    box = Box(tuple(offset), tuple(shape))
    return _Piece(box, tensor.dtype, lambda part, entries: entries.copy_(_entries(tensor, part)))


def _entries(tensor: ShardedTensor, box: Box) -> torch.Tensor:
    """A view of those entries of `tensor` that lie in `box`, a part of what it holds."""
    return tensor.data[box.slices_in(_box(tensor))]


def _box(tensor: ShardedTensor) -> Box:
    return Box(tuple(tensor.global_offset), tuple(tensor.local_shape))


def _share(held: Sequence[ShardedTensor], ranks: Ranks) -> dict[str, list[Any]]:
    """What all ranks hold together: key -> [dtype, global shape, boxes], a box being [offset, shape, ranks, positions].

    Rank 0 merges copies, so that what everyone receives grows with the boxes of the model, not with those of all ranks.
    """
    with ranks.together():
        rows = []
        for tensor in held:
            box = _box(tensor)
            assert tensor.data is not None, tensor
            assert lies_in(box, tensor.global_shape), tensor
            rows.append([tensor.key, DTYPE_NAMES[tensor.dtype], tuple(tensor.global_shape), box.offset, box.shape])
    everyone = ranks.gather(rows)
    with ranks.together():
        merged = _merge(everyone)
    return ranks.broadcast(merged)


def _merge(everyone: Sequence[Sequence[Sequence[Any]]]) -> dict[str, list[Any]]:
    """Every rank's rows of key, dtype, global shape, offset and shape, as in `_share`."""
    about: dict[str, list[Any]] = {}
    holders: dict[str, dict[Any, dict[int, int]]] = {}
    for rank, rows in enumerate(everyone):
        for position, (key, dtype, global_shape, offset, shape) in enumerate(rows):
            known = about.setdefault(key, [dtype, global_shape])
            assert known == [dtype, global_shape], f"{key}: {known} and, on rank {rank}, {[dtype, global_shape]}"
            boxes = holders.setdefault(key, {})
            boxes.setdefault((tuple(offset), tuple(shape)), {})[rank] = position
    return {
        key: [*about[key], [[*box, list(copies), list(copies.values())] for box, copies in boxes.items()]]
        for key, boxes in holders.items()
    }


def _choose_holders(wanted: Sequence[Wanted], shared: Mapping[str, list[Any]], ranks: Ranks) -> list[list[_Request]]:
    """The pieces of all wanted boxes, by holder."""
    requests: list[list[_Request]] = [[] for _ in range(ranks.size)]
    sources = {key: list(_sources(shared[key])) for key in {want.key for want in wanted} if key in shared}
    for want in wanted:
        found = [(source, part) for source in sources.get(want.key, ()) if (part := source.box.intersect(want.box))]
        _check_covered(want, [part for _, part in found])
        for source, part in found:
            holder = _holder(want.key, source, ranks.rank)
            requests[holder].append(_Request(want, part, source.dtype, source.positions[holder]))
    return requests


def _holder(key: str, source: _Source, rank: int) -> int:
    """The rank that serves a box to `rank`: itself if it can, else one of the holders by hash.

    Which ranks hold and lack a box follows their place in the mesh. `rank % holders` does so, too, and may send all
    that lack it to one holder.
    """
    if rank in source.positions:
        return rank
    holders = list(source.positions)
    return holders[zlib.crc32(f"{rank} {key} {source.box.offset}".encode()) % len(holders)]


def _sources(entry: Sequence[Any]) -> Iterator[_Source]:
    dtype, _, boxes = entry
    for offset, shape, holders, positions in boxes:
        box = Box(tuple(offset), tuple(shape))
        yield _Source(box, DTYPES[dtype], dict(zip(holders, positions, strict=True)))


def _check_covered(want: Wanted, parts: Sequence[Box]) -> None:
    """Raise AssertionError unless `parts`, which lie in the wanted box, cover it exactly once."""
    moved = [Box(tuple(a - b for a, b in zip(part.offset, want.offset, strict=True)), part.shape) for part in parts]
    problem = tiling_problem(want.shape, moved)
    assert problem is None, (
        f"{want.key}: the held boxes do not cover the wanted one at {list(want.offset)} of shape {list(want.shape)}; "
        f"counted from its start, {problem}"
    )


def _exchange(rows: Sequence[Sequence[Any]], ranks: Ranks) -> list[list[Any]]:
    """Send rows[r] to rank r; returns the rows that each rank sent to this one."""
    if ranks.size == 1:
        return [list(rows[0])]
    texts = [json.dumps(of_one).encode() for of_one in rows]
    sent = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    sent_sizes = [len(text) for text in texts]
    sizes = torch.empty(ranks.size, dtype=torch.int64)
    dist.all_to_all_single(sizes, torch.tensor(sent_sizes), group=ranks.group)
    received = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, sizes.tolist(), sent_sizes, group=ranks.group)
    return [json.loads(part.numpy().tobytes()) for part in received.split(sizes.tolist())]


@dataclass(frozen=True)
class _Part:
    """What of a piece travels in one round."""

    piece: _Piece
    box: Box
    start: int
    """Bytes from the start of its pair's stretch of the buffer."""

    @property
    def stop(self) -> int:
        return self.start + self.box.numel * self.piece.dtype.itemsize


def _move(
    outgoing: Sequence[Sequence[_Piece]],
    incoming: Sequence[Sequence[_Piece]],
    *,
    device: torch.device,
    ranks: Ranks,
    group: dist.ProcessGroup | None,
    buffer_bytes: int,
) -> tuple[int, int]:
    """Send outgoing[r] to rank r, whose incoming[this rank] lists the same boxes.

    Returns the number of rounds and the bytes of both buffers. A pair of ranks gets an equal part of the buffer for
    each partner of the rank that has most: growth makes few partners, so dividing by all ranks would waste the buffer.
    """
    partners = max(sum(1 for pieces in side if pieces) for side in (outgoing, incoming))
    busiest = _largest(partners, ranks)
    if busiest == 0:
        return 0, 0
    limit = buffer_bytes // busiest // ALIGNMENT * ALIGNMENT
    assert limit > 0, f"buffer_bytes {buffer_bytes} is too small for {busiest} partners of {ALIGNMENT} bytes"
    sending = [_rounds(pieces, limit) for pieces in outgoing]
    receiving = [_rounds(pieces, limit) for pieces in incoming]
    count = _largest(max(map(len, [*sending, *receiving])), ranks)
    sent, received = (torch.empty(_most_bytes(side), dtype=torch.uint8, device=device) for side in (sending, receiving))
    for number in range(count):
        now_sending, now_receiving = ([_round(of_one, number) for of_one in side] for side in (sending, receiving))
        sent_sizes, received_sizes = list(map(_nbytes, now_sending)), list(map(_nbytes, now_receiving))
        _visit(now_sending, sent)
        dist.all_to_all_single(
            received[: sum(received_sizes)], sent[: sum(sent_sizes)], received_sizes, sent_sizes, group=group
        )
        _visit(now_receiving, received)
    return count, sent.nbytes + received.nbytes


def _largest(value: int, ranks: Ranks) -> int:
    """The largest of all ranks' values, on all ranks."""
    return ranks.broadcast(max(ranks.gather(value), default=None))


def _rounds(pieces: Sequence[_Piece], limit: int) -> list[list[_Part]]:
    """The parts of the pieces between a pair of ranks, in rounds of at most `limit` bytes."""
    rounds: list[list[_Part]] = []
    for piece in pieces:
        for box in _cut(piece.box, limit // piece.dtype.itemsize):
            start = _nbytes(rounds[-1]) if rounds else limit
            if _Part(piece, box, start).stop > limit:
                rounds.append([])
                start = 0
            rounds[-1].append(_Part(piece, box, start))
    return rounds


def _cut(box: Box, numel: int) -> Iterator[Box]:
    """Parts of `box` of at most `numel` >= 1 entries, cut along leading axes."""
    if box.numel <= numel:
        yield box
        return
    axis = next(axis for axis, extent in enumerate(box.shape) if extent > 1)
    step = max(1, numel * box.shape[axis] // box.numel)
    for start in range(0, box.shape[axis], step):
        offset, shape = list(box.offset), list(box.shape)
        offset[axis] += start
        shape[axis] = min(step, box.shape[axis] - start)
        yield from _cut(Box(tuple(offset), tuple(shape)), numel)


def _round(rounds: Sequence[Sequence[_Part]], number: int) -> Sequence[_Part]:
    """Nothing once a pair has finished before others."""
    return rounds[number] if number < len(rounds) else ()


def _nbytes(parts: Sequence[_Part]) -> int:
    """The stretch of the buffer that the parts of a pair take, padded so that the next one is aligned."""
    return -(-parts[-1].stop // ALIGNMENT) * ALIGNMENT if parts else 0


def _most_bytes(rounds: Sequence[Sequence[Sequence[_Part]]]) -> int:
    """Bytes of this rank's largest round with all others."""
    return max((sum(map(_nbytes, now)) for now in zip_longest(*rounds, fillvalue=())), default=0)


def _visit(parts: Sequence[Sequence[_Part]], buffer: torch.Tensor) -> None:
    """Show every part, by partner, its stretch of the buffer."""
    base = 0
    for of_one in parts:
        for part in of_one:
            stretch = buffer[base + part.start : base + part.stop]
            part.piece.visit(part.box, stretch.view(part.piece.dtype).view(part.box.shape))
        base += _nbytes(of_one)
