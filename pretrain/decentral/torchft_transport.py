"""Membership by torchft: sites may fail, leave and come back. The one module that imports torchft.

Of torchft (pytorch/torchft) this uses the coordination service: a *lighthouse* that every site sends heartbeats to, and
asks for a *quorum* at each round. The quorum, that is the list of members, is the same for all who are in it. What goes
between the members is ours (`rounds`), and nothing that torchft would unpickle is sent.

How the lighthouse decides. A quorum is complete at once when all members of the last one ask, and everyone else who
asks is in it, too. Else it takes at least `quorum` (decentral.min_sites) sites and more than half of those with a
heartbeat, and waits for the others with a heartbeat until the first that asked has waited for `join_seconds`. A site
without a heartbeat for `DEAD_SECONDS` does not count. Three things follow that this module sees to:

- A site that comes back asks while the others train, and would have waited for longer than join_seconds before the
  first of them asks; the round would then go on without those who ask a moment later. So a request is made anew every
  few seconds until enough sites ask, and only then left to wait.
- A process that was killed and started again within DEAD_SECONDS may be in a quorum twice, and count twice. The one
  that was started last counts, and a quorum with too few sites is no quorum.
- A restarted lighthouse knows no heartbeats yet. A site waits for `SETTLE_SECONDS` after it had to connect anew, so
  that the heartbeats of the others are there before it asks.

Heartbeats are sent by a thread of torchft's own, which Python's lock does not hold up while a large file is written.

With a majority as the minimum, which the rules of the configuration ask for, any two quorums share a site. With less
they may not: sites that reach the lighthouse only while the others do not, as after a network failure, would each go on
alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from types import ModuleType
from typing import Any

from pretrain.config.decentral import DecentralConfig
from pretrain.decentral.board import Address, Board, BoardError
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
from pretrain.errors import UserError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
DEAD_SECONDS = 10.0
SETTLE_SECONDS = 5.0
CONNECT_SECONDS = 3.0
PAUSE_SECONDS = 1.0
LONGEST_REQUEST_SECONDS = 10.0
"""Until enough sites ask."""


def serve_lighthouse(config: DecentralConfig, board: Address) -> Any:
    """Run the lighthouse that belongs to the board at `board`, until `shutdown` of what is returned.

    Raises:
        UserError: torchft is not installed, or the port is taken.
    """
    listen = lighthouse_of(board)
    try:
        return _coordination().LighthouseServer(
            bind=str(listen),
            min_replicas=config.quorum,
            join_timeout_ms=round(1000 * config.join_seconds),
            heartbeat_timeout_ms=round(1000 * DEAD_SECONDS),
        )
    except RuntimeError as error:
        raise UserError(
            f'decentral.coordinator = "{config.coordinator}": cannot listen at {listen}, the next port, which the '
            f"lighthouse needs ({error}); give another port"
        ) from error


def lighthouse_of(board: Address) -> Address:
    """The lighthouse listens at the port after the board's."""
    return Address(board.host, board.port + 1)


class LighthouseMeetings:
    """`meetings.Meetings` of those sites that the lighthouse finds."""

    def __init__(self, config: DecentralConfig, ranks: int, host: str, decisions: Decisions) -> None:
        self._config, self._ranks, self._host = config, ranks, host
        self._torchft = _coordination()
        address = Address.parse(config.coordinator)
        self._url = f"http://{lighthouse_of(address)}"
        # A new one for each start: the lighthouse may still believe in the process before this one.
        self._replica = f"{config.site}:{time.time_ns():020d}"
        self._heartbeat: Any = None
        self._client: Any = None
        self._board = Board(address, BOARD_SECONDS)
        self._watch = Watch(config.sites)
        self._past: list[str] = []
        self._assembled = False
        self._presence = Presence(Board(address, BOARD_SECONDS), config.site, decisions, self._keep_alive)

    def meet(self, header: Header, patience: Patience) -> Meeting:
        """See `meetings.Meetings`."""
        self._presence.say(waiting=True)
        try:
            while True:
                try:
                    return self._attempt(header, patience)
                except (MeetingError, BoardError) as error:
                    logger.warning("round: %s; trying again", error)
                    if patience.left < 0:
                        raise SitesError(self._too_few(str(error))) from error
                    patience.sleep(PAUSE_SECONDS)
        finally:
            self._presence.say(waiting=False)

    def close(self) -> None:
        """See `meetings.Meetings`."""
        self._presence.close()
        self._heartbeat = self._client = None

    def _attempt(self, header: Header, patience: Patience) -> Meeting:
        quorum = self._quorum(patience)
        members = newest([member.replica_id for member in quorum.participants])
        if members.get(self._config.site) != self._replica:
            raise SitesError(
                f"decentral.site = {self._config.site}: another process, started later, takes part as this site; give "
                "every site a number of its own"
            )
        if len(members) < self._config.quorum:
            raise MeetingError(f"{len(members)} of at least {self._config.quorum} sites are there")
        # Its number would not do: a restarted lighthouse counts anew, and one with the same members does not count on.
        name = f"{ROUNDS}{quorum.created.seconds}.{quorum.created.nanos:09d}"
        sweep(self._board, self._past, name)
        return exchange_headers(
            self._board,
            name,
            site=self._config.site,
            members=sorted(members),
            header=header,
            ranks=self._ranks,
            patience=patience,
            timeout_seconds=self._config.timeout_seconds,
        )

    def _quorum(self, patience: Patience) -> Any:
        """Ask the lighthouse, again and again, until it answers."""
        lost = False
        while True:
            try:
                self._assemble(patience)
                if self._client is None:
                    self._client = self._torchft.LighthouseClient(self._url, timedelta(seconds=CONNECT_SECONDS))
                    patience.sleep(SETTLE_SECONDS if lost else 0)
                return self._client.quorum(self._replica, timedelta(seconds=self._request_seconds()))
            except (TimeoutError, RuntimeError, BoardError) as error:
                if patience.left < 0:
                    raise SitesError(self._too_few(str(error))) from error
                if not isinstance(error, TimeoutError):  # it is gone, not only silent as there are too few sites
                    self._client, lost = None, True
                patience.sleep(0 if isinstance(error, TimeoutError) else PAUSE_SECONDS)

    def _assemble(self, patience: Patience) -> None:
        """Before the first round of all, give sites that have not appeared yet join_seconds to do so."""
        late = time.monotonic() + self._config.join_seconds
        while not self._assembled:
            self._watch.look(self._board)
            met = any(key.startswith(ROUNDS) for key in self._board.all_keys())
            self._assembled = met or len(self._watch.here()) == self._config.sites or time.monotonic() > late
            patience.sleep(POLL_SECONDS)

    def _request_seconds(self) -> float:
        """How long the next request may wait. Raises BoardError."""
        self._watch.look(self._board)
        waiting = sum(status["waiting"] for status in self._watch.here().values())
        if waiting >= self._config.quorum:
            return self._config.join_seconds + LONGEST_REQUEST_SECONDS
        return min(self._config.join_seconds / 4, LONGEST_REQUEST_SECONDS)

    def _too_few(self, error: str) -> str:
        """Why there is no round, in one line."""
        config = self._config
        limit = f"decentral.wait_seconds = {config.wait_seconds:g}"
        try:
            self._watch.look(self._board)
        except BoardError:
            return (
                f'decentral.coordinator = "{config.coordinator}": does not answer, waited for {limit} '
                f"({error.splitlines()[0]}); start `pretrain coordinator` there, or give its address"
            )
        waiting = {site for site, status in self._watch.here().items() if status["waiting"]} | {config.site}
        missing = ", ".join(self._watch.describe(site) for site in range(config.sites) if site not in waiting)
        return (
            f"decentral.min_sites = {config.min_sites}: a round needs {config.quorum} of {config.sites} sites; waited "
            f"for {limit} without {missing or 'an agreement'}; start what is missing, then this site again"
        )

    def _keep_alive(self) -> None:
        """Have torchft send heartbeats, from the first moment at which there is a lighthouse to send them to."""
        if self._heartbeat is not None:
            return
        with suppress(RuntimeError, TimeoutError):  # no lighthouse yet; whoever asks it for a quorum says so
            self._heartbeat = self._torchft.ManagerServer(
                replica_id=self._replica,
                lighthouse_addr=self._url,
                hostname=self._host,
                bind=str(Address(self._host, 0)),
                store_addr="",
                world_size=self._ranks,
                heartbeat_interval=timedelta(seconds=HEARTBEAT_SECONDS),
                connect_timeout=timedelta(seconds=CONNECT_SECONDS),
                quorum_retries=0,
            )


def newest(replicas: Iterable[str]) -> dict[int, str]:
    """Site -> the replica of it that was started last."""
    found: dict[int, str] = {}
    for replica in sorted(replicas, key=lambda replica: replica.partition(":")[2]):
        found[int(replica.partition(":")[0])] = replica
    return found


def _coordination() -> ModuleType:
    """torchft's coordination service. Raises UserError."""
    os.environ.setdefault("RUST_LOG", "error")  # it writes several lines for every request, and reads this when loaded
    try:
        from torchft import coordination  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(
            'decentral.transport = "torchft": torchft is not installed; pip install "meristem[decentral]", or set '
            'decentral.transport = "fixed"'
        ) from error
    return coordination
