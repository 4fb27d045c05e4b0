"""Who gives and who takes in a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.decentral.roles import check_same_run, common_keys, roles_of
from pretrain.errors import ConfigError
from tests.decentral.recording import sites_config
from tests.helpers.sites import at_site


def header(round_: int, step: int, *, due: bool = False, late: bool = False) -> dict[str, Any]:
    return {"round": round_, "step": step, "due": due, "late": late, "config": {"optim.lr": 1e-3}}


def test_all_begin_with_the_weights_of_the_first() -> None:
    roles = roles_of({site: header(-1, 0) for site in (2, 0, 1)})
    assert not roles.averaging
    assert roles.givers == (0,)
    assert roles.stale == roles.takers == {1, 2}
    assert roles.moved == set()
    assert [roles.publisher(owner) for owner in range(3)] == [0, 0, 0]


def test_a_synchronisation_averages_all_who_came_for_it() -> None:
    roles = roles_of({site: header(4, 500, due=True) for site in range(3)})
    assert roles.averaging
    assert roles.givers == (0, 1, 2)
    assert roles.takers == {0, 1, 2}
    assert roles.stale == roles.moved == set()
    assert [roles.publisher(owner) for owner in range(3)] == [0, 1, 2]
    # Site 3 is absent: nobody sends its experts, which all have as they last were.
    assert roles.publisher(3) is None


def test_a_site_that_missed_rounds_takes_all_and_gives_nothing() -> None:
    roles = roles_of({0: header(2, 300), 1: header(4, 500, due=True), 2: header(4, 500, due=True)})
    assert roles.averaging
    assert roles.givers == (1, 2)
    assert roles.stale == roles.moved == {0}
    assert roles.takers == {0, 1, 2}
    # Its own experts come from a site that has their last committed bytes; so do an absent site's.
    assert [roles.publisher(owner) for owner in range(4)] == [1, 1, 2, 1]


def test_a_site_restarted_from_the_last_round_keeps_its_experts_and_gives_no_weights() -> None:
    roles = roles_of({0: header(4, 400), 1: header(4, 500, due=True)})
    assert roles.givers == (1,), "what it trained since that round is lost: its weights are old"
    assert roles.stale == set()
    assert roles.moved == {0}
    assert roles.publisher(0) == 0


def test_a_site_without_a_past_takes_all_at_any_time() -> None:
    roles = roles_of({0: header(-1, 0), 1: header(0, 7)})
    assert not roles.averaging
    assert roles.givers == (1,)
    assert roles.stale == roles.takers == roles.moved == {0}


def test_all_restarted_at_different_steps_of_one_interval_keep_their_weights() -> None:
    roles = roles_of({0: header(3, 310), 1: header(3, 345)})
    assert not roles.averaging
    assert not roles.moves_anything
    assert roles.stale == roles.takers == set()
    assert roles.moved == {0}


def test_all_restarted_with_one_behind_by_a_round() -> None:
    roles = roles_of({0: header(2, 299), 1: header(3, 310), 2: header(3, 310)})
    assert not roles.averaging
    assert roles.givers == (1,), "weights differ between synchronisations: they come from one site"
    assert roles.stale == roles.takers == {0}
    assert [roles.publisher(owner) for owner in range(3)] == [1, 1, 1]


def test_a_site_whose_late_experts_never_came_gets_them_from_one_that_has_them() -> None:
    roles = roles_of({0: header(4, 400, late=True), 1: header(4, 500, due=True), 2: header(3, 300, late=True)})
    assert roles.stale == {2}
    assert roles.behind == {0}, "whoever takes over all weights has no need of them"
    # Also when it is the first of those who give.
    roles = roles_of({site: header(4, 500, due=True, late=site == 0) for site in (0, 1)})
    assert roles.source == 0
    assert [roles.publisher(owner) for owner in range(3)] == [0, 1, 1]
    # Where nobody has them, all have the same.
    roles = roles_of({site: header(4, 500, due=True, late=True) for site in (1, 2)})
    assert [roles.publisher(owner) for owner in range(3)] == [1, 1, 2]
    # Between rounds experts go to those that take over all, from one that has the newest.
    roles = roles_of({0: header(4, 480, late=True), 1: header(4, 470), 2: header(3, 390)})
    assert roles.source == 0
    assert [roles.publisher(owner) for owner in range(3)] == [1, 1, 1]
    assert not roles_of({0: header(4, 480, late=True), 1: header(4, 470)}).moves_anything


def test_sites_have_all_in_common_but_what_belongs_to_a_place(tmp_path: Path) -> None:
    config = sites_config(tmp_path, tmp_path / "run", sites=2)
    elsewhere = at_site(config, 1).model_copy(update={"run": config.run.model_copy(update={"directory": tmp_path})})
    assert common_keys(elsewhere) == common_keys(config)
    three = sites_config(tmp_path, tmp_path / "run", sites=3, batch={"global_batch_size": 8})
    differing = {key for key, value in common_keys(three).items() if common_keys(config)[key] != value}
    assert differing == {"decentral.sites"}


def test_a_site_with_other_keys_is_told_and_the_others_go_on() -> None:
    headers = {0: header(1, 10), 1: header(1, 10) | {"config": {"optim.lr": 2e-3, "optim.new": 1}}}
    check_same_run(headers, site=0, source=0)
    with pytest.raises(ConfigError) as caught:
        check_same_run(headers, site=1, source=0)
    lines = str(caught.value)
    assert "optim.lr = 0.002: site 0 has 0.001" in lines
    assert "optim.new = 1: site 0 has None" in lines
