"""One decision for all members of a round: take over what was exchanged, or throw it away.

The protocol. Rank 0 of every member site votes on the board, under a name that no other transaction has (round and
number within it), after all ranks of its site told it how they fared:

1. No: it writes `abort` as the decision, unless there is one, and knows the answer, as nothing is committed without it.
2. Yes: it writes its vote. Whoever then finds the votes of all members writes `commit` as the decision, unless there is
   one. As every member looks, the last voter may die right after its vote.
3. Who has waited for `timeout_seconds` writes `abort`, unless there is a decision.

All three write by compare-and-set, so that the first one decides for everybody, and what was written is what is done.
A member that dies before it votes makes the others abort; one that dies after it makes no difference to them.

The board keeps nothing over a restart. Who has no answer yet votes again on the new one and starts to wait again; who
has one keeps it in memory (`Decisions`) and writes it to every board it connects to, each second a try. So all of them
end with the same answer as long as one of the members who know it lives for `timeout_seconds` longer than the board
takes to come back, or nobody knew it.

Not guaranteed: if the board is lost between two members' reading the decision, and those who read it are lost, too,
before they could write it again, the others abort what the lost ones may have committed, and saved. The same holds for
a member that was frozen between its vote and the decision for longer than the board keeps one (`meetings.KEPT_ROUNDS`).
Both are seen at the next round, as the last committed rounds then differ. And there is no answer without a board: a
member that has said yes waits for it for `patience_seconds`, and then gives up its run.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from pretrain.decentral.board import Board, BoardError
from pretrain.decentral.transport import SitesError

COMMIT, ABORT, YES = "commit", "abort", "yes"
POLL_SECONDS = 0.05
RETRY_SECONDS = 1.0
KEPT = 64
"""Decisions of the last rounds, of which those that somebody may still ask for are the last few."""

SAID = 4
"""Decisions that a site lets the others know it knows."""


class Decisions:
    """The last decisions this process knows. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, str] = OrderedDict()

    def keep(self, transaction: str, decision: str) -> None:
        """Remember one."""
        with self._lock:
            self._known[transaction] = decision
            while len(self._known) > KEPT:
                self._known.popitem(last=False)

    @property
    def last(self) -> list[str]:
        """The transactions decided last, newest first."""
        with self._lock:
            return list(reversed(self._known))[:SAID]

    def publish(self, board: Board) -> None:
        """Write all of them where there is none yet. Raises BoardError."""
        with self._lock:
            known = list(self._known.items())
        for transaction, decision in known:
            board.set_once(_decision(transaction), decision)


def decide(
    board: Board,
    transaction: str,
    *,
    site: int,
    members: Sequence[int],
    ok: bool,
    decisions: Decisions,
    timeout_seconds: float,
    patience_seconds: float,
) -> bool:
    """Vote, and wait for the decision; returns whether it is to commit. On rank 0 of a member.

    Raises:
        SitesError: the board did not come back in time, and the decision is unknown.
    """
    patience = time.monotonic() + patience_seconds
    while True:
        try:
            decision = _vote(board, transaction, site, members, ok, timeout_seconds)
        except BoardError as error:
            if not ok:
                decision = ABORT
            elif time.monotonic() < patience:
                time.sleep(RETRY_SECONDS)
                continue
            else:
                raise SitesError(
                    f'decentral.coordinator = "{board.address}": gone in the middle of a vote, and not back within '
                    f"decentral.wait_seconds = {patience_seconds:g} ({error}); start it, then this site again"
                ) from error
        decisions.keep(transaction, decision)
        return decision == COMMIT


def _vote(board: Board, transaction: str, site: int, members: Sequence[int], ok: bool, timeout_seconds: float) -> str:
    decision = _decision(transaction)
    if not ok:
        board.set_once(decision, ABORT)
        return ABORT
    board.set(f"{transaction}/vote/{site}", YES)
    votes = [f"{transaction}/vote/{member}" for member in members]
    late = time.monotonic() + timeout_seconds
    while not (found := board.get(decision)):
        if board.has(votes):
            return board.set_once(decision, COMMIT)
        if time.monotonic() > late:
            return board.set_once(decision, ABORT)
        time.sleep(POLL_SECONDS)
    return found


def _decision(transaction: str) -> str:
    return f"{transaction}/decision"
