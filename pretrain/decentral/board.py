"""The board: a small key-value store in one process that all sites can reach, for what they have to agree on.

It is torch's TCPStore, so that gloo can find its peers through it as well, with what a wide network asks for: it
listens on one address only, no operation takes longer than its time, and a client outlives the server. A restarted
server is empty; whoever wrote something that still matters writes it again (`votes`, `presence`).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch.distributed as dist

from pretrain.errors import UserError

PROBE_SECONDS = 5.0
"""How long connecting may take."""

_NOTHING = "\0"

T = TypeVar("T")


class BoardError(Exception):
    """The board did not answer in time, or is gone. The next call connects anew."""


@dataclass(frozen=True)
class Address:
    """Where something listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> Address:
        """From HOST:PORT, as `decentral.coordinator` has it."""
        host, _, port = text.rpartition(":")
        return Address(host.strip("[]"), int(port))


def address_of(bind: str) -> str:
    """The address that `decentral.bind` means: itself, or the first one of the network interface it names.

    Raises:
        UserError: no single address of this machine.
    """
    if bind in ("0.0.0.0", "::", ""):
        raise UserError(
            f'decentral.bind = "{bind}": must be one address, as the other sites are told to connect to it; give one '
            "that they can reach"
        )
    interface = psutil.net_if_addrs().get(bind)
    if interface is not None:
        internet = [entry.address for entry in interface if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if internet:
            return internet[0].partition("%")[0]
    try:
        with socket.create_server((bind, 0), family=_family(bind)):
            pass
    except OSError as error:
        raise UserError(
            f'decentral.bind = "{bind}": no address or network interface of this machine ({_reason(error)}); '
            "give one that the other sites can reach"
        ) from error
    return bind


def serve_board(host: str, port: int) -> dist.TCPStore:
    """Listen on one address. The board lives as long as what is returned.

    Raises:
        UserError: the port is taken, or the address is none of this machine's.
    """
    address = Address(host, port)
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=1024)
    except OSError as error:
        raise UserError(
            f'decentral.coordinator = "{address}": cannot listen there ({_reason(error)}); is a coordinator '
            "running already? Give decentral.coordinator another port, and decentral.bind an address of this machine"
        ) from error
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect(address: Address, seconds: float) -> dist.TCPStore:
    """A new connection to the board at `address`. Raises BoardError."""
    try:
        # TCPStore's own attempts write a C++ stack trace each.
        socket.create_connection((address.host, address.port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise BoardError(f"{address}: {_reason(error)}") from error
    timeout = timedelta(seconds=seconds)
    return within(
        seconds + PROBE_SECONDS,
        lambda: dist.TCPStore(address.host, address.port, is_master=False, wait_for_workers=False, timeout=timeout),
    )


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it does in so many seconds; else it is left to itself. Raises BoardError.

    TCPStore waits for an answer for ever where the machine at the other end has vanished or was frozen.
    """
    result: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        if isinstance(failure[0], dist.DistError):
            raise BoardError(str(failure[0]).splitlines()[0]) from failure[0]
        raise failure[0]
    if not result:
        raise BoardError(f"no answer within {seconds:g} s")
    return result[0]


class Board:
    """A client of the board. All methods raise BoardError. For one thread at a time."""

    def __init__(self, address: Address, seconds: float) -> None:
        self.address = address
        self.seconds = seconds
        self.connections = 0
        """Connections made so far: one more means that the board may have been restarted, and be empty."""
        self._store: dist.TCPStore | None = None

    def get(self, key: str) -> str | None:
        """The value of a key, None where there is none."""
        # TCPStore's own `get` waits for a key that is not there. This gives back what it expects in vain.
        found = self._call(lambda store: store.compare_set(key, _NOTHING, _NOTHING)).decode()
        return None if found == _NOTHING else found

    def set(self, key: str, value: str) -> None:
        """Write a value, and see that it has arrived."""

        def write(store: dist.TCPStore) -> None:
            store.set(key, value)
            store.check([key])  # `set` alone has no answer, and would not notice a board that is gone

        self._call(write)

    def set_once(self, key: str, value: str) -> str:
        """Write a value where there is none, in one step; returns the one that is there now."""
        return self._call(lambda store: store.compare_set(key, "", value)).decode()

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all the keys have values."""
        return self._call(lambda store: store.check(list(keys)))

    def all_keys(self) -> list[str]:
        """Every key there is."""
        return self._call(lambda store: store.list_keys())

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys, if they are there."""
        self._call(lambda store: [store.delete_key(key) for key in keys])

    def _call(self, operation: Callable[[dist.TCPStore], T]) -> T:
        if self._store is None:
            self._store = connect(self.address, self.seconds)
            self.connections += 1
        store = self._store
        try:
            return within(self.seconds, lambda: operation(store))
        except BoardError:
            self._store = None
            raise


def _reason(error: OSError) -> str:
    """Without what Python adds to it."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
