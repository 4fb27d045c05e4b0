"""What a synchronisation makes of the weights of all sites, on several layouts inside a site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.ownership import owner_of
from pretrain.run import Run
from tests.decentral.recording import Meeting, Snapshot, differing, meetings, sites_config
from tests.helpers.runs import events, make_corpus
from tests.helpers.sites import ScriptedRound

# Sums of up to three fp32 numbers around 1, in any order.
MEAN_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def merge_problems(before: list[Snapshot], after: list[Snapshot]) -> list[str]:
    """What of one rank of every site is not as a SPES round leaves it."""
    problems = []
    for place, mine in after[0].weights.items():
        expert = place[1]
        if any(not torch.equal(mine, snapshot.weights[place]) for snapshot in after):
            problems.append(f"{place}: sites differ")
        if expert is not None and not torch.equal(mine, before[owner_of(expert, len(before))].weights[place]):
            problems.append(f"{place}: not its owner's")
    for place in after[0].masters:
        if place[1] is None:
            mean = torch.stack([snapshot.masters[place].double() for snapshot in before]).mean(dim=0)
            if any(float((s.masters[place].double() - mean).abs().max()) > MEAN_TOLERANCE for s in after):
                problems.append(f"{place}: not the mean")
    return problems


def naively_averaged(before: list[Snapshot]) -> list[Snapshot]:
    """What averaging everything, frozen copies too, would leave."""
    weights = {
        place: torch.stack([other.weights[place].float() for other in before]).mean(dim=0).to(weight.dtype)
        for place, weight in before[0].weights.items()
    }
    shared = {
        place: torch.stack([other.masters[place] for other in before]).mean(dim=0)
        for place in before[0].masters
        if place[1] is None
    }
    return [Snapshot(snapshot.step, weights, shared) for snapshot in before]


LAYOUTS = [
    pytest.param(1, {}, "fp32", 2, id="one-process"),
    pytest.param(1, {}, "bf16", 3, id="three-sites-bf16"),
    pytest.param(2, {"expert": 2}, "fp32", 2, id="ep2"),
    pytest.param(2, {}, "bf16", 2, id="dp2-bf16"),
    pytest.param(2, {"tensor": 2}, "fp32", 2, id="tp2"),
    pytest.param(2, {"pipeline": 2}, "bf16", 2, id="pp2-bf16"),
    pytest.param(2, {"tensor": 2, "expert_tensor": 2}, "fp32", 2, id="etp2"),
]


@pytest.mark.parametrize(("ranks", "parallel", "precision", "sites"), LAYOUTS)
def test_shared_weights_are_averaged_and_experts_are_their_owners(
    corpus: Path, tmp_path: Path, ranks: int, parallel: dict[str, int], precision: str, sites: int
) -> None:
    model, run = {"num_experts": 6 if sites == 3 else 4}, {"precision": precision}
    config = sites_config(corpus, tmp_path, sites=sites, parallel=parallel, model=model, run=run)
    results = meetings(config, tmp_path / "meet", ranks)
    for rank in range(ranks):
        of_rank = [site[rank] for site in results]
        assert [len(found) for found in of_rank] == [3] * sites, "the start, and after steps 2 and 4"
        for number in (1, 2):
            before, after = [found[number].before for found in of_rank], [found[number].after for found in of_rank]
            assert merge_problems(before, after) == []
            # The check sees what averaging everything would do to experts.
            naive = merge_problems(before, naively_averaged(before))
            assert any("not its owner's" in problem for problem in naive)
            # Sites have trained apart, and moments are nobody else's business.
            assert differing(before[0].masters, before[1].masters)
            for found in of_rank:
                assert differing(found[number].before.states, found[number].after.states) == []
        assert differing(of_rank[0][1].after.states, of_rank[1][1].after.states)


def _other_weights(run: Run) -> None:
    """As if other initial weights had been drawn at the second site."""
    if run.config.decentral and run.config.decentral.site == 1:
        for shard in run.engine.shards:
            shard.tensor.data.mul_(1.5)
        run.optimizer.begin_again()


def test_sites_begin_with_the_same_weights_whatever_they_drew(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path)
    (first,), (second,) = meetings(config, tmp_path / "meet", spoil=_other_weights, steps=1)
    start, other = first[0], second[0]
    assert differing(start.before.weights, other.before.weights)
    assert differing(start.after.weights, other.after.weights) == []
    assert differing(start.before.weights, start.after.weights) == [], "those of the first site"
    assert _shared(other.after) == _shared(start.after)


def _shared(snapshot: Snapshot) -> dict[str, list[float]]:
    """Masters of what all sites train."""
    return {str(place): master.flatten().tolist() for place, master in snapshot.masters.items() if place[1] is None}


def test_a_diloco_round_steps_with_nesterov_momentum(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path, decentral={"kind": "diloco", "outer_lr": 0.7, "outer_momentum": 0.9})
    (first,), (second,) = meetings(config, tmp_path / "meet")
    assert differing(first[-1].after.masters, second[-1].after.masters) == [], "experts, too"
    for place, start in first[0].after.masters.items():
        anchor = torch.nn.Parameter(start.double())
        sgd = torch.optim.SGD([anchor], lr=0.7, momentum=0.9, nesterov=True)
        for one, other in zip(first[1:], second[1:], strict=True):
            mean = (one.before.masters[place].double() + other.before.masters[place].double()) / 2
            anchor.grad = anchor.detach() - mean
            sgd.step()
            found = one.after.masters[place].double()
            torch.testing.assert_close(found, anchor.detach(), rtol=0, atol=1e-6)
        # Averaging alone would not do.
        assert float((mean - anchor.detach()).abs().max()) > 1e-4


def test_an_outer_optimizer_begins_where_all_sites_have_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    average = sites_config(corpus, tmp_path, sites=1, decentral={"kind": "diloco", "outer": "average"})
    nesterov = sites_config(corpus, tmp_path, sites=1, decentral={"kind": "diloco"}, budget={"steps": 6})
    # Every second step ends with a round.
    meetings(average, tmp_path / "first", save=3, steps=3)
    with pytest.raises(AssertionError, match=r'decentral\.outer = "auto": .*step_00000003 was written between rounds'):
        meetings(nesterov, tmp_path / "refused")
    meetings(average, tmp_path / "second", save=4)
    ((resumed,),) = meetings(nesterov, tmp_path / "third")
    assert [meeting.before.step for meeting in resumed] == [4, 6]


@pytest.mark.parametrize("kind", ["spes", "diloco"])
def test_one_site_is_a_plain_run(corpus: Path, tmp_path: Path, kind: str) -> None:
    decentral = {"kind": kind, "outer": "average"}
    ((alone,),) = meetings(sites_config(corpus, tmp_path / "a", sites=1, decentral=decentral), tmp_path / "meet")
    ((plain,),) = meetings(sites_config(corpus, tmp_path / "b", sites=0), tmp_path / "none")
    last = plain[-1].after
    assert last.step == alone[-1].after.step == 4
    for found, wanted in ((alone[-1].after.masters, last.masters), (alone[-1].after.states, last.states)):
        assert differing(found, wanted) == []
    # It has trained at all.
    assert differing(alone[0].after.masters, last.masters)


@pytest.mark.parametrize("ranks", [1, 2])
def test_late_experts_arrive_at_all_sites_after_the_same_step(corpus: Path, tmp_path: Path, ranks: int) -> None:
    decentral = {"sync_every_steps": 3, "expert_delay_steps": 2}
    config = sites_config(corpus, tmp_path, decentral=decentral, budget={"steps": 6})
    for of_rank in zip(*meetings(config, tmp_path / "meet", ranks), strict=True):
        by_step: list[dict[int, Meeting]] = [{found.after.step: found for found in site} for site in of_rank]
        assert sorted(by_step[0]) == [0, 3, 5, 6]
        for site in range(2):
            others = by_step[1 - site]
            for place, arrived in by_step[site][5].after.weights.items():
                if place[1] is not None and owner_of(place[1], 2) != site:
                    sent = others[3].before.weights[place]
                    assert torch.equal(arrived, sent), "as they were when the round opened"
                    assert torch.equal(by_step[site][3].after.weights[place], by_step[site][0].after.weights[place])
                    assert not torch.equal(arrived, others[5].after.weights[place]), "their owner has trained on"
        # The last round does not wait: nothing would come after it.
        assert merge_problems([site[6].before for site in by_step], [site[6].after for site in by_step]) == []


SHORT = {"budget": {"steps": 2}, "schedule": {"warmup_steps": 1}}
MERGING = {"merge": {"coefficient": 0.3, "every_steps": 2, "until_step": 100, "neighbours": 1}}


def _merged_by_hand(before: list[Snapshot], step: int) -> dict[Any, torch.Tensor]:
    """Experts after a merge with one neighbour, in fp64 from what their owners had."""
    own = {
        place: before[owner_of(place[1], len(before))].weights[place].double()
        for place in before[0].weights
        if place[1] is not None
    }
    found = {}
    for place, old in own.items():
        gates = {
            other[1]: weight[0].flatten() for other, weight in own.items() if other[0] == place[0].replace("fc2", "fc1")
        }
        mine = gates.pop(place[1])
        nearest = max(gates, key=lambda expert: float(torch.cosine_similarity(mine, gates[expert], dim=0)))
        found[place] = old + 0.3 * (1 - step / 100) * (own[place[0], nearest, place[2]] - old)
    return found


def test_merged_experts_are_the_same_at_all_sites(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path, decentral=MERGING, **SHORT)
    (first,), (second,) = meetings(config, tmp_path / "meet")
    assert differing(first[-1].after.weights, second[-1].after.weights) == []
    wanted = _merged_by_hand([first[-1].before, second[-1].before], step=2)
    for place, weight in wanted.items():
        torch.testing.assert_close(first[-1].after.weights[place].double(), weight, rtol=0, atol=1e-6)
    # Without merging they would be their owners'.
    assert "not its owner's" in "".join(merge_problems([m[-1].before for m in (first, second)], [first[-1].after]))
    assert [event["merged"] for event in events(tmp_path / "site_0", "sync")] == [True]


def _second_transaction_fails() -> None:
    commit = ScriptedRound.commit
    calls: dict[int, int] = {}

    def failing(round_: ScriptedRound, ok: bool) -> bool:
        calls[id(round_)] = calls.get(id(round_), 0) + 1
        return commit(round_, ok and calls[id(round_)] != 2)

    ScriptedRound.commit = failing  # type: ignore[method-assign]


def test_a_merge_that_not_all_have_is_taken_back(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path, decentral=MERGING, **SHORT, run={"precision": "bf16"})
    (first,), (second,) = meetings(config, tmp_path / "meet", prepare=_second_transaction_fails)
    before, after = [[getattr(m[-1], name) for m in (first, second)] for name in ("before", "after")]
    assert merge_problems(before, after) == [], "the round stands, the merge does not"
    for site in range(2):
        experts = {place: master for place, master in before[site].masters.items() if place[1] is not None}
        assert differing(experts, {place: after[site].masters[place] for place in experts}) == []
    assert [event["merged"] for event in events(tmp_path / "site_0", "sync")] == [False]
