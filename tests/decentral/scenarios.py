"""What sites do in the tests of failures."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from pretrain.decentral.board import Board
from pretrain.decentral.transport import Round, RoundError
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
        strike(here, due and dies == "before its vote")
        if due and dies == "after its vote":
            die_after_voting(here)
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


def die_after_voting(here: Here) -> None:
    """Kill this process as soon as its vote has arrived."""
    write = Board.set

    def write_and_die(board: Board, key: str, value: str) -> None:
        write(board, key, value)
        strike(here, "/vote/" in key)

    Board.set = write_and_die  # type: ignore[method-assign]


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
