"""[decentral]: what follows from its keys, and every rule with a configuration that breaks it and one that does not."""

from pathlib import Path

import pytest

from pretrain.config.decentral_rules import is_loopback
from pretrain.config.load import dump_config, load_config
from pretrain.config.rules import Layout, check
from tests.helpers.configs import DENSE, MOE, make_config

SPES = {**MOE, "decentral": {"kind": "spes", "sites": 4}}
DILOCO = {**MOE, "decentral": {"kind": "diloco", "sites": 4}}
MERGING = {"decentral.merge": {"coefficient": 0.1}}


def merging(**keys):
    return {"decentral.merge": {"coefficient": 0.1, **keys}}


# Each row: start, what breaks the rule, the key that is named, what mends it, world size.
RULES = {
    "sites count from 0": (SPES, {"decentral.site": 4}, "decentral.site", {"decentral.site": 3}, None),
    "sites divide experts": (SPES, {"decentral.sites": 3}, "decentral.sites", {"decentral.sites": 2}, None),
    "sites divide a rank's experts": (
        SPES,
        {"parallel.expert": 4},
        "decentral.sites",
        {"parallel.expert": 2},
        None,
    ),
    "or there are more experts": (
        SPES,
        {"parallel.expert": 4},
        "decentral.sites",
        {"model.num_experts": 16},
        None,
    ),
    "spes needs experts": (
        {**DENSE, "decentral": {"kind": "spes", "sites": 4}},
        {},
        "decentral.kind",
        {"decentral.kind": "diloco"},
        None,
    ),
    "no growth": (SPES, {"growth": [{"at_step": 3, "depth": {}}]}, "[[growth]]", {"growth": []}, None),
    "sites share a batch": (
        SPES,
        {"batch.global_batch_size": 12},
        "batch.global_batch_size",
        {"batch.global_batch_size": 16},
        2,
    ),
    "and its micro-batches": (
        SPES,
        {"batch.global_batch_size": 24, "batch.micro_batch_size": 2},
        "batch.global_batch_size",
        {"batch.micro_batch_size": 1},
        2,
    ),
    "merges follow rounds": (
        SPES,
        merging(every_steps=150),
        "decentral.merge.every_steps",
        {"decentral.sync_every_steps": 50},
        None,
    ),
    "merging begins before it ends": (
        SPES,
        merging(until_step=500),
        "decentral.merge.until_step",
        {"decentral.merge.until_step": 501},
        None,
    ),
    "no expert is its own neighbour": (
        SPES,
        merging(neighbours=8),
        "decentral.merge.neighbours",
        {"decentral.merge.neighbours": 7},
        None,
    ),
    "diloco has no merge": (
        DILOCO,
        MERGING,
        "decentral.merge.coefficient",
        {"decentral.merge.coefficient": 0.0},
        None,
    ),
    "diloco has no late experts": (
        DILOCO,
        {"decentral.expert_delay_steps": 1},
        "decentral.expert_delay_steps",
        {"decentral.kind": "spes"},
        None,
    ),
    "diloco has no owners": (
        DILOCO,
        {"decentral.reown_after_rounds": 2},
        "decentral.reown_after_rounds",
        {"decentral.kind": "spes"},
        None,
    ),
    "a mean has no step size": (
        SPES,
        {"decentral.outer_lr": 0.5},
        "decentral.outer_lr",
        {"decentral.outer": "nesterov"},
        None,
    ),
    "a mean has no momentum": (
        DILOCO,
        {"decentral.outer": "average", "decentral.outer_momentum": 0.5},
        "decentral.outer_momentum",
        {"decentral.outer": "auto"},
        None,
    ),
    "experts come before the next round": (
        SPES,
        {"decentral.expert_delay_steps": 100},
        "decentral.expert_delay_steps",
        {"decentral.expert_delay_steps": 99},
        None,
    ),
    "members are sites": (SPES, {"decentral.min_sites": 5}, "decentral.min_sites", {"decentral.min_sites": 4}, None),
    "half is no majority": (SPES, {"decentral.min_sites": 2}, "decentral.min_sites", {"decentral.min_sites": 3}, None),
    "fixed sites are all there": (
        SPES,
        {"decentral.min_sites": 3, "decentral.transport": "fixed"},
        "decentral.min_sites",
        {"decentral.min_sites": 4},
        None,
    ),
    "fixed sites miss nothing": (
        SPES,
        {"decentral.reown_after_rounds": 2, "decentral.transport": "fixed"},
        "decentral.reown_after_rounds",
        {"decentral.transport": "torchft"},
        None,
    ),
    "a coordinator has a port": (
        SPES,
        {"decentral.coordinator": "127.0.0.1"},
        "decentral.coordinator",
        {"decentral.coordinator": "127.0.0.1:1"},
        None,
    ),
    "a port is a number": (
        SPES,
        {"decentral.coordinator": "localhost:x"},
        "decentral.coordinator",
        {"decentral.coordinator": "localhost:65535"},
        None,
    ),
    "a remote coordinator, no address of one's own": (
        SPES,
        {"decentral.coordinator": "coordinator.example:29400"},
        "decentral.bind",
        {"decentral.bind": "10.0.0.2"},
        None,
    ),
    "one address": (SPES, {"decentral.bind": "0.0.0.0"}, "decentral.bind", {"decentral.bind": "10.0.0.2"}, None),
    "frozen experts are ours": (
        SPES,
        {"model.backend": "transformer_engine"},
        "model.backend",
        {"decentral.sites": 1},
        None,
    ),
    "and what needs Transformer Engine is not": (
        SPES,
        {"parallel.context": 2},
        "parallel.context",
        {"decentral.kind": "diloco"},
        None,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    start, breaks, key, mends, world_size = RULES[name]
    (line,) = check(make_config(start, breaks), world_size)
    assert line.startswith(f"{key} = ") or line.startswith(f"{key}: ")
    assert "; " in line
    assert check(make_config(start, breaks | mends), world_size) == []


def test_all_at_once():
    changes = {"decentral.site": 9, "decentral.sites": 3, "decentral.coordinator": "x", "decentral.min_sites": 1}
    keys = [line.split(" = ")[0] for line in check(make_config(SPES, changes))]
    assert keys == ["decentral.site", "decentral.sites", "decentral.min_sites", "decentral.coordinator"]


def test_one_site_needs_nothing_of_the_others():
    changes = {"decentral.sites": 1, "decentral.min_sites": 1, "parallel.expert": 8, "model.backend": "auto"}
    assert check(make_config(SPES, changes), 8) == []


def test_the_remedy_of_indivisible_experts_is_one():
    (line,) = check(make_config(SPES, {"parallel.expert": 4}))
    assert "model.num_experts / parallel.expert = 8 / 4" in line
    assert line.endswith("use parallel.expert = 2, decentral.sites = 2 or model.num_experts = 16")


@pytest.mark.parametrize("kind", ["spes", "diloco"])
def test_a_site_takes_its_part_of_the_batch(kind):
    start = {**MOE, "decentral": {"kind": kind, "sites": 4}}
    config = make_config(start, {"batch.global_batch_size": 48, "batch.micro_batch_size": 2})
    assert check(config, 2) == []
    assert config.sites == 4
    layout = Layout.of(config, 2)
    assert (layout.data_parallel, layout.microbatches) == (2, 48 // (2 * 2 * 4))
    alone = make_config(MOE, {"batch.global_batch_size": 48, "batch.micro_batch_size": 2})
    assert alone.sites == 1
    assert Layout.of(alone, 2).microbatches == 48 // (2 * 2)


def test_every_site_has_a_folder():
    config = make_config(SPES, {"decentral.site": 3})
    assert config.site_directory == config.run.directory / "site_3"
    assert make_config(MOE).site_directory == Path("runs/test")


def test_what_is_left_open_is_settled():
    spes, diloco = make_config(SPES).decentral, make_config(DILOCO).decentral
    assert (spes.outer_rule, diloco.outer_rule) == ("average", "nesterov")
    assert make_config(SPES, {"decentral.outer": "nesterov"}).decentral.outer_rule == "nesterov"
    quorums = [make_config(SPES, {"decentral.sites": sites}).decentral.quorum for sites in (1, 2, 3, 4, 5)]
    assert quorums == [1, 2, 2, 3, 3]
    assert make_config(SPES, {"decentral.min_sites": 4}).decentral.quorum == 4


def test_the_share_of_neighbours_falls_to_zero():
    """The schedule of arXiv 2602.11543's released code: 39 merges in 20,000 steps, their shares 0.975 in all."""
    merge = make_config(SPES, merging(coefficient=0.05, until_step=20_000)).decentral.merge
    shares = [merge.coefficient_at(step) for step in range(1, 30_001)]
    assert sum(share > 0 for share in shares) == 39
    assert sum(shares) == pytest.approx(0.975)
    assert merge.coefficient_at(500) == 0.05 * (1 - 500 / 20_000)
    assert merge.coefficient_at(501) == merge.coefficient_at(20_000) == merge.coefficient_at(20_500) == 0


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_loopback(host, answer):
    assert is_loopback(host) is answer


def test_round_trip(tmp_path):
    config = make_config(SPES, merging())
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config
    assert load_config(tmp_path / "run.toml", ["decentral.site=1"]).decentral.site == 1
    (tmp_path / "alone.toml").write_text(dump_config(make_config(MOE)))
    assert load_config(tmp_path / "alone.toml").decentral is None
