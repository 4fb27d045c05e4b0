"""Experts that arrive after their round, at sites that end and start again in the meantime."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.ownership import owner_of
from tests.decentral.recording import differing, lives, meetings, sites_config
from tests.helpers.runs import events, make_corpus

LATE = {"sync_every_steps": 4, "expert_delay_steps": 2}
"""Experts of the round after step 4 are in place after step 6."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_round_with_a_site_back_from_the_last_one_waits_for_experts(corpus: Path, tmp_path: Path) -> None:
    config = sites_config(corpus, tmp_path, decentral=LATE, budget={"steps": 10})
    zero, one = lives(config, tmp_path / "meet", [{}], [{"steps": 7, "save": 7}, {"first": 8}])
    assert events(tmp_path / "site_0", "sync")[1]["moved"] == [1]
    for step in (8, 10):
        assert differing(zero[step].after.weights, one[step].after.weights) == []
    assert [event["step"] for event in events(tmp_path / "site_0", "experts")] == [6], "those of the first round alone"


# Who has a checkpoint from before the experts arrived, and how it meets the other again: at the round after step 8, or
# as both start, after step 7.
RETURNS = [
    pytest.param([{"steps": 6, "save": 5}, {"first": 8}], [{}], id="at-a-round"),
    pytest.param([{"steps": 6, "save": 5}, {"first": 7}], [{"steps": 7, "save": 7}, {}], id="at-a-start"),
]


@pytest.mark.parametrize(("of_zero", "of_one"), RETURNS)
def test_a_site_restarted_before_experts_arrived_gets_those_of_absent_sites_too(
    corpus: Path, tmp_path: Path, of_zero: list[dict[str, Any]], of_one: list[dict[str, Any]]
) -> None:
    config = sites_config(corpus, tmp_path, sites=3, decentral=LATE, model={"num_experts": 6}, budget={"steps": 12})
    members = {"members": {7: (0, 1), 8: (0, 1), 12: (0, 1)}}
    of_sites = [[life | members for life in of_site] for of_site in (of_zero, of_one, [{"steps": 6}])]
    zero, one, _ = lives(config, tmp_path / "meet", *of_sites)
    was = zero[min(zero)].before
    for place, weight in zero[8].after.weights.items():
        if place[1] is not None and owner_of(place[1], 3) == 2:
            assert torch.equal(weight, one[8].before.weights[place]), "as the one has them who stayed"
            assert not torch.equal(weight, was.weights[place]), "it had older ones"
    assert differing(zero[8].after.weights, one[8].after.weights) == []
    assert not zero[8].decentral["late"]
    assert differing(zero[12].after.weights, one[12].after.weights) == []


def _spoil_a_copy(module: str, call: int) -> None:
    """In this process: site 1 gets a wrong copy of an expert, the `call`th time that it gets any."""
    stage, calls = sys.modules[module].stage_experts, []

    def spoiled(round_: Any, *arguments: Any, **keywords: Any) -> Any:
        staged = stage(round_, *arguments, **keywords)
        calls.append(round_)
        if round_.site == 1 and len(calls) == call:
            next(iter(staged.values())).zero_()
        return staged

    sys.modules[module].stage_experts = spoiled


MERGE = {"merge": {"coefficient": 0.3, "every_steps": 2, "until_step": 100, "neighbours": 1}}
# After the start and the round, a merge is the third time that experts travel.
ARRIVALS = [
    pytest.param(LATE, "pretrain.decentral.late", 1, id="late"),
    pytest.param({}, "pretrain.syncing", 2, id="round"),
    pytest.param(MERGE, "pretrain.syncing", 3, id="merge"),
]


@pytest.mark.parametrize(("decentral", "module", "call"), ARRIVALS)
def test_a_copy_that_is_not_its_owners_ends_the_run(
    corpus: Path, tmp_path: Path, decentral: dict[str, Any], module: str, call: int
) -> None:
    config = sites_config(corpus, tmp_path, decentral=decentral, budget={"steps": 8})
    with pytest.raises(AssertionError, match="site 1 has other weights than site 0"):
        meetings(config, tmp_path / "meet", prepare=partial(_spoil_a_copy, module, call))
