"""Sites that are away for a while: what the others do, and what they find when they come back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.ownership import owned_experts, owner_of
from pretrain.config.schema import Config
from tests.decentral.recording import Meeting, Snapshot, differing, lives, record, sites_config
from tests.helpers.runs import events, make_corpus, rows
from tests.helpers.sites import Site, at_site

AWAY = 1
MEMBERS = {4: (0, 2)}
"""Site 1 is not there after step 4; it is back for the meeting after step 6."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def with_absence(config: Config, folder: Path, ranks: int, **of_absent: Any) -> list[list[dict[int, Meeting]]]:
    """Train three sites, of which one ends after step 3 and starts again: [site][rank][step], of its second life.

    of_absent: keywords of `recorded` for its first life.
    """
    folder.mkdir()
    with ExitStack() as stack:

        def start(site: int, **keywords: Any) -> Site:
            begun = Site(record, ranks, at_site(config, site), folder, {"members": MEMBERS} | keywords)
            stack.callback(begun.close)
            return begun

        others = {site: start(site) for site in range(3) if site != AWAY}
        start(AWAY, steps=3, **of_absent).results()
        back = start(AWAY, first=6)
        found = {site: begun.results() for site, begun in {AWAY: back, **others}.items()}
    return [[{meeting.after.step: meeting for meeting in of_rank} for of_rank in found[site]] for site in range(3)]


def mean_of(snapshots: list[Snapshot], place: Any) -> torch.Tensor:
    return torch.stack([snapshot.masters[place].double() for snapshot in snapshots]).mean(dim=0)


LAYOUTS = [pytest.param(1, {}, "bf16", id="bf16"), pytest.param(2, {"expert": 2}, "fp32", id="ep2")]


@pytest.mark.parametrize(("ranks", "parallel", "precision"), LAYOUTS)
def test_without_a_site_the_others_go_on_and_it_takes_over_what_it_missed(
    corpus: Path, tmp_path: Path, ranks: int, parallel: dict[str, int], precision: str
) -> None:
    config = sites_config(
        corpus,
        tmp_path,
        sites=3,
        budget={"steps": 8},
        model={"num_experts": 12},
        parallel=parallel,
        run={"precision": precision},
    )
    results = with_absence(config, tmp_path / "meet", ranks)
    for rank in range(ranks):
        zero, one, two = (results[site][rank] for site in range(3))
        assert zero[4].decentral["missed"] == {"1": 1}
        assert zero[6].decentral == one[6].decentral == {**zero[6].decentral, "round": 3, "missed": {}}
        # Without it: the mean of those who were there, and its experts as they last were.
        assert differing(zero[4].after.weights, two[4].after.weights) == []
        for place, master in zero[4].after.masters.items():
            if place[1] is None:
                wanted = mean_of([zero[4].before, two[4].before], place)
                torch.testing.assert_close(master.double(), wanted, rtol=0, atol=1e-6)
        for place, weight in zero[4].after.weights.items():
            if place[1] is not None and owner_of(place[1], 3) == AWAY:
                assert torch.equal(weight, zero[2].after.weights[place])
        # Back: all weights as the others have them, to which it gave nothing; its optimizer begins again.
        assert differing(zero[6].after.weights, one[6].after.weights) == []
        for place, master in one[6].after.masters.items():
            if place[1] is None:
                assert torch.equal(master, zero[6].after.masters[place])
                wanted = mean_of([zero[6].before, two[6].before], place)
                torch.testing.assert_close(master.double(), wanted, rtol=0, atol=1e-6)
            else:
                assert torch.equal(master.to(one[6].after.weights[place].dtype), one[6].after.weights[place])
                assert torch.equal(one[6].after.weights[place], zero[2].after.weights[place])
        assert all(not state.any() for state in one[6].after.states.values())
        assert any(state.any() for state in zero[6].after.states.values())
        # From then on it is one of them.
        for place, master in one[8].after.masters.items():
            if place[1] is None:
                wanted = mean_of([zero[8].before, one[8].before, two[8].before], place)
                torch.testing.assert_close(master.double(), wanted, rtol=0, atol=1e-6)
        assert differing(zero[8].after.weights, one[8].after.weights) == []
    syncs = events(tmp_path / "site_0", "sync")
    assert [event["absent"] for event in syncs] == [[], [AWAY], [], []]
    assert [event.get("stale") for event in syncs] == [None, None, [AWAY], None]


@pytest.mark.parametrize("delay", [0, 1])
def test_experts_of_an_absent_site_change_hands_and_come_back(corpus: Path, tmp_path: Path, delay: int) -> None:
    decentral = {"reown_after_rounds": 1, "reown_rewarm_steps": 2, "expert_delay_steps": delay}
    config = sites_config(
        corpus,
        tmp_path,
        sites=3,
        budget={"steps": 8},
        model={"num_experts": 12},
        decentral=decentral,
        run={"precision": "bf16"},
    )
    (zero,), (one,), (two,) = with_absence(config, tmp_path / "meet", 1)
    # What others take over comes at once, whatever may be late otherwise.
    assert differing(zero[4].after.weights, two[4].after.weights) == []
    assert [event["step"] for event in events(tmp_path / "site_0", "experts")] == ([3] if delay else [])
    for site, found in ((0, zero), (2, two)):
        before, after = found[4].before, found[4].after
        trained = {place[1] for place in after.masters if place[1] is not None}
        assert trained == set(owned_experts(12, 3, site, dropped=[AWAY]))
        assert len(trained) == 6
        for place, master in after.masters.items():
            own = place[1] is None or owner_of(place[1], 3) == site
            for name in ("exp_avg", "exp_avg_sq"):
                state = after.states[name, place]
                # What it trained keeps its state; what is new begins with none, at the published weights.
                assert torch.equal(state, before.states[name, place]) if own else not state.any()
            if not own:
                assert torch.equal(master, after.weights[place].float())
        # They do train there.
        adopted = [place for place in after.masters if place[1] is not None and owner_of(place[1], 3) == AWAY]
        assert all(differing({p: found[6].before.masters[p]}, {p: after.masters[p]}) for p in adopted)
    # Back: it trains its experts again, as the others left them.
    trained = {place[1] for place in one[6].after.masters if place[1] is not None}
    assert trained == set(owned_experts(12, 3, AWAY))
    assert differing(one[6].after.weights, zero[6].after.weights) == []
    for place, master in one[6].after.masters.items():
        if place[1] is not None:
            by = {0: zero, 2: two}[owner_of(place[1], 3, dropped=[AWAY])]
            assert torch.equal(one[6].after.weights[place], by[6].before.weights[place])
            assert torch.equal(master, one[6].after.weights[place].float())
    for found in (zero, one, two):
        assert found[6].decentral["handovers"] == [
            {"step": 4, "experts": list(owned_experts(12, 3, AWAY))},
            {"step": 6, "experts": list(owned_experts(12, 3, AWAY))},
        ]
    assert differing(zero[8].after.weights, two[8].after.weights) == []
    by_step = {row["step"]: row for row in rows(tmp_path / "site_0", "train")}
    assert by_step[5]["lr_new"] == pytest.approx([by_step[4]["lr"] / 2]), "half of the way up to where it was"


def test_a_site_back_from_the_last_round_keeps_its_state_and_gives_nothing(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path, budget={"steps": 8}, run={"precision": "bf16"})
    folder = tmp_path / "meet"
    folder.mkdir()
    with ExitStack() as stack:

        def start(site: int, **keywords: Any) -> Site:
            begun = Site(record, 1, at_site(config, site), folder, keywords)
            stack.callback(begun.close)
            return begun

        other = start(0)
        # It has done the round after step 4 and ends; what it holds then is in its checkpoint.
        (lost,) = start(1, steps=4, save=4).results()
        (back,) = start(1, first=6).results()
        (stayed,) = other.results()
    zero, one = ({meeting.after.step: meeting for meeting in found} for found in (stayed, back))
    was, now = lost[-1].after, one[6].after
    assert was.step == 4
    assert differing(was.states, now.states) == []
    for place, master in now.masters.items():
        wanted = was.masters[place] if place[1] is not None else zero[6].before.masters[place]
        assert torch.equal(master, wanted), place
    assert differing(now.weights, zero[6].after.weights) == []
    assert one[8].decentral["round"] == zero[8].decentral["round"] == 4
    assert differing(one[8].after.weights, zero[8].after.weights) == []


def test_a_merge_with_a_site_that_knows_older_owners(corpus: Path, tmp_path: Path) -> None:
    """Site 0 is back; it knows nothing of that site 1 trains all experts, as site 2 has left, too."""
    merge = {"coefficient": 0.3, "every_steps": 6, "until_step": 100, "neighbours": 1}
    config = sites_config(
        corpus,
        tmp_path,
        sites=3,
        budget={"steps": 8},
        model={"num_experts": 6},
        decentral={"reown_after_rounds": 1, "merge": merge},
    )
    members = {"members": {4: (1,), 6: (0, 1)}}
    of_sites = [[{"steps": 3}, {"first": 6, "steps": 6}], [{"steps": 6}], [{"steps": 3}]]
    of_zero, of_one, _ = lives(config, tmp_path / "meet", *([life | members for life in site] for site in of_sites))
    zero, one = of_zero[6], of_one[6]
    (event,) = [event for event in events(tmp_path / "site_1", "sync") if "merged" in event]
    assert event["merged"]
    assert differing(zero.after.weights, one.after.weights) == []
    for place, weight in zero.after.weights.items():
        assert place[1] is None or not torch.equal(weight, one.before.weights[place]), "every expert has moved"
