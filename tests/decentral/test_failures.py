"""Sites and coordinators that die, freeze, come late and come back.

Every test looks at one case, that is a function of this module with arguments, which starts sites and returns what came
of it. Most of the time these wait, so that all the cases of the selected tests go on side by side.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.decentral.scenarios import (
    FROZEN,
    PHASES,
    VICTIM,
    impatient,
    leaving,
    one_round,
    paced,
    slow_reader,
    slow_voter,
    stopped,
    train,
)
from tests.decentral.sites import sites_of

Case = tuple[Any, ...]
Log = list[tuple[str, tuple[int, ...], bool]]
AT_ONCE = 6


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Any]:
    """What came of a case."""
    calls = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [call.params["case"] for call in calls]
    folders = [tmp_path_factory.mktemp("case") for _ in cases]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {case: pool.submit(case[0], folder, *case[1:]) for case, folder in zip(cases, folders, strict=True)}
    return lambda case: futures[case].result()


def each(function: Callable[..., Any], *arguments: Any) -> pytest.MarkDecorator:
    """Run a test on a case for each of the arguments, which may be tuples of several."""
    cases = [(function, *(given if isinstance(given, tuple) else (given,))) for given in arguments]
    return pytest.mark.parametrize("case", cases, ids=lambda case: "-".join(map(str, case[1:])))


def disagreements(logs: list[Log]) -> set[str]:
    """Rounds in which two sites had different members or decisions."""
    known: dict[str, tuple[Any, ...]] = {}
    return {name for log in logs for name, *outcome in log if known.setdefault(name, tuple(outcome)) != tuple(outcome)}


def test_disagreements_are_seen() -> None:
    assert disagreements([[("a", (0, 1), True)], [("a", (0, 1), True), ("b", (1, 2), False)]]) == set()
    assert disagreements([[("a", (0, 1), True)], [("a", (0, 1), False)]]) == {"a"}


def a_site_dies(folder: Path, transport: str, dies: str) -> list[Any]:
    """Three sites, one of which dies, and comes back once the others have gone on without it."""
    with sites_of(folder, transport, 3, timeout_seconds=8.0) as sites:
        sites.start_all(train, dies)
        if transport == "fixed":
            return [sites.results(site)[0] for site in range(2)]
        sites.wait("without")
        if dies == FROZEN:
            sites.signal(VICTIM, signal.SIGCONT)
        else:
            sites.kill(VICTIM)  # what is left of it
            sites.start(VICTIM, train)
        return [sites.results(site)[0] for site in range(3)]


@each(a_site_dies, *[("torchft", dies) for dies in (*PHASES, FROZEN)])
def test_survivors_go_on_and_the_site_comes_back(outcomes: Callable[[Case], Any], case: Case) -> None:
    logs: list[Log] = outcomes(case)
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
    assert decisions[2:alone] == {"before open": [], "after its vote": [True]}.get(case[-1], [False])
    assert all(decisions[alone:])


@each(a_site_dies, *[("fixed", dies) for dies in ("before open", "in a collective", "after its vote")])
def test_without_torchft_the_run_ends_with_the_name_of_the_site(outcomes: Callable[[Case], Any], case: Case) -> None:
    error, other = outcomes(case)
    assert isinstance(error, str)
    assert error.startswith('SitesError: decentral.transport = "fixed": no round without site 2 (')
    assert other.startswith("SitesError: decentral."), "it may lose site 0 before it can tell"


# The coordinator


def new_coordinators(folder: Path, rounds: int) -> tuple[list[Any], list[str], str]:
    """Two sites; the coordinator is killed and another one started between their rounds."""
    with sites_of(folder, "torchft", 2, timeout_seconds=20.0) as sites:
        sites.start_all(paced, rounds)
        for number in range(rounds):
            if number:
                sites.kill_coordinator()
                sites.start_coordinator()
            sites.mark(f"go {number}")
            for site in range(2):
                sites.wait(f"done {number} {site}")
        return [sites.results(site)[0] for site in range(2)], sites.said().splitlines(), sites.config.coordinator


@each(new_coordinators, 3)
def test_a_new_coordinator_between_rounds(outcomes: Callable[[Case], Any], case: Case) -> None:
    logs, said, address = outcomes(case)
    assert logs == [[((0, 1), True)] * 3] * 2
    assert said[0].startswith(f"coordinator: listening on {address} and 127.0.0.1:")
    assert said[0].endswith("; a round needs 2 of 2 sites")
    assert sum("listening" in line for line in said) == 3
    assert sum(line.startswith("coordinator: site 1 is here (") for line in said) >= 2


def lost_votes(folder: Path, forgetful: bool) -> list[Any]:
    """The coordinator is replaced after site 0 has voted, and before site 1 does."""
    with sites_of(folder, "torchft", 2, timeout_seconds=10.0) as sites:
        sites.start_all(slow_voter, forgetful)
        sites.wait("voted")
        sites.kill_coordinator()
        sites.start_coordinator()
        sites.mark("vote")
        return [sites.results(site)[0] for site in range(2)]


@each(lost_votes, False, True)
def test_votes_that_a_coordinator_lost_are_given_again(outcomes: Callable[[Case], Any], case: Case) -> None:
    # The negative control: a site that does not vote again makes both throw the round away.
    assert outcomes(case) == ([False, False] if case[-1] else [True, True])


def lost_decision(folder: Path, silent: bool) -> list[Any]:
    """The coordinator is replaced after site 0 has read the decision, and before site 1 does."""
    with sites_of(folder, "torchft", 2, timeout_seconds=10.0) as sites:
        sites.start_all(slow_reader, silent)
        sites.wait("decided 0")
        sites.kill_coordinator()
        sites.start_coordinator()
        sites.mark("read")
        return [sites.results(site)[0] for site in range(2)]


@each(lost_decision, False, True)
def test_a_decision_that_a_coordinator_lost_is_told_again(outcomes: Callable[[Case], Any], case: Case) -> None:
    # The negative control: had site 0 kept it to itself, site 1 would have decided otherwise.
    assert outcomes(case) == ([True, False] if case[-1] else [True, True])


def last_decision(folder: Path, hasty: bool) -> list[Any]:
    """Without a coordinator, the board goes with site 0, which wants to leave before site 1 has read the decision."""
    with sites_of(folder, "fixed", 2, wait_seconds=15.0) as sites:
        sites.start_all(leaving, hasty)
        return [sites.results(site)[0] for site in range(2)]


@each(last_decision, False, True)
def test_who_keeps_the_board_leaves_last(outcomes: Callable[[Case], Any], case: Case) -> None:
    mine, other = outcomes(case)
    assert mine is True
    # The negative control: the decision is gone with the board.
    assert other.startswith("SitesError: decentral.coordinator = ") if case[-1] else other is True


def nobody(folder: Path, transport: str) -> tuple[list[Any], str]:
    """A site of two ranks, and nobody else."""
    with sites_of(folder, transport, 2, ranks=2, coordinator=False, wait_seconds=2.0) as sites:
        sites.start(1, one_round)
        return sites.results(1), sites.config.coordinator


@each(nobody, "torchft", "fixed")
def test_nobody_answers(outcomes: Callable[[Case], Any], case: Case) -> None:
    errors, address = outcomes(case)
    who = {"torchft": "does not answer", "fixed": "site 0 does not answer there"}[case[-1]]
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f'SitesError: decentral.coordinator = "{address}": {who}')


# Who is missing, late, or there twice


def missing(folder: Path, transport: str) -> list[Any]:
    """Site 0 of two."""
    with sites_of(folder, transport, 2, wait_seconds=3.0, join_seconds=1.0) as sites:
        sites.start(0, one_round)
        return sites.results(0)


@each(missing, "torchft", "fixed")
def test_the_missing_site_is_named(outcomes: Callable[[Case], Any], case: Case) -> None:
    (error,) = outcomes(case)
    rule = {
        "torchft": "min_sites = 0: a round needs 2 of 2 sites; waited for decentral.wait_seconds = 3 without",
        "fixed": 'transport = "fixed": no round without',
    }[case[-1]]
    assert error.startswith(f"SitesError: decentral.{rule} site 1 (not started")


def one_after_the_other(folder: Path, min_sites: int) -> list[Any]:
    """Two sites that are never there together, as if the network between them had failed."""
    with sites_of(folder, "torchft", 2, min_sites=min_sites, wait_seconds=4.0, join_seconds=1.0) as sites:
        met = []
        for site in range(2):
            sites.start(site, one_round)
            met += sites.results(site)
        return met


@each(one_after_the_other, 1, 0)
def test_only_a_majority_keeps_sites_together(outcomes: Callable[[Case], Any], case: Case) -> None:
    met = outcomes(case)
    if case[-1] == 1:  # the negative control, which no configuration may ask for
        assert met == [(0,), (1,)]
    else:
        assert ["a round needs 2 of 2" in error for error in met] == [True, True]


def one_comes_back(folder: Path, hasty: bool) -> list[Any]:
    """Site 2 asks for a round for longer than join_seconds before site 0 does; site 1 asks a moment later."""
    with sites_of(folder, "torchft", 3, join_seconds=4.0) as sites:
        sites.start(0, one_round, "go 0")
        sites.start(1, one_round, "go 1")
        sites.wait("started 0")
        sites.wait("started 1")
        sites.start(2, impatient, hasty)
        sites.wait("started 2")
        assert not sites.appears("met 2", 6)
        sites.mark("go 0")
        if hasty:
            sites.wait("met 0")
        sites.mark("go 1")
        return [sites.results(site)[0] for site in (0, 2)]


@each(one_comes_back, False, True)
def test_who_comes_back_does_not_hurry_the_others(outcomes: Callable[[Case], Any], case: Case) -> None:
    # The negative control: after one long request, they do not wait for site 1.
    assert outcomes(case) == ([(0, 2), (0, 2)] if case[-1] else [(0, 1, 2), (0, 1, 2)])


def one_runs_twice(folder: Path, transport: str) -> list[Any]:
    """Site 1 is started twice; what site 0 and the two of them returned."""
    with sites_of(folder, transport, 2) as sites:
        if transport == "fixed":  # it keeps the board
            sites.start(0, one_round, "go")
            sites.wait("started 0")
        sites.start(1, one_round)
        sites.wait("started 1")
        first = sites.processes[1]
        (folder / "started 1").unlink()
        sites.start(1, one_round)
        sites.wait("started 1")
        if transport == "torchft":
            sites.start(0, one_round)
        else:
            sites.results_of(first)
            sites.mark("go")
        return [*sites.results(0), *sites.results(1), *sites.results_of(first)]


@each(one_runs_twice, "torchft", "fixed")
def test_of_two_processes_of_a_site_the_later_takes_part(outcomes: Callable[[Case], Any], case: Case) -> None:
    other, later, earlier = outcomes(case)
    assert other == later == (0, 1)
    assert earlier.startswith("SitesError: decentral.site = 1: another process")


def one_counts_twice(folder: Path, sites_needed: int) -> list[Any]:
    """Site 2 of three is killed while it asks for a round, and started again at once; then site 0 comes."""
    with sites_of(folder, "torchft", 3, join_seconds=1.0, min_sites=sites_needed) as sites:
        sites.start(2, one_round)
        sites.wait("started 2")
        assert not sites.appears("met 2", 3)
        sites.kill(2)
        sites.start(2, one_round)
        alone = sites.appears("met 2", 5)
        sites.start(0, one_round)
        return [alone, *sites.results(0), *sites.results(2)]


@each(one_counts_twice, 2)
def test_a_site_counts_once(outcomes: Callable[[Case], Any], case: Case) -> None:
    assert outcomes(case) == [False, (0, 2), (0, 2)]


def one_is_stopped(folder: Path, transport: str) -> list[Any]:
    """A site of two ranks that waits for another."""
    with sites_of(folder, transport, 2, ranks=2) as sites:
        sites.start(0, stopped)
        sites.wait("started 0")
        sites.mark("stop")
        return sites.results(0)


@each(one_is_stopped, "torchft", "fixed")
def test_a_site_that_is_asked_to_stop_waits_no_longer(outcomes: Callable[[Case], Any], case: Case) -> None:
    assert outcomes(case) == ["stopped"] * 2
