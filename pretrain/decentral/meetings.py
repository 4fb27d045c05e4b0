"""How rank 0 of a site finds the members of a round. `fixed` and `torchft_transport` are two ways."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.decentral.board import Board
from pretrain.decentral.transport import Header, SitesError

BOARD_SECONDS = 10.0
"""How long an operation on the board may take: it is quick, and may be done again."""
POLL_SECONDS = 0.1
ROUNDS = "rounds/"
KEPT_ROUNDS = 4
"""What a round left on the board stays for so many rounds, for members that are slow to read it."""


class MeetingError(Exception):
    """These members did not come together: try again."""


@dataclass(frozen=True)
class Meeting:
    """What the members of a round know alike."""

    name: str
    """Of this round alone."""
    headers: Mapping[int, Header]
    """By site; the members are its keys."""

    @property
    def members(self) -> tuple[int, ...]:
        """Their numbers, sorted."""
        return tuple(sorted(self.headers))


class Meetings(Protocol):
    """A site's way to the others, on its rank 0."""

    def meet(self, header: Header, patience: Patience) -> Meeting:
        """Wait for others and exchange headers. Runs in a thread of its own.

        Raises:
            SitesError: they did not come in time.
            GivenUpError: the waiting was given up.
        """

    def close(self) -> None:
        """Leave."""


class GivenUpError(Exception):
    """Nobody waits for the meeting any more."""


class Patience:
    """How long a site goes on waiting for the others."""

    def __init__(self, seconds: float) -> None:
        self._late = time.monotonic() + seconds
        self._given_up = threading.Event()

    @property
    def left(self) -> float:
        """Seconds."""
        return self._late - time.monotonic()

    def give_up(self) -> None:
        """Let whoever waits raise GivenUpError. From another thread."""
        self._given_up.set()

    def sleep(self, seconds: float) -> None:
        """Wait a little. Raises GivenUpError."""
        if self._given_up.wait(seconds):
            raise GivenUpError


def exchange_headers(
    board: Board,
    name: str,
    *,
    site: int,
    members: Sequence[int],
    header: Header,
    ranks: int,
    patience: Patience,
    timeout_seconds: float,
) -> Meeting:
    """Tell the other members of the round `name` about this one, and wait for what they tell.

    Raises:
        MeetingError: a member is missing, or has another number of ranks than most.
        SitesError: this site has another number of ranks than most.
        BoardError: the board is gone.
    """
    keys = {member: f"{name}/header/{member}" for member in members}
    board.set(keys[site], json.dumps({"ranks": ranks, "header": header}))
    late = time.monotonic() + timeout_seconds
    while not board.has(list(keys.values())):
        if time.monotonic() > late:
            missing = [member for member, key in keys.items() if not board.has([key])]
            raise MeetingError(f"sites {missing} said nothing within {timeout_seconds:g} s")
        patience.sleep(POLL_SECONDS)
    told: dict[int, dict[str, Any]] = {member: json.loads(board.get(key) or "{}") for member, key in keys.items()}
    # The first of the most frequent: with two sites, site 0 is right.
    usual = Counter(told[member]["ranks"] for member in sorted(members)).most_common(1)[0][0]
    if ranks != usual:
        raise SitesError(
            f"decentral.site = {site}: has {ranks} ranks, and others of the sites {list(members)} {usual}; ranks "
            "of one number exchange their parts, so that all sites need the same layout: start it like the others"
        )
    if odd := [member for member in members if told[member]["ranks"] != usual]:
        raise MeetingError(f"sites {odd} have another number of ranks than {usual}")
    return Meeting(name, {member: told[member]["header"] for member in members})


def sweep(board: Board, past: list[str], name: str) -> None:
    """Note the round `name`, and remove from the board what those long before it have left.

    Args:
        past: rounds that this site was in, oldest first; changed.

    Raises:
        BoardError: the board is gone.
    """
    past.append(name)
    old = tuple(f"{round_}/" for round_ in past[:-KEPT_ROUNDS])
    if old:
        board.delete(key for key in board.all_keys() if key.startswith(old))
        del past[:-KEPT_ROUNDS]
