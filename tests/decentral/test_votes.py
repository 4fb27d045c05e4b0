"""Decisions, headers and the board, in threads on one board."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.decentral import votes
from pretrain.decentral.board import Address, Board, BoardError, address_of, serve_board, within
from pretrain.decentral.meetings import (
    KEPT_ROUNDS,
    GivenUpError,
    Meeting,
    MeetingError,
    Patience,
    exchange_headers,
    sweep,
)
from pretrain.decentral.rounds import children
from pretrain.decentral.torchft_transport import newest
from pretrain.decentral.transport import SitesError
from pretrain.decentral.votes import Decisions, decide
from pretrain.errors import UserError
from tests.helpers.sites import free_port


@pytest.fixture
def served() -> dist.TCPStore:
    return serve_board("127.0.0.1", free_port())


def client(served: dist.TCPStore) -> Board:
    return Board(Address("127.0.0.1", served.port), 10)


def vote(served: dist.TCPStore, site: int, ok: bool, *, sites: int = 3, delay: float = 0, **changes: Any) -> bool:
    time.sleep(delay)
    settings = {"timeout_seconds": 5, "patience_seconds": 5, "decisions": Decisions()} | changes
    return decide(client(served), "t", site=site, members=range(sites), ok=ok, **settings)


@pytest.mark.parametrize(
    ("says", "decision"), [((True, True, True), True), ((True, False, True), False), ((False,) * 3, False)]
)
def test_a_decision_is_everybodys(served: dist.TCPStore, says: tuple[bool, ...], decision: bool) -> None:
    with ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        assert list(pool.map(lambda site: vote(served, site, says[site]), range(3))) == [decision] * 3
        assert time.monotonic() - started < 4, "nobody waited for the timeout"


def test_who_does_not_vote_in_time_is_not_waited_for(served: dist.TCPStore) -> None:
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(vote, served, site, True, timeout_seconds=0.5) for site in range(2)]
        late = pool.submit(vote, served, 2, True, delay=1.5)
        assert [future.result() for future in (*early, late)] == [False] * 3


def test_who_votes_last_may_die_of_it(served: dist.TCPStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(vote, served, site, True) for site in range(2)]
        time.sleep(0.3)
        assert not any(future.done() for future in others)
        client(served).set("t/vote/2", votes.YES)  # and it looks at nothing more
        assert [future.result() for future in others] == [True, True]


@pytest.mark.parametrize("delays", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)])
def test_the_timeout_and_the_last_vote_do_not_both_win(served: dist.TCPStore, delays: tuple[float, float]) -> None:
    """Site 1 votes about when site 0 stops waiting: whatever comes first holds for both."""
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(vote, served, site, True, sites=2, timeout_seconds=0.5, delay=delay)
            for site, delay in enumerate(delays)
        ]
        assert len({future.result() for future in futures}) == 1


def test_a_decision_outlives_the_board(served: dist.TCPStore) -> None:
    decisions = Decisions()
    assert vote(served, 0, True, sites=1, decisions=decisions)
    restarted = serve_board("127.0.0.1", free_port())
    assert client(restarted).get("t/decision") is None
    decisions.publish(client(restarted))
    assert vote(restarted, 1, True, sites=2, timeout_seconds=0.5), "though site 0 votes no more"
    other = serve_board("127.0.0.1", free_port())
    assert not vote(other, 1, True, sites=2, timeout_seconds=0.5), "it would not have known"


def test_no_board_no_decision() -> None:
    gone = Board(Address("127.0.0.1", free_port()), 10)
    settings = {"site": 0, "members": (0, 1), "decisions": Decisions(), "timeout_seconds": 1, "patience_seconds": 1.5}
    with pytest.raises(SitesError, match=r"127\.0\.0\.1:\d+\": gone in the middle of a vote, .*wait_seconds = 1\.5"):
        decide(gone, "t", ok=True, **settings)
    assert not decide(gone, "t", ok=False, **settings), "who says no knows"


def test_decisions_are_forgotten_in_order(served: dist.TCPStore) -> None:
    decisions = Decisions()
    for number in range(votes.KEPT + 3):
        decisions.keep(f"t{number}", votes.COMMIT)
    assert decisions.last == [f"t{votes.KEPT + 2 - i}" for i in range(votes.SAID)]
    decisions.publish(client(served))
    assert client(served).get("t2/decision") is None
    assert client(served).get("t3/decision") == votes.COMMIT


def headers(
    served: dist.TCPStore, name: str, site: int, sites: int, *, ranks: int = 1, seconds: float = 10
) -> Meeting | Exception:
    try:
        return exchange_headers(
            client(served),
            name,
            site=site,
            members=range(sites),
            header={"from": site},
            ranks=ranks,
            patience=Patience(60),
            timeout_seconds=seconds,
        )
    except (MeetingError, SitesError) as error:
        return error


def test_headers(served: dist.TCPStore) -> None:
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda site: headers(served, "rounds/0", site, 3), range(3)))
    assert told == [Meeting("rounds/0", {site: {"from": site} for site in range(3)})] * 3


def test_old_rounds_are_swept_away(served: dist.TCPStore) -> None:
    board, past = client(served), list[str]()
    board.set("sites/0", "")
    for number in range(KEPT_ROUNDS + 7):
        board.set(f"rounds/{number}/1/decision", "commit")
        sweep(board, past, f"rounds/{number}")
    left = {key.split("/")[1] for key in board.all_keys() if key.startswith("rounds/")}
    assert left == {str(number) for number in range(7, KEPT_ROUNDS + 7)}, "rounds/1 is none of rounds/10"
    assert board.get("sites/0") == ""


def test_a_member_that_says_nothing(served: dist.TCPStore) -> None:
    error = headers(served, "rounds/0", 0, 2, seconds=0.5)
    assert isinstance(error, MeetingError)
    assert str(error) == "sites [1] said nothing within 0.5 s"


@pytest.mark.parametrize(("ranks", "odd"), [((2, 4), 1), ((4, 2, 2), 0)])
def test_the_site_with_another_number_of_ranks_is_told(served: dist.TCPStore, ranks: tuple[int, ...], odd: int) -> None:
    sites = len(ranks)
    with ThreadPoolExecutor(sites) as pool:
        told = list(pool.map(lambda site: headers(served, "rounds/0", site, sites, ranks=ranks[site]), range(sites)))
    for site, error in enumerate(told):
        assert isinstance(error, SitesError if site == odd else MeetingError)
        assert str(error).startswith(f"decentral.site = {odd}: has " if site == odd else f"sites [{odd}] have another")


def test_waiting_can_be_given_up() -> None:
    patience = Patience(60)
    threading.Timer(0.2, patience.give_up).start()
    with pytest.raises(GivenUpError):
        patience.sleep(30)


def test_the_process_that_started_last_counts() -> None:
    assert newest(["1:0009", "0:0005", "1:0010", "2:0001"]) == {0: "0:0005", 1: "1:0010", 2: "2:0001"}


@pytest.mark.parametrize("size", range(1, 10))
def test_a_broadcast_reaches_everyone_once(size: int) -> None:
    assert sum(children(position, size) for position in range(size)) == size - 1


# The board


def test_board(served: dist.TCPStore) -> None:
    board, other = client(served), client(served)
    assert board.get("a") is None
    board.set("a", "1")
    assert other.get("a") == "1"
    assert (board.set_once("a", "2"), board.set_once("b", "2"), other.get("b")) == ("1", "2", "2")
    assert (board.has(["a", "b"]), board.has(["a", "c"])) == (True, False)
    board.delete(["a", "c"])
    assert other.all_keys() == ["b"]
    assert board.connections == 1


def test_a_board_that_is_not_there() -> None:
    board = Board(Address("127.0.0.1", free_port()), 10)
    with pytest.raises(BoardError, match=r"127\.0\.0\.1:\d+: Connection refused"):
        board.get("a")


def test_an_operation_that_does_not_end_is_left() -> None:
    with pytest.raises(BoardError, match=r"no answer within 0\.2 s"):
        within(0.2, threading.Event().wait)
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    assert within(5, lambda: 3) == 3


def test_a_taken_port_is_said(served: dist.TCPStore) -> None:
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{served.port}\": cannot listen there .*another port"):
        serve_board("127.0.0.1", served.port)


@pytest.mark.parametrize(("text", "address"), [("host:1", Address("host", 1)), ("[::1]:29400", Address("::1", 29400))])
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


def test_an_interface_is_an_address() -> None:
    assert address_of("lo") == address_of("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "192.0.2.7", "eth77"])
def test_an_address_of_nobody_is_said(bind: str) -> None:
    with pytest.raises(UserError, match=f'decentral.bind = "{bind}": '):
        address_of(bind)
