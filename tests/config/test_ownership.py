"""The map of experts to sites: one owner each, none left out, as many on every rank, and what dropped sites leave."""

import inspect
from collections import Counter

import pytest

from pretrain.config.ownership import owned_experts, owner_of, trained_experts
from tests.helpers.configs import DENSE, MOE, make_config

SHAPES = [(8, 1), (8, 2), (8, 4), (8, 8), (16, 4), (32, 4), (36, 3)]


@pytest.mark.parametrize(("num_experts", "sites"), SHAPES)
def test_every_expert_has_one_owner(num_experts, sites):
    owned = [owned_experts(num_experts, sites, site) for site in range(sites)]
    assert sorted(expert for mine in owned for expert in mine) == list(range(num_experts))
    for site, mine in enumerate(owned):
        assert all(owner_of(expert, sites) == site for expert in mine)


def owned_per_rank(owner, num_experts, sites, expert_parallel):
    """How many experts of its run of consecutive ones each expert-parallel rank of each site owns."""
    local = num_experts // expert_parallel
    return {
        sum(owner(expert) == site for expert in range(rank * local, (rank + 1) * local))
        for rank in range(expert_parallel)
        for site in range(sites)
    }


@pytest.mark.parametrize(("num_experts", "sites"), SHAPES)
def test_every_rank_owns_as_many(num_experts, sites):
    layouts = [size for size in range(1, num_experts + 1) if num_experts % (size * sites) == 0]
    for size in layouts:
        counts = owned_per_rank(lambda expert: owner_of(expert, sites), num_experts, sites, size)
        assert counts == {num_experts // (size * sites)}
    # Negative control: owners of consecutive experts, as in the published code, leave most ranks without any.
    if sites > 1 and layouts[-1] > 1:
        assert owned_per_rank(lambda e: e // (num_experts // sites), num_experts, sites, layouts[-1]) != {
            num_experts // (layouts[-1] * sites)
        }


def test_the_map_depends_on_no_layout():
    """A site of any layout, and one process that reads its checkpoint, find the same owners."""
    assert list(inspect.signature(owner_of).parameters) == ["expert", "sites", "dropped"]
    changes = {"decentral": {"kind": "spes", "sites": 2, "site": 1}}
    layouts = ({}, {"parallel.expert": 4}, {"parallel.pipeline": 2, "parallel.tensor": 2})
    assert {trained_experts(make_config(MOE, changes | layout)) for layout in layouts} == {(1, 3, 5, 7)}


@pytest.mark.parametrize("dropped", [(1,), (0, 3), (0, 1, 2)])
def test_survivors_take_over_what_dropped_sites_leave(dropped):
    num_experts, sites = 32, 4
    owned = {site: owned_experts(num_experts, sites, site, dropped) for site in range(sites)}
    assert sorted(expert for mine in owned.values() for expert in mine) == list(range(num_experts))
    survivors = [site for site in range(sites) if site not in dropped]
    for site in range(sites):
        before = owned_experts(num_experts, sites, site)
        assert owned[site] == () if site in dropped else set(before) <= set(owned[site])
    counts = Counter({site: len(owned[site]) for site in survivors})
    assert max(counts.values()) - min(counts.values()) <= len(dropped)


def test_who_trains_everything():
    spes = {"decentral": {"kind": "spes", "sites": 4, "site": 1}}
    assert trained_experts(make_config(MOE, spes)) == (1, 5)
    assert trained_experts(make_config(MOE, spes), dropped=(3,)) == (1, 5, 7)
    assert trained_experts(make_config(MOE)) is None
    assert trained_experts(make_config(MOE, {"decentral": {"kind": "spes", "sites": 1}})) is None
    for start in (MOE, DENSE):
        assert trained_experts(make_config(start, {"decentral": {"kind": "diloco", "sites": 4}})) is None
