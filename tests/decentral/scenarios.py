"""What sites do in the tests of failures."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.decentral import torchft_transport, votes
from pretrain.decentral.board import Board
from pretrain.decentral.fixed import FixedMeetings
from pretrain.decentral.transport import Round, RoundError, StopWaitingError
from tests.decentral.sites import Here

VICTIM, DIES_IN = 2, 2
PHASES = ["before open", "after open", "in a collective", "before its vote", "after its vote"]
FROZEN = "frozen in a collective"


def train(here: Here, dies: str = "") -> list[tuple[str, tuple[int, ...], bool]]:
    """Rounds until the victim has died in round DIES_IN, the others went on without it, and it came back.

    Returns (name, members, committed) of every round.
    """
    everyone = tuple(range(here.config.sites))
    dies = dies if here.site == VICTIM else ""
    transport = here.transport()
    log, number, without = [], 0, False
    while True:
        strike(here, dies == "before open" and number == DIES_IN)
        round_ = transport.open({"number": number, "without": without})
        number = max(header["number"] for header in round_.headers.values())
        due = number == DIES_IN
        strike(here, due and dies == "after open")
        ok = collectives(here, round_, dies if due else "")
        here.mark(f"summed {number} {here.site}")
        strike(here, due and dies == "before its vote")
        if due and dies == "after its vote":
            # Not before the others are through, whose sums its death would end.
            for site in everyone:
                here.wait(f"summed {number} {site}")
            after_voting(lambda: strike(here, True))
        committed = round_.commit(ok)
        log.append((round_.name, round_.members, committed))
        if committed:
            back = round_.members == everyone and any(header["without"] for header in round_.headers.values())
            number += 1
            if round_.members == tuple(site for site in everyone if site != VICTIM):
                without = True
                here.mark("without")
            if back:
                transport.close()
                return log
        time.sleep(0.2)


def collectives(here: Here, round_: Round, dies: str) -> bool:
    """Several sums; whether all of them came through, in which case they are right."""
    try:
        for turn in range(5):
            strike(here, turn == 2 and dies == "in a collective")
            if turn == 2 and dies == FROZEN:
                here.mark("frozen")
                os.kill(os.getpid(), signal.SIGSTOP)
            value = torch.full((500_000,), 1.0 + here.site)
            round_.sum_(value)
            assert value.unique().tolist() == [sum(1.0 + site for site in round_.members)]
    except RoundError:
        return False
    return True


def strike(here: Here, now: bool) -> None:
    if now:
        here.mark("dead")
        here.die()


def one_round(here: Here, name: str = "") -> tuple[int, ...]:
    """Meet once, say so, and agree; returns the members. With a name: open when the test marks it."""
    transport = here.transport()
    here.mark(f"started {here.site}")
    if name:
        here.wait(name)
    round_ = transport.open({})
    here.mark(f"met {here.site}")
    assert round_.commit(True)
    transport.close()
    return round_.members


def paced(here: Here, rounds: int) -> list[Any]:
    """Rounds that begin when the test marks them."""
    transport = here.transport()
    log = []
    for number in range(rounds):
        here.wait(f"go {number}")
        round_ = transport.open({"number": number})
        log.append((round_.members, round_.commit(True)))
        here.mark(f"done {number} {here.site}")
    transport.close()
    return log


def slow_voter(here: Here, forgetful: bool) -> bool:
    """Site 0 votes, and says so; site 1 votes when it may. A forgetful site 0 would not vote again."""
    if here.site == 0:
        after_voting(lambda: here.mark("voted"), once=forgetful)
    transport = here.transport()
    round_ = transport.open({})
    if here.site == 1:
        here.wait("vote")
    committed = round_.commit(True)
    transport.close()
    return committed


def slow_reader(here: Here, silent: bool) -> bool:
    """Site 1 votes first, and reads the decision when it may; site 0 takes it, and may be silent about it later."""
    if here.site == 1:
        after_voting(lambda: here.mark("voted"))
        before_reading(lambda: here.wait("read"))
    elif silent:
        votes.Decisions.publish = lambda *_: None  # type: ignore[method-assign]
    transport = here.transport()
    round_ = transport.open({})
    if here.site == 0:
        here.wait("voted")
    committed = round_.commit(True)
    here.mark(f"decided {here.site}")
    here.wait("decided 1")  # site 0 trains on meanwhile
    transport.close()
    return committed


def leaving(here: Here, hasty: bool) -> bool:
    """Site 1 reads the decision late; site 0 leaves at once, and may be hasty about it."""
    if here.site == 1:
        before_reading(lambda: time.sleep(2))
    elif hasty:
        FixedMeetings.close = lambda _: None  # type: ignore[method-assign]
    transport = here.transport()
    round_ = transport.open({})
    if here.site == 0:
        time.sleep(1)
    committed = round_.commit(True)
    transport.close()
    return committed


def impatient(here: Here, hasty: bool) -> tuple[int, ...]:
    """One round; a hasty site makes one long request."""
    if hasty:
        torchft_transport.LighthouseMeetings._request_seconds = lambda _: 60.0  # type: ignore[method-assign]
    return one_round(here)


def stopped(here: Here) -> str:
    """Wait for a round; rank 1 is asked to stop."""
    transport = here.transport(lambda: here.rank == 1 and (here.folder / "stop").exists())
    here.mark(f"started {here.site}")
    try:
        transport.open({})
    except StopWaitingError:
        transport.close()
        return "stopped"
    return "met"


def after_voting(then: Callable[[], None], *, once: bool = False) -> None:
    """Do something when a vote of this process has arrived; `once`: let only the first one arrive."""
    write, voted = Board.set, []

    def write_then(board: Board, key: str, value: str) -> None:
        is_vote = "/vote/" in key
        if not (is_vote and once and voted):
            write(board, key, value)
        if is_vote:
            voted.append(key)
            then()

    Board.set = write_then  # type: ignore[method-assign]


def before_reading(first: Callable[[], None]) -> None:
    """Do something before this process reads a decision."""
    read = Board.get

    def then_read(board: Board, key: str) -> str | None:
        if key.endswith("/decision"):
            first()
        return read(board, key)

    Board.get = then_read  # type: ignore[method-assign]
