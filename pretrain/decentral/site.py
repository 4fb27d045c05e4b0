"""One site's side of the rounds: its rank 0 meets the other sites, all its ranks connect to theirs, rank 0 votes.

Ranks of a site tell each other JSON values over gloo groups of their own. A rank that dies takes its site down, as in
any other collective of a run; for the other sites that is one member less.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.decentral import DecentralConfig
from pretrain.decentral.board import Address, Board, BoardError, address_of
from pretrain.decentral.meetings import BOARD_SECONDS, GivenUpError, Meeting, Meetings, Patience
from pretrain.decentral.rounds import GlooRound, outer_group
from pretrain.decentral.transport import Header, SitesError, StopWaitingError
from pretrain.decentral.votes import Decisions, decide
from pretrain.errors import UserError

logger = logging.getLogger(__name__)

LISTEN_SECONDS = 0.5
"""How often the ranks of a site ask each other whether one was asked to stop, while they wait for other sites."""
LEAVE_SECONDS = 15.0
"""How long one of them may take to notice that it was given up."""
PAUSE_SECONDS = 1.0
"""Between two attempts to connect."""

MakeMeetings = Callable[[DecentralConfig, int, str, Decisions], Meetings]
"""Of the configuration, the ranks of this site, the address to listen on, and the decisions to keep."""


class SiteTransport:
    """`transport.Transport` for whatever way to the others `make` makes."""

    def __init__(self, config: DecentralConfig, ranks: Ranks, stopping: Callable[[], bool], make: MakeMeetings) -> None:
        self._config, self._stopping = config, stopping
        self._board = Address.parse(config.coordinator)
        self._decisions = Decisions()
        self._round: GlooRound | None = None
        self._last_members: tuple[int, ...] = ()
        self._ranks = _own_group(ranks, config)
        self._background_ranks = _own_group(ranks, config) if config.expert_delay_steps else None
        self._meetings: Meetings | None = None
        self._task: _Task | None = None
        failure = None
        try:
            self._host = address_of(config.bind)
            if self._ranks.rank == 0:
                self._meetings = make(config, self._ranks.size, self._host, self._decisions)
        except UserError as error:
            failure = str(error)
        if failure := self._first(failure):
            raise UserError(failure)

    def open(self, header: Header) -> GlooRound:
        """See `transport.Transport`."""
        self._end_round()
        patience = Patience(self._config.wait_seconds)
        while True:
            meeting = self._meet(header, patience)
            failure, found = self._connect(meeting)
            if found:
                self._round = found
                return found
            if self._ranks.broadcast(patience.left < 0):
                raise SitesError(
                    f"decentral.bind: sites {[*meeting.members]} meet, but do not reach each other within "
                    f"decentral.wait_seconds = {self._config.wait_seconds:g} ({failure}); give every site an address "
                    "that the others can connect to"
                )
            time.sleep(PAUSE_SECONDS)

    def close(self) -> None:
        """See `transport.Transport`."""
        self._end_round()
        if self._task:
            self._task.result(LEAVE_SECONDS)  # one that was given up; Python may not end with a thread in foreign code
        if self._meetings:
            self._meetings.close()
        for ranks in (self._ranks, self._background_ranks):
            if ranks and ranks.size > 1:
                dist.destroy_process_group(ranks.group)

    def _end_round(self) -> None:
        if self._round is not None:
            self._round.close()
            self._round = None

    def _meet(self, header: Header, patience: Patience) -> Meeting:
        """Let rank 0 meet the others; all ranks hear the result, or that one was asked to stop."""
        task = _Task(lambda meetings: meetings.meet(header, patience), self._meetings) if self._meetings else None
        self._task = task
        while True:
            news = task.result(LISTEN_SECONDS) if task else None
            stops = self._ranks.gather(self._stopping())
            news = self._ranks.broadcast({"stop": any(stops)} | (news or {}))
            if "meeting" in news:
                name, headers = news["meeting"]
                meeting = Meeting(name, {int(site): value for site, value in headers.items()})
                self._say_members(meeting.members)
                return meeting
            if "sites" in news:
                raise SitesError(news["sites"])
            if "bug" in news:
                raise RuntimeError(news["bug"]) from (task.error if task else None)
            if news["stop"]:
                patience.give_up()
                raise StopWaitingError

    def _connect(self, meeting: Meeting) -> tuple[str | None, GlooRound | None]:
        """Connect every rank to those with its number; on all ranks why not, if one of them could not."""
        failure, found = None, None
        try:
            background = self._join(meeting, self._background_ranks, "background") if self._background_ranks else None
            found = self._join(meeting, self._ranks, "", background)
        except (BoardError, RuntimeError) as error:
            failure = str(error).splitlines()[0]
        if failure := self._first(failure):
            if found:
                found.close()
            if self._ranks.rank == 0:
                logger.warning("could not connect to the sites %s, trying again: %s", [*meeting.members], failure)
            return failure, None
        return None, found

    def _join(self, meeting: Meeting, ranks: Ranks, part: str, background: GlooRound | None = None) -> GlooRound:
        """A round on this rank, for one thread."""
        name = f"{meeting.name}/{part}" if part else meeting.name
        group = outer_group(
            self._board,
            f"{name}/gloo/{ranks.rank}",
            position=meeting.members.index(self._config.site),
            size=len(meeting.members),
            host=self._host,
            timeout_seconds=self._config.timeout_seconds,
        )
        board = Board(self._board, BOARD_SECONDS)

        def agree(transaction: str, ok: bool) -> bool:
            return self._agree(ranks, board, transaction, meeting.members, ok)

        return GlooRound(meeting, self._config.site, group, agree, background=background, name=name)

    def _agree(self, ranks: Ranks, board: Board, transaction: str, members: tuple[int, ...], ok: bool) -> bool:
        """Whether all ranks of all members say ok; one vote a site."""
        oks = ranks.gather(ok)
        answer: bool | str | None = None
        if ranks.rank == 0:
            try:
                answer = decide(
                    board,
                    transaction,
                    site=self._config.site,
                    members=members,
                    ok=all(oks),
                    decisions=self._decisions,
                    timeout_seconds=self._config.timeout_seconds,
                    patience_seconds=self._config.wait_seconds,
                )
            except SitesError as error:
                answer = str(error)
        answer = ranks.broadcast(answer)
        if isinstance(answer, str):
            raise SitesError(answer)
        return bool(answer)

    def _first(self, failure: str | None) -> str | None:
        """The first rank's failure, on all ranks."""
        failures = [text for text in self._ranks.gather(failure) if text is not None]
        return self._ranks.broadcast(failures[0] if failures else None)

    def _say_members(self, members: tuple[int, ...]) -> None:
        if self._ranks.rank == 0 and members != self._last_members:
            logger.info("round of sites %s", ", ".join(map(str, members)))
            self._last_members = members


class _Task:
    """A meeting in a thread of its own, so that the ranks of a site can be asked to stop meanwhile."""

    def __init__(self, meet: Callable[[Meetings], Meeting], meetings: Meetings) -> None:
        self.error: Exception | None = None
        self._news: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(meet, meetings), name="meeting", daemon=True)
        self._thread.start()

    def result(self, seconds: float) -> dict[str, Any] | None:
        """What came of it, as JSON; None if nothing did yet within so many seconds."""
        self._thread.join(seconds)
        return None if self._thread.is_alive() else self._news

    def _run(self, meet: Callable[[Meetings], Meeting], meetings: Meetings) -> None:
        try:
            meeting = meet(meetings)
            json.dumps(meeting.headers)
            self._news = {"meeting": (meeting.name, meeting.headers)}
        except SitesError as error:
            self._news = {"sites": str(error)}
        except GivenUpError:
            self._news = {}
        except Exception as error:
            self.error = error
            self._news = {"bug": f"{type(error).__name__}: {error}"}


def _own_group(ranks: Ranks, config: DecentralConfig) -> Ranks:
    """The same ranks over a group of their own, in which one may wait for another as long as a site for others."""
    if ranks.size == 1:
        return ranks
    members = dist.get_process_group_ranks(ranks.group)
    # One may be in a vote, or in the building of two outer groups, of three timeouts each.
    timeout = timedelta(seconds=2 * config.wait_seconds + 7 * config.timeout_seconds)
    return Ranks(dist.new_group(members, backend="gloo", timeout=timeout))
