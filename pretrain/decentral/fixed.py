"""The plain transport: all sites in every round. Site 0 keeps the board, and whatever fails ends the run.

Every site writes down that it waits, under a fresh token; site 0 sees when all of them do, and names the round to each.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress

from pretrain.config.decentral import DecentralConfig
from pretrain.decentral.board import Address, Board, BoardError, serve_board
from pretrain.decentral.meetings import (
    BOARD_SECONDS,
    POLL_SECONDS,
    ROUNDS,
    Meeting,
    MeetingError,
    Patience,
    exchange_headers,
    sweep,
)
from pretrain.decentral.presence import Presence, Watch
from pretrain.decentral.transport import Header, SitesError
from pretrain.decentral.votes import Decisions


class FixedMeetings:
    """`meetings.Meetings` of all sites."""

    def __init__(self, config: DecentralConfig, ranks: int, host: str, decisions: Decisions) -> None:
        address = Address.parse(config.coordinator)
        self._config, self._ranks, self._decisions = config, ranks, decisions
        self._served = serve_board(host, address.port) if config.site == 0 else None
        self._board = Board(address, BOARD_SECONDS)
        self._presence = Presence(Board(address, BOARD_SECONDS), config.site, decisions)
        self._watch = Watch(config.sites)
        self._past: list[str] = []
        self._lost_since = 0.0

    def meet(self, header: Header, patience: Patience) -> Meeting:
        """See `meetings.Meetings`."""
        while True:
            try:
                name = self._gather(patience)
                sweep(self._board, self._past, name)
                return exchange_headers(
                    self._board,
                    name,
                    site=self._config.site,
                    members=range(self._config.sites),
                    header=header,
                    ranks=self._ranks,
                    patience=patience,
                    timeout_seconds=self._config.timeout_seconds,
                )
            except BoardError as error:
                self._check_board(patience, error)
            except MeetingError:
                pass  # the site that is missing is named when it stays away
            patience.sleep(POLL_SECONDS)

    def close(self) -> None:
        """See `meetings.Meetings`. Site 0 waits until the others have read the last decision, too."""
        self._presence.close()
        late = time.monotonic() + self._config.timeout_seconds
        last = self._decisions.last[:1]
        with suppress(BoardError):  # no others, then, who could ask it
            while self._served and time.monotonic() < late:
                self._watch.look(self._board)
                if all(set(last) <= set(sign["decided"]) for sign in self._watch.here().values()):
                    break
                time.sleep(POLL_SECONDS)
        self._served = None

    def _gather(self, patience: Patience) -> str:
        """Wait until all sites wait; returns the name of the round."""
        token = str(uuid.uuid4())
        mine = _asking(self._config.site)
        self._board.set(mine, token)
        while True:
            self._watch.look(self._board)
            self._lost_since = 0.0
            if self._served:
                self._invite()
            if name := self._board.get(_invited(token)):
                self._board.delete([_invited(token)])
                return name
            if self._board.get(mine) not in (None, token):
                raise SitesError(
                    f"decentral.site = {self._config.site}: another process takes part as this site; give every site a "
                    "number of its own"
                )
            self._check_sites(patience)
            patience.sleep(POLL_SECONDS)

    def _invite(self) -> None:
        """On site 0: if everybody waits, name the round to them."""
        asking = [_asking(site) for site in range(self._config.sites)]
        if not self._board.has(asking):
            return
        tokens = [self._board.get(key) for key in asking]
        self._board.delete(asking)
        name = f"{ROUNDS}{time.time_ns():020d}"
        for token in tokens:
            self._board.set(_invited(str(token)), name)

    def _check_sites(self, patience: Patience) -> None:
        missing = [site for site in range(self._config.sites) if self._board.get(_asking(site)) is None]
        lost = [site for site in missing if self._watch.silence(site) > self._config.timeout_seconds]
        if lost or (missing and patience.left < 0):
            names = ", ".join(self._watch.describe(site) for site in lost or missing)
            limit = (
                f"decentral.timeout_seconds = {self._config.timeout_seconds:g}"
                if lost
                else f"decentral.wait_seconds = {self._config.wait_seconds:g}"
            )
            raise SitesError(
                f'decentral.transport = "fixed": no round without {names}, waited for {limit}; all '
                f'{self._config.sites} sites have to take part: start them all again, or use "torchft"'
            )

    def _check_board(self, patience: Patience, error: BoardError) -> None:
        self._lost_since = self._lost_since or time.monotonic()
        gone = self._board.connections > 0 and time.monotonic() - self._lost_since > self._config.timeout_seconds
        if gone or patience.left < 0:
            raise SitesError(
                f'decentral.coordinator = "{self._config.coordinator}": site 0 does not answer there ({error}); start '
                "it, or give its address"
            ) from error


def _asking(site: int) -> str:
    return f"asking/{site}"


def _invited(token: str) -> str:
    return f"invited/{token}"
