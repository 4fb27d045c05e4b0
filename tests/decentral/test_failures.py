"""Sites and coordinators that die, freeze, come late and come back."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.decentral import torchft_transport, votes
from pretrain.decentral.board import Board
from pretrain.decentral.transport import StopWaitingError
from tests.decentral.scenarios import FROZEN, PHASES, VICTIM, one_round, paced, train
from tests.decentral.sites import Here, sites_of

Log = list[tuple[str, tuple[int, ...], bool]]


def disagreements(logs: list[Log]) -> set[str]:
    """Rounds in which two sites had different members or decisions."""
    known: dict[str, tuple[Any, ...]] = {}
    return {name for log in logs for name, *outcome in log if known.setdefault(name, tuple(outcome)) != tuple(outcome)}


def test_disagreements_are_seen() -> None:
    assert disagreements([[("a", (0, 1), True)], [("a", (0, 1), True), ("b", (1, 2), False)]]) == set()
    assert disagreements([[("a", (0, 1), True)], [("a", (0, 1), False)]]) == {"a"}


def end_of_a_site(folder: Path, transport: str, dies: str) -> list[Any]:
    """What three sites returned, one of which dies."""
    folder.mkdir()
    with sites_of(folder, transport, 3, timeout_seconds=8.0) as sites:
        sites.start_all(train, dies)
        if transport == "fixed":
            sites.wait("dead")
            return [sites.results(site)[0] for site in range(2)]
        sites.wait("without")
        if dies == FROZEN:
            sites.signal(VICTIM, signal.SIGCONT)
        else:
            sites.kill(VICTIM)  # what is left of it
            sites.start(VICTIM, train)
        return [sites.results(site)[0] for site in range(3)]


CASES = [("torchft", dies) for dies in (*PHASES, FROZEN)] + [("fixed", dies) for dies in (PHASES[0], *PHASES[2::2])]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """All of CASES. Most of the time they wait, so that several go on at once."""
    folder = tmp_path_factory.mktemp("ends")
    with ThreadPoolExecutor(5) as pool:
        found = {case: pool.submit(end_of_a_site, folder / " ".join(case), *case) for case in CASES}
        return {case: future.result() for case, future in found.items()}


@pytest.mark.parametrize("dies", [dies for transport, dies in CASES if transport == "torchft"])
def test_survivors_go_on_and_the_site_comes_back(ends: dict[tuple[str, str], list[Any]], dies: str) -> None:
    logs: list[Log] = ends["torchft", dies]
    assert all(isinstance(log, list) for log in logs), logs
    assert disagreements(logs) == set()
    survivor = logs[0]
    assert survivor == logs[1]
    members = [entry[1] for entry in survivor]
    alone = members.index((0, 1))
    assert set(members[:alone]) == {(0, 1, 2)}
    assert members[-1] == (0, 1, 2)
    decisions = [committed for *_, committed in survivor]
    # Two rounds before it dies; then the one in which it does.
    assert decisions[:2] == [True, True]
    assert decisions[2:alone] == {"before open": [], "after its vote": [True]}.get(dies, [False])
    assert all(decisions[alone:])


@pytest.mark.parametrize("dies", [dies for transport, dies in CASES if transport == "fixed"])
def test_without_torchft_the_run_ends_with_the_name_of_the_site(
    ends: dict[tuple[str, str], list[Any]], dies: str
) -> None:
    error, other = ends["fixed", dies]
    assert isinstance(error, str)
    assert error.startswith('SitesError: decentral.transport = "fixed": no round without site 2 (')
    assert other.startswith("SitesError: decentral."), "it may lose site 0 before it can tell"


# The coordinator


def test_a_new_coordinator_between_rounds(tmp_path: Path) -> None:
    with sites_of(tmp_path, "torchft", 2, timeout_seconds=20.0) as sites:
        sites.start_all(paced, 3)
        for number in range(3):
            sites.mark(f"go {number}")
            for site in range(2):
                sites.wait(f"done {number} {site}")
            if number < 2:
                sites.kill_coordinator()
                sites.start_coordinator()
        assert [sites.results(site)[0] for site in range(2)] == [[((0, 1), True)] * 3] * 2
        said = sites.said().splitlines()
    address = sites.config.coordinator
    assert said[0].startswith(f"coordinator: listening on {address} and 127.0.0.1:")
    assert said[0].endswith("; a round needs 2 of 2 sites")
    assert sum("listening" in line for line in said) == 3
    assert sum(line.startswith("coordinator: site 1 is here (") for line in said) >= 2


def slow_voter(here: Here, forgetful: bool) -> bool:
    """Site 1 votes late; site 0, which may be forgetful, votes once only."""
    if forgetful and here.site == 0:
        write, written = Board.set, []

        def write_once(board: Board, key: str, value: str) -> None:
            if "/vote/" not in key or not written:
                write(board, key, value)
                written.extend([key] if "/vote/" in key else [])

        Board.set = write_once  # type: ignore[method-assign]
    transport = here.transport()
    round_ = transport.open({})
    if here.site == 1:
        here.wait("vote")
    else:
        write_and_tell(here)
    committed = round_.commit(True)
    transport.close()
    return committed


def write_and_tell(here: Here) -> None:
    """Mark that the vote has arrived."""
    write = Board.set

    def wrapped(board: Board, key: str, value: str) -> None:
        write(board, key, value)
        if "/vote/" in key:
            here.mark("voted")

    Board.set = wrapped  # type: ignore[method-assign]


@pytest.mark.parametrize("forgetful", [False, True])
def test_votes_that_a_coordinator_lost_are_given_again(tmp_path: Path, forgetful: bool) -> None:
    with sites_of(tmp_path, "torchft", 2, timeout_seconds=15.0) as sites:
        sites.start_all(slow_voter, forgetful)
        sites.wait("voted")
        sites.kill_coordinator()
        sites.start_coordinator()
        sites.mark("vote")
        # The negative control: had site 0 not voted again, both would have thrown the round away.
        assert [sites.results(site)[0] for site in range(2)] == [not forgetful] * 2


def slow_reader(here: Here, silent: bool) -> bool:
    """Site 1 votes first and reads the decision late; site 0, which may be silent about it, takes it."""
    transport = here.transport()
    if here.site == 0 and silent:
        votes.Decisions.publish = lambda *_: None  # type: ignore[method-assign]
    round_ = transport.open({})
    if here.site == 0:
        here.wait("voted")
    else:
        write_and_tell(here)
        read = Board.get

        def read_late(board: Board, key: str) -> str | None:
            if key.endswith("/decision"):
                here.wait("read")
            return read(board, key)

        Board.get = read_late  # type: ignore[method-assign]
    committed = round_.commit(True)
    here.mark(f"decided {here.site}")
    here.wait("decided 1")  # site 0 trains on meanwhile
    transport.close()
    return committed


@pytest.mark.parametrize("silent", [False, True])
def test_a_decision_that_a_coordinator_lost_is_told_again(tmp_path: Path, silent: bool) -> None:
    with sites_of(tmp_path, "torchft", 2, timeout_seconds=10.0) as sites:
        sites.start_all(slow_reader, silent)
        sites.wait("decided 0")
        sites.kill_coordinator()
        sites.start_coordinator()
        sites.mark("read")
        # The negative control: had site 0 kept it to itself, site 1 would have decided otherwise.
        assert [sites.results(site)[0] for site in range(2)] == [True, not silent]


@pytest.mark.parametrize("transport", ["torchft", "fixed"])
def test_nobody_answers(tmp_path: Path, transport: str) -> None:
    with sites_of(tmp_path, transport, 2, ranks=2, coordinator=False, wait_seconds=2.0) as sites:
        sites.start(1, one_round)
        errors = sites.results(1)
    who = {"torchft": "does not answer", "fixed": "site 0 does not answer there"}[transport]
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f'SitesError: decentral.coordinator = "{sites.config.coordinator}": {who}')


# Who is missing, late, or there twice


@pytest.mark.parametrize(
    ("transport", "message"),
    [
        (
            "torchft",
            "decentral.min_sites = 0: a round needs 2 of 2 sites; waited for decentral.wait_seconds = 3 without ",
        ),
        ("fixed", 'decentral.transport = "fixed": no round without '),
    ],
)
def test_the_missing_site_is_named(tmp_path: Path, transport: str, message: str) -> None:
    with sites_of(tmp_path, transport, 2, wait_seconds=3.0, join_seconds=1.0) as sites:
        sites.start(0, one_round)
        (error,) = sites.results(0)
    assert error.startswith(f"SitesError: {message}site 1 (not started")


@pytest.mark.parametrize(("min_sites", "splits"), [(1, True), (0, False)])
def test_only_a_majority_keeps_sites_together(tmp_path: Path, min_sites: int, splits: bool) -> None:
    """Two sites, one after the other, as if the network between them had failed."""
    with sites_of(tmp_path, "torchft", 2, min_sites=min_sites, wait_seconds=4.0, join_seconds=1.0) as sites:
        met = []
        for site in range(2):
            sites.start(site, one_round)
            met += sites.results(site)
    assert met == ([(0,), (1,)] if splits else met)
    assert all(isinstance(result, str) and "a round needs 2 of 2" in result for result in met) is not splits


def impatient(here: Here, name: str, hasty: bool) -> tuple[int, ...]:
    """One round; a hasty site makes one long request."""
    if hasty:
        torchft_transport.LighthouseMeetings._request_seconds = lambda _: 60.0  # type: ignore[method-assign]
    return one_round(here, name)


@pytest.mark.parametrize("hasty", [False, True])
def test_who_comes_back_does_not_hurry_the_others(tmp_path: Path, hasty: bool) -> None:
    """Site 2 asks for a round for longer than join_seconds before site 0 does; site 1 asks a moment later."""
    with sites_of(tmp_path, "torchft", 3, join_seconds=4.0) as sites:
        sites.start(0, one_round, "go 0")
        sites.start(1, one_round, "go 1")
        sites.wait("started 0")
        sites.wait("started 1")
        sites.start(2, impatient, "", hasty)
        sites.wait("started 2")
        assert not sites.appears("met 2", 6)
        sites.mark("go 0")
        if hasty:  # the negative control: they do not wait for site 1
            sites.wait("met 0")
        sites.mark("go 1")
        assert sites.results(0)[0] == sites.results(2)[0] == ((0, 2) if hasty else (0, 1, 2))


@pytest.mark.parametrize("transport", ["torchft", "fixed"])
def test_a_site_that_runs_twice(tmp_path: Path, transport: str) -> None:
    with sites_of(tmp_path, transport, 2) as sites:
        if transport == "fixed":
            sites.start(0, one_round, "go")
            sites.wait("started 0")
        sites.start(1, one_round)
        sites.wait("started 1")
        first = sites._processes[1]
        (tmp_path / "started 1").unlink()
        sites.start(1, one_round)
        sites.wait("started 1")
        second = sites._processes[1]
        if transport == "torchft":
            sites.start(0, one_round)
        sites.mark("go")
        assert sites.results(0) == [(0, 1)]
        assert sites.results(1) == [(0, 1)], "the one that was started last takes part"
        sites._processes[1] = first
        assert sites.results(1)[0].startswith("SitesError: decentral.site = 1: another process")
        sites._processes[1] = second


def test_a_site_counts_once(tmp_path: Path) -> None:
    """Two starts of one site are no majority of three."""
    with sites_of(tmp_path, "torchft", 3, join_seconds=1.0) as sites:
        sites.start(2, one_round)
        sites.wait("started 2")
        assert not sites.appears("met 2", 3)
        sites.kill(2)
        sites.start(2, one_round)
        assert not sites.appears("met 2", 5)
        sites.start(0, one_round)
        assert sites.results(0) == sites.results(2) == [(0, 2)]


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


@pytest.mark.parametrize("transport", ["torchft", "fixed"])
def test_a_site_that_is_asked_to_stop_waits_no_longer(tmp_path: Path, transport: str) -> None:
    with sites_of(tmp_path, transport, 2, ranks=2) as sites:
        sites.start(0, stopped)
        sites.wait("started 0")
        sites.mark("stop")
        assert sites.results(0) == ["stopped"] * 2
