"""Pulled boxes against the global tensors they come from, on random tilings, holders, wants, dtypes and buffers."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.ranks import Ranks
from pretrain.growth import pull as module
from pretrain.growth.pull import Traffic, Wanted, pull
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")
WORLD = 4
TINY, LARGE = 256, 1 << 20


def values(key: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A global tensor of random bits, the same on all ranks; bit patterns of NaN included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(sum(key.encode()))
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def tiles(rng: random.Random, box: Box, depth: int) -> list[Box]:
    """A random tiling of `box` that is no grid."""
    axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
    if depth == 0 or not axes:
        return [box]
    axis = rng.choice(axes)
    at = rng.randrange(1, box.shape[axis])
    low, high, offset = list(box.shape), list(box.shape), list(box.offset)
    low[axis], high[axis], offset[axis] = at, box.shape[axis] - at, box.offset[axis] + at
    halves = Box(box.offset, tuple(low)), Box(tuple(offset), tuple(high))
    return [tile for half in halves for tile in tiles(rng, half, depth - 1)]


def some_box(rng: random.Random, shape: Sequence[int]) -> Box:
    offset = tuple(rng.randrange(extent) for extent in shape)
    return Box(offset, tuple(rng.randint(1, extent - start) for extent, start in zip(shape, offset, strict=True)))


def whole(tensor: torch.Tensor) -> Box:
    return Box((0,) * tensor.dim(), tuple(tensor.shape))


def hold(key: str, tensor: torch.Tensor, box: Box) -> ShardedTensor:
    """This rank's own copy of `box` of a global tensor; strided where it has two axes or more, as a view of another."""
    part = tensor[box.slices_in(whole(tensor))]
    data = part.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else part.clone()
    return ShardedTensor(key, data, data.dtype, box.shape, tuple(tensor.shape), box.offset, None)


class Received:
    """A wanted box, filled by the pieces that arrive; counts how often each entry does."""

    def __init__(self, key: str, tensor: torch.Tensor, box: Box) -> None:
        self.expected = tensor[box.slices_in(whole(tensor))]
        self.data = torch.zeros_like(self.expected)
        self.count = torch.zeros(box.shape, dtype=torch.int64)
        self.box = box
        self.pieces: list[tuple[int, ...]] = []
        self.wanted = Wanted(key, box.offset, box.shape, self.place)

    def place(self, offset: tuple[int, ...], piece: torch.Tensor) -> None:
        assert (piece.dtype, piece.device) == (self.data.dtype, CPU)
        where = Box(offset, tuple(piece.shape)).slices_in(self.box)
        self.data[where] = piece
        self.count[where] += 1
        self.pieces.append(offset)

    def problem(self) -> str | None:
        if not (self.count == 1).all():
            return f"{self.wanted.key}: entries placed {sorted(set(self.count.flatten().tolist()))} times"
        if not torch.equal(bits(self.data), bits(self.expected)):
            return f"{self.wanted.key}: wrong values"
        return None


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@dataclasses.dataclass
class Case:
    """What all ranks hold and want: (key, box) by rank."""

    tensors: dict[str, torch.Tensor]
    held: list[list[tuple[str, Box]]]
    wanted: list[list[tuple[str, Box]]]

    def pull(self, rank: int, buffer_bytes: int) -> tuple[list[Received], Traffic]:
        held = [hold(key, self.tensors[key], box) for key, box in self.held[rank]]
        before = [bits(tensor.data).clone() for tensor in held]
        received = [Received(key, self.tensors[key], box) for key, box in self.wanted[rank]]
        wanted = [one.wanted for one in received]
        traffic = pull(wanted, held, device=CPU, ranks=Ranks(), buffer_bytes=buffer_bytes)
        assert all(torch.equal(bits(tensor.data), old) for tensor, old in zip(held, before, strict=True))
        return received, traffic


def random_case(seed: int, world: int) -> Case:
    rng = random.Random(seed)
    shapes = {"matrix": (13, 9), "experts": (4, 2, 7, 5), "norm": (37,), "count": (), "long": (3, 211)}
    dtypes = [torch.float32, torch.bfloat16, torch.int64]
    tensors = {key: values(key, shape, dtypes[(at + seed) % 3]) for at, (key, shape) in enumerate(shapes.items())}
    held: list[list[tuple[str, Box]]] = [[] for _ in range(world)]
    for key, tensor in tensors.items():
        for tile in tiles(rng, whole(tensor), depth=3):
            for rank in rng.sample(range(world), rng.randint(1, world)):
                held[rank].append((key, tile))
    for one in held:
        rng.shuffle(one)
    wanted = [[(key, some_box(rng, tensors[key].shape)) for key in rng.choices([*shapes], k=6)] for _ in range(world)]
    # All want the same box, one of them twice; one rank wants nothing at all.
    for one in wanted:
        one.append(("experts", whole(tensors["experts"])))
    wanted[0] *= 2
    if world > 1:
        wanted[seed % world] = []
    return Case(tensors, held, wanted)


def overlapping(one: Box, others: Sequence[Box]) -> int:
    return sum(common.numel for other in others if (common := one.intersect(other)))


def check_case(seed: int, rank: int, world: int) -> None:
    """One case with tiny and large buffers, twice: right values, bounded buffers, all traffic accounted for."""
    case = random_case(seed, world)
    itemsize = {key: tensor.dtype.itemsize for key, tensor in case.tensors.items()}
    wanted_bytes = sum(box.numel * itemsize[key] for key, box in case.wanted[rank])
    # Disjoint tiles, so every entry that this rank holds is local.
    local_bytes = sum(
        overlapping(box, [mine for name, mine in case.held[rank] if name == key]) * itemsize[key]
        for key, box in case.wanted[rank]
    )
    for buffer_bytes in (TINY, LARGE):
        received, traffic = case.pull(rank, buffer_bytes)
        assert [problem for one in received if (problem := one.problem())] == []
        assert (traffic.local_bytes, traffic.received_bytes) == (local_bytes, wanted_bytes - local_bytes)
        assert traffic.buffer_bytes <= 2 * buffer_bytes
        sums = torch.tensor([traffic.sent_bytes, -traffic.received_bytes])
        if world > 1:
            dist.all_reduce(sums)
        assert int(sums.sum()) == 0
        again, same = case.pull(rank, buffer_bytes)
        assert (same, [one.pieces for one in again]) == (traffic, [one.pieces for one in received])
        if world > 1:
            assert traffic.rounds == 1 if buffer_bytes == LARGE else traffic.rounds > 1
        else:
            assert (traffic.rounds, traffic.buffer_bytes, traffic.sent_bytes) == (0, 0, 0)


def check_local(rank: int) -> None:
    """Every rank wants what it and another hold: nothing travels. What it lacks comes over the network."""
    tensor = values("weight", (8, 6), torch.float32)
    held = [[("weight", Box((4 * (rank % 2), 0), (4, 6)))] for rank in range(WORLD)]
    case = Case({"weight": tensor}, held, held)
    (received,), traffic = case.pull(rank, TINY)
    assert received.problem() is None
    assert traffic == Traffic(0, 0, 4 * 6 * 4, 0, 0)
    (received,), traffic = dataclasses.replace(case, wanted=[held[rank ^ 1] for rank in range(WORLD)]).pull(rank, LARGE)
    assert received.problem() is None
    assert (traffic.received_bytes, traffic.local_bytes, traffic.rounds) == (4 * 6 * 4, 0, 1)


def check_spread(rank: int) -> None:
    """Even and odd ranks hold and lack boxes together, and yet both holders serve about as much."""
    keys = [f"layers.{layer}" for layer in range(64)]
    tensors = {key: values(key, (4,), torch.float32) for key in keys}
    held = [[(key, Box((2 * (rank % 2),), (2,))) for key in keys] for rank in range(WORLD)]
    case = Case(tensors, held, [held[rank ^ 1] for rank in range(WORLD)])
    mean = 64 * 2 * 4

    def most_sent() -> int:
        received, traffic = case.pull(rank, LARGE)
        assert [one.problem() for one in received] == [None] * 64
        most = torch.tensor(traffic.sent_bytes)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    assert most_sent() < 1.5 * mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.zlib, "crc32", lambda _: rank)
        assert most_sent() == 2 * mean


def check_refusals(rank: int) -> None:
    """A fault on one rank is the same error on all, before anything is placed."""
    tensor = values("weight", (8, 6), torch.float32)
    rows = [("weight", Box((2 * rank, 0), (2, 6))) for rank in range(WORLD)]
    want = [[("weight", whole(tensor))] for _ in range(WORLD)]

    def refused(case: Case, words: str) -> None:
        placed: list[tuple[int, ...]] = []
        held = [hold(key, case.tensors[key], box) for key, box in case.held[rank]]
        wanted = [Wanted(key, box.offset, box.shape, lambda at, _: placed.append(at)) for key, box in case.wanted[rank]]
        with pytest.raises(RuntimeError, match=words):
            pull(wanted, held, device=CPU, ranks=Ranks())
        assert placed == []

    good = Case({"weight": tensor}, [[row] for row in rows], want)
    assert good.pull(rank, TINY)[0][0].problem() is None
    named = r"weight: the held boxes do not cover the wanted one at \[0, 0\] of shape \[8, 6\]; .*"
    missing = dataclasses.replace(good, held=[[], *good.held[1:]])
    refused(missing, named + r"36 of 48 entries \(gap\)")
    # Only rank 2 wants what is missing, and all ranks know.
    refused(dataclasses.replace(missing, wanted=[[], [], want[2], []]), "rank 2: AssertionError: " + named)
    refused(dataclasses.replace(good, held=[[], [], [], []]), named)
    # Cut unlike on one rank: not copies of the others' boxes.
    unlike = [[*good.held[0], ("weight", Box((0, 0), (2, 3)))], *good.held[1:]]
    refused(dataclasses.replace(good, held=unlike), named + "overlap")
    mixed = {"weight": tensor if rank else tensor.view(torch.int32)}
    refused(
        dataclasses.replace(good, tensors=mixed), r"weight: \['I32', \[8, 6\]\] and, on rank 1, \['F32', \[8, 6\]\]"
    )


def check_tampering(rank: int) -> None:
    """Holders that serve the right boxes in the wrong order are seen by `Received`."""
    tensor = values("weight", (8, 6), torch.float32)
    held = [[("weight", Box((2 * rank, 0), (2, 6)))] for rank in range(WORLD)]
    halves = [("weight", Box((row, 0), (1, 6))) for row in range(8)]
    case = Case({"weight": tensor}, held, [halves] * WORLD)
    with pytest.MonkeyPatch.context() as patch:
        exchange = module._exchange
        patch.setattr(module, "_exchange", lambda *args: [rows[::-1] for rows in exchange(*args)])
        received, _ = case.pull(rank, TINY)
        # A rank's own rows are never asked for.
        wrong = ["weight: wrong values" if row // 2 != rank else None for row in range(8)]
        assert [one.problem() for one in received] == wrong
    received, _ = case.pull(rank, TINY)
    assert [one.problem() for one in received] == [None] * 8


def all_checks() -> None:
    rank = dist.get_rank()
    for seed in range(12):
        check_case(seed, rank, WORLD)
    check_local(rank)
    check_spread(rank)
    check_refusals(rank)
    check_tampering(rank)


def test_four_ranks():
    run_ranks(all_checks, WORLD)


@pytest.mark.parametrize("seed", range(3))
def test_one_process_without_a_group(seed):
    assert not dist.is_initialized()
    check_case(seed, rank=0, world=1)


def test_one_process_refuses_what_nobody_holds():
    case = random_case(0, 1)
    case.held[0] = [(key, box) for key, box in case.held[0] if key != "experts"]
    with pytest.raises(RuntimeError, match="experts: the held boxes do not cover"):
        case.pull(0, LARGE)


def test_received_sees_each_kind_of_damage():
    tensor = values("weight", (4, 3), torch.float32)
    for pieces, words in (
        ([(0, 4)], None),
        ([(0, 2), (2, 4)], None),
        ([(0, 3)], r"placed [0, 1] times"),
        ([(0, 4), (3, 4)], r"placed [1, 2] times"),
    ):
        received = Received("weight", tensor, whole(tensor))
        for start, stop in pieces:
            received.place((start, 0), tensor[start:stop])
        assert received.problem() == (words and f"weight: entries {words}")
    received.count.fill_(1)
    received.data[0, 0].view(torch.int32).add_(1)
    assert received.problem() == "weight: wrong values"


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 8, 30, 1000])
def test_cuts_cover_the_box_within_the_limit(numel):
    box = Box((1, 0, 4), (3, 5, 7))
    counts = torch.zeros(4, 5, 11, dtype=torch.int64)
    parts = list(module._cut(box, numel))
    for part in parts:
        assert 1 <= part.numel <= numel
        counts[part.slices_in(Box((0, 0, 0), (4, 5, 11)))] += 1
    inside = torch.zeros_like(counts)
    inside[box.slices_in(Box((0, 0, 0), (4, 5, 11)))] = 1
    assert torch.equal(counts, inside)
    if numel in (1, 1000):
        assert len(parts) == {1: box.numel, 1000: 1}[numel]


@pytest.mark.parametrize(("sizes", "limit"), list(itertools.product([(1, 1, 1), (7, 100, 3), (64,)], [16, 64, 1024])))
def test_rounds_are_bounded_and_aligned(sizes, limit):
    pieces = [module._Piece(Box((0,), (size,)), torch.bfloat16, lambda *_: None) for size in sizes]
    rounds = module._rounds(pieces, limit)
    for parts in rounds:
        assert 0 < module._nbytes(parts) <= limit
        ends = [0, *(part.stop for part in parts)]
        assert all(part.start % 16 == 0 and part.start >= end for part, end in zip(parts, ends, strict=False))
    assert sum(part.box.numel for parts in rounds for part in parts) == sum(sizes)


def test_buffers_of_less_than_a_piece_are_refused():
    pieces = [module._Piece(Box((0,), (1,)), torch.int64, lambda *_: None)]
    with pytest.raises(AssertionError, match="buffer_bytes 15 is too small"):
        module._move([pieces], [pieces], device=CPU, ranks=Ranks(), group=None, buffer_bytes=15)
