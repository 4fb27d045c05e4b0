"""One site of the benchmark of synchronisation: a process that sends tensors in the shapes of a model, in three ways.

A round as a run has it, over the plain transport; the same bytes by plain collectives of gloo, from flat buffers; and
through bare sockets to the next site and from the one before.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Thread
from typing import Any
from unittest import mock

import torch

from pretrain.bench.network import Place
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.decentral import DecentralConfig
from pretrain.config.ownership import owner_of
from pretrain.config.schema import ModelConfig
from pretrain.decentral import site as site_transport
from pretrain.decentral.checking import check_same, digest
from pretrain.decentral.rounds import GlooRound
from pretrain.decentral.sending import from_publishers, mean_of_givers
from pretrain.decentral.transport import Round, Transport, open_transport
from pretrain.model.logical import logical_tensors

OURS, GLOO, SOCKETS = "exchange", "plain gloo", "raw sockets"
PIECE_BYTES = 4 << 20
"""Written to a socket at once."""


@dataclass(frozen=True)
class Parts:
    """Wall seconds of one synchronisation of one site, in the order in which a run has them."""

    meeting: float
    """Until the round is open: messages, and looking ten times a second whether they have come."""
    collectives: float
    staging: float
    """Copies into buckets and out of them, and dividing by the number of sites."""
    vote: float
    applying: float
    """From host memory into the weights."""
    checking: float
    """Hashing all weights that the sites have in common, and comparing."""

    @property
    def exchange(self) -> float:
        """What brings the weights: collectives and staging."""
        return self.collectives + self.staging

    @property
    def total(self) -> float:
        return self.meeting + self.exchange + self.vote + self.applying + self.checking


@dataclass(frozen=True)
class Job:
    """What a site's process needs to know."""

    model: ModelConfig
    decentral: DecentralConfig
    place: Place
    rounds: int


@dataclass(frozen=True)
class Found:
    """What a site's process tells."""

    sent_bytes: int
    """Payload in a synchronisation, as the round has counted it."""
    hops: int
    """Messages that a synchronisation sends one after the other, each when the one before has come."""
    parts: list[Parts]
    """By round of the benchmark."""
    seconds: dict[str, list[float]]
    """Of GLOO and SOCKETS, the same."""


def measure_site(job: Job) -> Found:
    """Meet the other sites, and send with them in each way in turn. In a process of its own."""
    job.place.enter()
    torch.set_num_threads(1)
    with (
        mock.patch.object(site_transport, "GlooRound", TimedRound),
        socket.create_server((job.place.address, 0)) as listener,
        _transport(job.decentral) as transport,
        _ring(transport.open({"listener": listener.getsockname()}), listener) as (ahead, behind),
    ):
        site = _Site(job.model, transport, bucket_bytes=job.decentral.bucket_mib << 20)
        # The first time of anything is slower, and this one counts the bytes.
        site.synchronise()
        site.plain_collectives()
        parts: list[Parts] = []
        seconds: dict[str, list[float]] = {GLOO: [], SOCKETS: []}
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda: parts.append(site.synchronise()),
            GLOO: site.plain_collectives,
            SOCKETS: lambda: pass_around(ahead, behind, site.sent_bytes),
        }
        order = random.Random(0)  # the same at all sites
        for _ in range(job.rounds):
            for name in order.sample(list(ways), len(ways)):
                site.barrier()
                started = time.perf_counter()
                ways[name]()
                if name in seconds:
                    seconds[name].append(time.perf_counter() - started)
        site.barrier()
    return Found(site.sent_bytes, site.hops, parts, seconds)


class TimedRound(GlooRound):
    """A round that notes what its collectives take."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seconds, self.hops = 0.0, 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """See `transport.Round`."""
        self._timed(lambda: super(TimedRound, self).sum_(tensor), hops=2 * (len(self.members) - 1))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `transport.Round`."""
        return self._timed(lambda: super(TimedRound, self).all_gather(tensor), hops=len(self.members) - 1)

    def _timed(self, collective: Callable[[], Any], *, hops: int) -> Any:
        started = time.perf_counter()
        result = collective()
        self.seconds += time.perf_counter() - started
        self.hops += hops
        return result


class _Site:
    """Tensors of one site, and two ways to send them."""

    def __init__(self, model: ModelConfig, transport: Transport, *, bucket_bytes: int) -> None:
        self._transport, self._bucket_bytes = transport, bucket_bytes
        self._round = self._open()
        site, members = self._round.site, self._round.members
        torch.manual_seed(site)
        tensors = [tensor for tensor in logical_tensors(model) if tensor.trainable]
        self._shared = [torch.randn(tensor.shape) for tensor in tensors if not tensor.is_expert]
        self._experts = [
            expert
            for tensor in tensors
            if tensor.is_expert
            for expert in torch.randn(tensor.shape).to(torch.bfloat16).unbind()
        ]
        self._publishers = [
            owner_of(expert, len(members))
            for tensor in tensors
            if tensor.is_expert
            for expert in range(tensor.shape[0])
        ]
        owned = [e for e, owner in zip(self._experts, self._publishers, strict=True) if owner == site]
        self._flat = torch.zeros(sum(tensor.numel() for tensor in self._shared))
        self._own = torch.zeros(sum(expert.nbytes for expert in owned), dtype=torch.uint8)
        self._all = [torch.zeros_like(self._own) for _ in members]
        self.sent_bytes = self.hops = 0

    def barrier(self) -> None:
        """Wait for the other sites."""
        self._round.sum_(torch.zeros(1))

    def synchronise(self) -> Parts:
        """What a run does at a synchronisation."""
        marks = [time.perf_counter()]

        def mark() -> None:
            marks.append(time.perf_counter())

        round_ = self._round = self._open()
        mark()
        shared = mean_of_givers(round_, self._shared, round_.members, bucket_bytes=self._bucket_bytes)
        experts = from_publishers(round_, self._experts, self._publishers, bucket_bytes=self._bucket_bytes)
        self.sent_bytes, self.hops, collectives = round_.sent_bytes, round_.hops, round_.seconds
        mark()
        if not round_.commit(True):
            raise RuntimeError("a round was not committed: a site has failed")
        mark()
        for tensor, new in zip([*self._shared, *self._experts], [*shared, *experts], strict=True):
            if new is not None:
                tensor.copy_(new)
        mark()
        check_same(round_, digest([*self._shared, *self._experts]))
        mark()
        meeting, exchange, vote, applying, checking = (b - a for a, b in pairwise(marks))
        return Parts(meeting, collectives, exchange - collectives, vote, applying, checking)

    def plain_collectives(self) -> None:
        """The same bytes by one all-reduce and one all-gather, out of buffers that are there."""
        group: Any = self._round.group  # its stub lacks these
        group.allreduce([self._flat]).wait()
        group.allgather([self._all], [self._own]).wait()

    def _open(self) -> TimedRound:
        round_ = self._transport.open({})
        assert isinstance(round_, TimedRound)
        return round_


def pass_around(ahead: socket.socket, behind: socket.socket, count: int) -> None:
    """Send so many bytes to the next site, and receive as many from the one before, at the same time."""
    sending = Thread(target=_send, args=(ahead, count))
    sending.start()
    buffer = memoryview(bytearray(PIECE_BYTES))
    while count:
        received = behind.recv_into(buffer[: min(count, PIECE_BYTES)])
        if not received:
            raise ConnectionError("the site before this one has gone")
        count -= received
    sending.join()


def _send(to: socket.socket, count: int) -> None:
    piece = memoryview(bytearray(PIECE_BYTES))
    for start in range(0, count, PIECE_BYTES):
        to.sendall(piece[: min(PIECE_BYTES, count - start)])


@contextmanager
def _transport(config: DecentralConfig) -> Iterator[Transport]:
    transport = open_transport(config, Ranks())
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def _ring(round_: Round, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Sockets to the next site and from the one before."""
    address, port = round_.headers[round_.members[(round_.site + 1) % len(round_.members)]]["listener"]
    with socket.create_connection((address, port)) as ahead:
        behind, _ = listener.accept()
        with behind:
            yield ahead, behind
