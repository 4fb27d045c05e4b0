"""The plan of sites that train together: memory and bytes by hand and as published, on every layout, and the text."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.plan import decimal_bytes, format_plan, make_plan
from pretrain.plan.decentral import rank_traffic, round_memory, server_traffic, site_memory, sync_traffic
from pretrain.plan.memory import rank_memory
from tests.helpers.configs import DENSE, MOE, make_config

CONFIGS = Path(__file__).parents[1] / "configs" / "decentral"

# Shared and expert parameters of tests.helpers.configs.MOE: embedding, output and last norm; of each of 4 layers two
# norms, queries, keys and values, their output, router; and 8 experts of ffn 16.
S = 2 * 96 * 32 + 32 + 4 * (2 * 32 + (4 + 2 * 2) * 8 * 32 + 4 * 8 * 32 + 8 * 32)
X = 4 * 8 * (2 * 16 * 32 + 16 * 32)


def spes(changes: dict | None = None, *, start: dict = MOE) -> Config:
    return make_config({**start, "decentral": {"kind": "spes", "sites": 4}}, changes)


def diloco(changes: dict | None = None, *, start: dict = MOE) -> Config:
    return spes({"decentral.kind": "diloco", **(changes or {})}, start=start)


# arXiv 2602.11543's shapes on 4 sites: per cent saved with a server, on the way up and both ways; GB up and down in
# fp32; and GB of a full replica and of a site, 18 T and 2 T + 16 (S + X / 4) for bf16 weights and AdamW.
PUBLISHED = {
    "spes-1b": (58.2, 29.1, 2.0, 4.7, 21, 10),
    "spes-7b": (65.9, 32.9, 10.0, 29.3, 132, 55),
    "spes-9b": (67.2, 33.6, 12.4, 37.7, 170, 68),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    plan = make_plan(load_config(CONFIGS / f"{name}.toml"), 8).decentral
    server = plan.server
    found = (
        round(100 * server.uplink_saving, 1),
        round(100 * server.two_way_saving, 1),
        round(server.uplink / 1e9, 1),
        round(server.downlink / 1e9, 1),
        round(plan.replica_memory.total / 1e9),
        round(plan.site_memory.total / 1e9),
    )
    assert found == PUBLISHED[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"decentral.sites": 2},
        {"decentral": {"kind": "diloco", "sites": 4}},
        {"model.num_experts": 16},
        {"model.top_k": 3},
    ],
)
def test_published_numbers_hang_on_the_configuration(changes):
    """Negative control: other sites or experts, other numbers; what changes no size changes none of them."""
    raw = load_config(CONFIGS / "spes-9b.toml").model_dump(exclude_none=True)
    plan = make_plan(make_config(raw, {**changes, "parallel.expert": 1}), 8).decentral
    same = (round(100 * plan.server.uplink_saving, 1), round(plan.site_memory.total / 1e9)) == (67.2, 68)
    assert same is ("model.top_k" in changes)


def test_rings_send_what_the_formulas_say():
    """2 (N - 1) / N S in fp32 and (N - 1) / N X in bf16; 15.0 GB for the 7B, and 43.9 % less in equal precision."""
    config = load_config(CONFIGS / "spes-7b.toml")
    plan = make_plan(config, 8).decentral
    counts = make_plan(config, 8).stages[0].parameters
    experts = counts.by_part["routed_experts"]
    shared = counts.total - experts
    assert plan.traffic.shared_bytes == 2 * 3 * shared * 4 / 4
    assert plan.traffic.expert_bytes == 3 * experts * 2 / 4
    assert round(plan.traffic.total / 1e9, 1) == 15.0
    assert plan.replica_traffic.total == 2 * 3 * counts.total * 4 / 4
    equal = make_plan(config.model_copy(update={"run": config.run.model_copy(update={"precision": "fp32"})}), 8)
    saving = 1 - equal.decentral.traffic.total / equal.decentral.replica_traffic.total
    assert round(100 * saving, 1) == 43.9


def ring_bytes(members: int, numel: int, width: int) -> int:
    """Sent by one member of a ring all-reduce of equal chunks, counted step by step: a chunk each time."""
    chunks = [numel // members] * members
    reduce_scatter = [chunks[step % members] for step in range(members - 1)]
    all_gather = [chunks[(step + 1) % members] for step in range(members - 1)]
    return width * sum([*reduce_scatter, *all_gather])


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_absent_sites_send_and_get_nothing(members):
    config = spes({"run.precision": "bf16"})
    traffic = sync_traffic(config, Layout.of(config, 1), members)
    assert traffic.shared_bytes == pytest.approx(ring_bytes(members, S, 4), abs=4 * members * members)
    # Each member forwards the experts of all members but one: those of its successor.
    assert traffic.expert_bytes == (members - 1) * (X // 4) * 2
    assert traffic.merge_total - traffic.total == traffic.expert_bytes


def test_one_site_sends_nothing():
    config = spes({"decentral.sites": 1})
    plan = make_plan(config).decentral
    assert (plan.traffic.total, plan.replica_traffic.total, plan.server.uplink_saving) == (0, 0, 0)
    assert plan.site_memory == plan.replica_memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_site_holds_what_it_trains(precision):
    """Weights of all; gradients, and two moments and a master, of S + X / N: no byte of a frozen expert's."""
    config, width = spes({"run.precision": precision}), {"fp32": 4, "bf16": 2}[precision]
    memory, trained = site_memory(config), S + X // 4
    assert memory.weights == width * (S + X)
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 4 * (2 + (precision == "bf16")) * trained
    assert memory.total == memory.weights + memory.gradients + memory.optimizer
    whole = site_memory(diloco({"run.precision": precision}))
    assert (whole.gradients, whole.total) == (4 * (S + X), {"fp32": 16, "bf16": 18}[precision] * (S + X))


LAYOUTS = [
    ({}, 1),
    ({"parallel.expert": 2}, 2),
    ({"parallel.expert": 2}, 4),
    ({"parallel.pipeline": 2}, 2),
    ({"parallel.pipeline": 2, "parallel.pipeline_chunks": 2, "parallel.expert": 2}, 4),
    ({"parallel.tensor": 2}, 2),
    ({"parallel.tensor": 2, "parallel.expert_tensor": 2, "parallel.expert": 2}, 4),
]


@pytest.mark.parametrize("kind", ["spes", "diloco"])
@pytest.mark.parametrize(("changes", "world_size"), LAYOUTS)
def test_the_layout_of_a_site_changes_nothing_but_copies(kind, changes, world_size):
    """Norms and routers have a copy on every tensor-parallel rank, each of which goes its own way to other sites."""
    config = spes({"decentral.kind": kind, "batch.global_batch_size": 32, **changes})
    layout = Layout.of(config, world_size)
    traffic, alone = sync_traffic(config, layout), sync_traffic(config, Layout.of(spes({"decentral.kind": kind}), 1))
    copied = (layout.tensor - 1) * (32 + 4 * (2 * 32 + 8 * 32))
    assert traffic.shared_bytes == alone.shared_bytes + 2 * 3 * 4 * copied // 4
    assert traffic.expert_bytes == alone.expert_bytes == (3 * 4 * X // 4 if kind == "spes" else 0)
    largest = rank_traffic(config, layout)
    assert traffic.total / world_size <= largest.total <= traffic.total
    assert (largest.total == traffic.total) is (world_size == 1)


@pytest.mark.parametrize(("changes", "world_size"), LAYOUTS)
def test_a_rank_holds_what_it_trains(changes, world_size):
    config = spes({"batch.global_batch_size": 32, **changes})
    layout = Layout.of(config, world_size)
    memory = rank_memory(config, layout)
    whole = rank_memory(diloco({"batch.global_batch_size": 32, **changes}), layout)
    local = X // (layout.expert * layout.expert_tensor * layout.pipeline)
    assert (memory.weights, memory.activations, memory.logits) == (whole.weights, whole.activations, whole.logits)
    assert whole.gradients - memory.gradients == 4 * (local - local // 4)
    saved = whole.optimizer - memory.optimizer
    # The rank that owns the most experts has as many of those that are not trained, up to one box.
    assert saved == pytest.approx(8 * (local - local // 4) / layout.expert_data_parallel, abs=8 * 2 * 16 * 32)
    alone = rank_memory(make_config(MOE, {"batch.global_batch_size": 8, **changes}), layout)
    assert (alone.gradients, alone.optimizer) == (whole.gradients, whole.optimizer)


def test_memory_of_a_round():
    config = spes({"run.precision": "bf16"})
    memory = round_memory(config, Layout.of(config, 1))
    assert memory.staged == 4 * S + 2 * (X - X // 4)
    assert (memory.bucket, memory.outer) == (memory.staged, 0)  # all of it fits into one bucket of 64 MiB
    outer = round_memory(spes({"decentral.outer": "nesterov"}), Layout.of(config, 1))
    assert outer.outer == 8 * S
    whole = round_memory(diloco(), Layout.of(config, 1))
    assert (whole.staged, whole.outer) == (4 * (S + X), 8 * (S + X))
    large = load_config(CONFIGS / "spes-9b.toml", ["decentral.bucket_mib=16"])
    assert round_memory(large, Layout.of(large, 8)).bucket == 16 << 20


def test_the_ranks_of_a_site_share_the_work():
    """Owned parameters and published experts are dealt to the ranks that hold copies: none has twice its part."""
    config = spes({"batch.global_batch_size": 32})
    one, four = (round_memory(config, Layout.of(config, size)) for size in (1, 4))
    assert one.staged / 4 < four.staged < one.staged / 2


def test_biases_of_routers_are_averaged():
    biased = {"model.router.score_function": "sigmoid", "model.router.bias_update_rate": 1e-3}
    plain, more = (sync_traffic(spes(changes), Layout.of(spes(), 1)) for changes in ({}, biased))
    assert more.shared_bytes - plain.shared_bytes == 2 * 3 * 4 * (4 * 8) // 4
    assert more.expert_bytes == plain.expert_bytes


def test_a_dense_model():
    plan = make_plan(diloco(start=DENSE)).decentral
    assert plan.traffic == plan.replica_traffic
    assert (plan.outer, plan.trained_experts) == ("nesterov", 0)
    assert "experts" not in "\n".join(decentral_lines(diloco(start=DENSE)))


def test_flops_without_gradients_of_frozen_experts():
    """A third of the FLOPs of 1 - 1/N of the experts: 2 of 6 per active weight and token."""
    plan = make_plan(spes()).decentral
    tokens = 10 * 8 * 32 // 4
    assert plan.replica_flops == make_plan(make_config(MOE)).total_flops // 4
    assert plan.replica_flops - plan.site_flops == 2 * tokens * (X * 2 // 8) * 3 // 4
    assert make_plan(diloco()).decentral.site_flops == plan.replica_flops


def test_rounds_and_merges():
    changes = {"budget.steps": 1000, "schedule.warmup_steps": 1}
    merging = {"coefficient": 0.1, "every_steps": 200, "until_step": 800}
    plan = make_plan(spes({**changes, "decentral.merge": merging})).decentral
    assert (plan.rounds, plan.merges, plan.quorum) == (10, 3, 3)
    assert make_plan(spes({**changes, "budget.steps": 1001})).decentral.rounds == 11, "one comes after the last step"
    assert make_plan(spes({**changes, "decentral.merge": {**merging, "until_step": 5000}})).decentral.merges == 5
    assert make_plan(spes(changes)).decentral.merges == 0


def test_seconds_are_bits_over_the_rate():
    merging = {"decentral.merge": {"coefficient": 0.1}, "budget.steps": 1000}
    plan = make_plan(spes(merging)).decentral
    by_link = [plan.seconds[link] for link in ("100 Mbit/s", "1 Gbit/s", "10 Gbit/s")]
    assert by_link[0] == pytest.approx(
        {
            "round": 8 * plan.traffic.total / 1e8,
            "merge_round": 8 * plan.traffic.merge_total / 1e8,
            "replica_round": 8 * plan.replica_traffic.total / 1e8,
        }
    )
    for slower, faster in pairwise(by_link):
        assert slower == pytest.approx({name: 10 * seconds for name, seconds in faster.items()})
    assert "merge_round" not in make_plan(spes()).decentral.seconds["1 Gbit/s"]


def test_the_server_counts_in_one_precision():
    assert server_traffic(spes(), 2).uplink * 2 == server_traffic(spes(), 4).uplink == 4 * (S + X // 4)
    assert server_traffic(spes(), 2).two_way_saving == server_traffic(spes()).two_way_saving
    assert server_traffic(spes()).two_way_saving == pytest.approx(3 / 8 * X / (S + X))


def decentral_lines(config: Config, world_size: int = 1) -> list[str]:
    """The lines about sites, with single spaces."""
    text = format_plan(make_plan(config, world_size))
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert text.index("Sites, ") < text.index("Optimizer")
    block = text[text.index("Sites, ") : text.index("Optimizer")]
    return [" ".join(line.split()) for line in block.splitlines()]


def test_text_shows_the_numbers():
    config = load_config(CONFIGS / "spes-9b.toml")
    plan = make_plan(config, 8)
    assert format_plan(plan).startswith("4 sites of 8 ranks, bf16: ")
    lines = decentral_lines(config, 8)
    assert lines[:2] == ["Sites, spes", "trained experts 2 of 8 in each layer, at one site"]
    ranks = [decimal_bytes(held.total) for held in (plan.stages[0].memory, plan.decentral.replica_rank_memory)]
    for line in (
        "merges 39",
        f"total 68.3 GB 169.8 GB {' '.join(ranks)}",
        "by a server, fp32: up 12.4 GB 37.7 GB 67.2 %",
        "by a server, fp32: both 50.1 GB 75.4 GB 33.6 %",
        "by rings: experts, bf16 12.7 GB -",
        "a round with a merge 2,497 250 25",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith("outer state")]


def test_text_of_full_replicas():
    lines = decentral_lines(diloco())
    assert lines[0] == "Sites, diloco"
    assert "outer optimizer nesterov" in lines
    assert "an expert learns from 64 tokens per step, at even load" in lines
    assert f"outer state: host - - {decimal_bytes(8 * (S + X))} -" in lines
    assert not [line for line in lines if "merge" in line or line.startswith("by rings: experts")]
    assert "an expert learns from 16 tokens per step, at even load" in decentral_lines(spes())


def test_text_of_other_runs():
    assert "Sites, " not in format_plan(make_plan(make_config(MOE)))
    assert format_plan(make_plan(spes({"decentral.sites": 1}))).startswith("1 site of 1 rank, ")


def test_json_holds_every_number():
    plan = make_plan(load_config(CONFIGS / "spes-9b.toml"), 8)
    read = json.loads(json.dumps(plan.to_json()))["decentral"]
    assert read["server"]["two_way_saving"] == plan.decentral.server.two_way_saving
    assert read["traffic"]["merge_total"] == plan.decentral.traffic.merge_total
    assert read["rank_traffic"]["total"] == plan.decentral.rank_traffic.total
    for name in ("site_memory", "replica_memory", "replica_rank_memory"):
        assert read[name]["total"] == getattr(plan.decentral, name).total
    assert json.loads(json.dumps(make_plan(make_config(MOE)).to_json()))["decentral"] is None
