"""Who is there: a sign of life of every site on the board, for the messages of those who wait, and for the coordinator.

Who takes part in a round is not decided by it (see `torchft_transport`).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pretrain.decentral.board import Board, BoardError
from pretrain.decentral.votes import Decisions

BEAT_SECONDS = 1.0
GONE_SECONDS = 10.0
"""A site is gone when its sign has not changed for so long. A beat may be late: Python's lock can be held for seconds
while a large file is written."""


class Presence:
    """This site's sign of life, written by a thread of its own, on rank 0.

    On every new connection the thread also writes down the decisions again that this process knows, as the board may
    be a new one.

    Args:
        board: for this object alone.
        decisions: what is written to a new board.
        beat: called with every sign of life.
    """

    def __init__(self, board: Board, site: int, decisions: Decisions, beat: Callable[[], None] = lambda: None) -> None:
        self._board, self._site, self._decisions, self._beat = board, site, decisions, beat
        self._status: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid(), "waiting": False}
        self._wake, self._ended = threading.Event(), threading.Event()
        self._published_on = 0
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def say(self, **status: Any) -> None:
        """Change what the sign says, at once."""
        self._status = self._status | status
        self._wake.set()

    def close(self) -> None:
        """Leave: the sign is taken down, if the board is there."""
        self._ended.set()
        self._wake.set()
        self._thread.join(2 * self._board.seconds)

    def _run(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            self._beat()
            try:
                self._board.set(
                    _key(self._site), json.dumps(self._status | {"beat": count, "decided": self._decisions.last})
                )
                if self._published_on != self._board.connections:
                    self._decisions.publish(self._board)
                    self._published_on = self._board.connections
            except BoardError:
                pass  # whoever needs an answer from the board says so; this is tried again
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()
        with suppress(BoardError):  # then nobody is there to see it
            self._board.delete([_key(self._site)])


@dataclass(frozen=True)
class _Sign:
    text: str
    changed: float
    """When somebody here saw it change, by their own clock."""


class Watch:
    """The signs of life of all sites, as somebody sees them who looks now and then."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._last: dict[int, _Sign] = {}
        self._left: set[int] = set()
        self._looked = 0.0

    def look(self, board: Board) -> None:
        """Read the signs. Raises BoardError."""
        self._looked = time.monotonic()
        for site in range(self._sites):
            text = board.get(_key(site))
            if text is None:
                self._left |= self._last.keys() & {site}
                continue
            self._left.discard(site)
            if site not in self._last or self._last[site].text != text:
                self._last[site] = _Sign(text, self._looked)

    def here(self) -> dict[int, dict[str, Any]]:
        """What the sites that are there say of themselves."""
        there = [site for site in sorted(self._last) if site not in self._left and self.silence(site) < GONE_SECONDS]
        return {site: json.loads(self._last[site].text) for site in there}

    def silence(self, site: int) -> float:
        """Seconds for which a site had shown no new sign at the last look; 0 if it was never there."""
        return self._looked - self._last[site].changed if site in self._last else 0.0

    def describe(self, site: int) -> str:
        """Where a site is that does not come."""
        if site not in self._last:
            return f"site {site} (not started, or started elsewhere with another decentral.coordinator)"
        status = json.loads(self._last[site].text)
        where = f"on {status['host']}, process {status['process']}"
        if site in self._left:
            return f"site {site} (stopped; was {where})"
        if site not in self.here():
            return f"site {site} (silent for {self.silence(site):.0f} s; was {where})"
        return f"site {site} (training, or stuck, {where})"


def _key(site: int) -> str:
    return f"sites/{site}"
