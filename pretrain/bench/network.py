"""A slow network between sites on one machine: a namespace each, and a thread that passes packets on, late.

In user space, as the kernels of many small machines have no netem: every namespace has a TUN device, and what a site
sends on it waits here for its turn on the link and for the delay. Needs root, Linux and `ip`.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TUN_DEVICE = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001  # linux/if_tun.h
MTU = 9000
"""Jumbo frames: fewer packets for Python to pass on."""
QUEUE_SECONDS = 0.1
"""Of data before a link; what comes on top is lost, as on a router."""
LISTEN_SECONDS = 0.1


class NetworkError(Exception):
    """The system does not allow such a network."""


@dataclass(frozen=True)
class Link:
    """How every site is connected: what it sends goes at this rate, and arrives after half of the round trip."""

    bits_per_second: float
    round_trip_seconds: float

    def __str__(self) -> str:
        return f"{self.bits_per_second / 1e6:g} Mbit/s, {self.round_trip_seconds * 1e3:g} ms"


@dataclass(frozen=True)
class Place:
    """Where a site is in the network."""

    address: str
    namespace: str | None = None
    """None: that of this process."""

    def enter(self) -> None:
        """Move this thread, and those it will start, into the namespace."""
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.namespace}") as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"namespace {self.namespace} cannot be entered")


def check_possible() -> None:
    """Raise NetworkError where there can be none."""
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root")
    if shutil.which("ip") is None:
        raise NetworkError("network namespaces need `ip` (Debian: iproute2)")
    if not TUN_DEVICE.exists():
        raise NetworkError(f"there is no {TUN_DEVICE}")


@contextmanager
def slow_network(sites: int, link: Link) -> Iterator[list[Place]]:
    """Places for so many sites, for the time of a `with` block; on the main thread. Raises NetworkError."""
    check_possible()
    ended = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_exit_on_sigterm())
        places, ends = [], {}
        for site in range(sites):
            place = Place(f"10.213.0.{site + 1}", f"site{site}-{os.getpid()}"[:15])
            ends[place.address] = stack.enter_context(_end(place))
            places.append(place)
        wire = threading.Thread(target=pass_on, args=(ends, link, ended), daemon=True)
        wire.start()
        try:
            yield places
        finally:
            ended.set()
            wire.join()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM, too: a namespace outlives the process that made it."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _end(place: Place) -> Iterator[int]:
    """A namespace whose packets for other sites are read from, and theirs written to, a file descriptor."""
    name = str(place.namespace)
    _ip("netns", "add", name)
    try:
        tun = _tun_device(name)
        try:
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"{place.address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up", "mtu", str(MTU))
            _ip("-n", name, "link", "set", "lo", "up")
            yield tun
        finally:
            os.close(tun)
    finally:
        _ip("netns", "del", name)


def _tun_device(name: str) -> int:
    try:
        tun = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        try:
            # 16 bytes of name, the flags, and room for the rest of struct ifreq.
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN_NO_PI))
        except OSError:
            os.close(tun)
            raise
    except OSError as error:
        raise NetworkError(f"{TUN_DEVICE}: {error.strerror}") from error
    return tun


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def pass_on(ends: Mapping[str, int], link: Link, ended: threading.Event) -> None:
    """Move IPv4 packets between file descriptors, by address, as links of this kind do, until `ended`."""
    free_at = dict.fromkeys(ends.values(), 0.0)  # when the way of this site is free again
    under_way: list[tuple[float, int, int, bytes]] = []  # time of arrival, order, to whom, what
    order = itertools.count()
    while not ended.is_set():
        wait = under_way[0][0] - time.monotonic() if under_way else LISTEN_SECONDS
        readable, _, _ = select.select(list(free_at), [], [], min(LISTEN_SECONDS, max(0.0, wait)))
        for end in readable:
            for packet in _waiting(end):
                target = ends.get(socket.inet_ntoa(packet[16:20])) if packet[0] >> 4 == 4 else None
                start = max(time.monotonic(), free_at[end])
                if target is None or start > time.monotonic() + QUEUE_SECONDS:
                    continue
                free_at[end] = start + 8 * len(packet) / link.bits_per_second
                arrival = free_at[end] + link.round_trip_seconds / 2
                heapq.heappush(under_way, (arrival, next(order), target, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            os.write(target, packet)


def _waiting(end: int) -> Iterator[bytes]:
    """The packets that can be read now, not too many at once."""
    for _ in range(32):
        try:
            yield os.read(end, MTU)
        except BlockingIOError:
            return
