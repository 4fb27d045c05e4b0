"""`pretrain coordinator`: the process through which sites find each other and agree.

It keeps the board (`board`) at `decentral.coordinator` and, at the next port, torchft's lighthouse. No weights go
through it, and it has no state that a run needs: it can be started again at any time, and the sites go on. While it is
away, they train on to their next round, and wait there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pretrain.config.decentral import DecentralConfig
from pretrain.decentral.board import Address, Board, BoardError, address_of, serve_board
from pretrain.decentral.meetings import BOARD_SECONDS
from pretrain.decentral.presence import BEAT_SECONDS, Watch
from pretrain.decentral.torchft_transport import lighthouse_of, serve_lighthouse
from pretrain.errors import UserError


def coordinate(config: DecentralConfig | None) -> int:
    """Serve until SIGTERM or Ctrl-C, and say who is there when that changes; returns the exit code.

    Raises:
        UserError: the configuration needs no coordinator, or nothing can listen there.
    """
    if config is None:
        raise UserError("[decentral]: this section is missing, so that there is nothing to coordinate; add it")
    if config.transport != "torchft":
        raise UserError(
            f'decentral.transport = "{config.transport}": needs no coordinator, as site 0 does without; start the sites'
        )
    ended = threading.Event()
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in heard}
    try:
        with serving(config) as address:
            print(
                f"coordinator: listening on {address} and {lighthouse_of(address)}; "
                f"a round needs {config.quorum} of {config.sites} sites",
                flush=True,
            )
            _watch(config, Address(address.host, address.port), ended)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


@contextmanager
def serving(config: DecentralConfig) -> Iterator[Address]:
    """The board and the lighthouse, for the time of a `with` block; gives where the board listens."""
    address = Address(address_of(config.bind), Address.parse(config.coordinator).port)
    board = serve_board(address.host, address.port)
    lighthouse = serve_lighthouse(config, address)
    try:
        yield address
    finally:
        lighthouse.shutdown()
        del board, lighthouse


def _watch(config: DecentralConfig, address: Address, ended: threading.Event) -> None:
    board, watch = Board(address, BOARD_SECONDS), Watch(config.sites)
    before: Mapping[int, dict[str, Any]] = {}
    while not ended.wait(BEAT_SECONDS):
        try:
            watch.look(board)
        except BoardError as error:
            print(f"coordinator: the board is slow to answer ({error})", flush=True)
            continue
        now = watch.here()
        for site in range(config.sites):
            if site in now and (site not in before or now[site]["process"] != before[site]["process"]):
                where = f"{now[site]['host']}, process {now[site]['process']}"
                print(f"coordinator: site {site} is here ({where})", flush=True)
            elif site in before and site not in now:
                print(f"coordinator: {watch.describe(site)}", flush=True)
        before = now
