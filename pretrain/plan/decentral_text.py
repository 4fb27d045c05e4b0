"""The part of a plan about sites that train together, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.plan.decentral import LINKS, DecentralPlan
from pretrain.plan.memory import RankMemory
from pretrain.plan.numbers import Plan, StagePlan
from pretrain.plan.tables import Row, align, decimal_bytes, grid, quantity, scientific


def decentral_tables(run: Plan, plan: DecentralPlan) -> Iterator[str]:
    """Lines about the sites of a run: what they do, what they hold, what they send."""
    (stage,) = run.stages
    yield f"Sites, {plan.kind}"
    yield from align(list(_site_rows(plan, stage)))
    yield ""
    yield from _memory_table(plan, stage.memory)
    yield ""
    yield from _traffic_table(plan, run.precision)
    yield ""
    yield from _seconds_table(plan)


def _site_rows(plan: DecentralPlan, stage: StagePlan) -> Iterator[Row]:
    if num_experts := stage.shape.get("num_experts"):
        yield "trained experts", f"{plan.trained_experts} of {num_experts}", "in each layer, at one site"
        learns = stage.tokens_per_expert_per_step * plan.trained_experts / num_experts
        yield "an expert learns from", quantity(learns), "tokens per step, at even load"
    every = f"one every {plan.sync_every_steps:,} steps, of {plan.quorum} sites or more"
    yield "rounds", f"{plan.rounds:,}", every
    if plan.merges:
        yield "merges", f"{plan.merges:,}", ""
    yield "outer optimizer", plan.outer, ""
    saved = 100 * (1 - plan.site_flops / plan.replica_flops)
    remark = f"{saved:.1f} % less without gradients of frozen experts" if saved else ""
    yield "FLOPs of a site", scientific(plan.site_flops), remark


def _memory_table(plan: DecentralPlan, memory: RankMemory) -> list[str]:
    """A site without activations, and its largest rank; each beside one that trains a full replica."""
    site, replica, replica_rank = plan.site_memory, plan.replica_memory, plan.replica_rank_memory
    rows = [
        (f"  {name}", [decimal_bytes(getattr(held, name)) for held in (site, replica, memory, replica_rank)])
        for name in ("weights", "gradients", "optimizer")
    ]
    for name in ("activations", "logits"):
        rows.append((f"  {name}", ["-", "-", *(decimal_bytes(getattr(held, name)) for held in (memory, replica_rank))]))
    totals = [decimal_bytes(held.total) for held in (site, replica, memory, replica_rank)]
    rows.append(("  total", totals))
    extra = {
        "a round: device": plan.round_memory.bucket,
        "a round: host": plan.round_memory.staged,
        "outer state: host": plan.round_memory.outer,
    }
    rows += [(f"  {name}", ["-", "-", decimal_bytes(value), "-"]) for name, value in extra.items() if value]
    return grid("Memory", ["one copy", "full replica", "largest rank", "full replica"], rows)


def _traffic_table(plan: DecentralPlan, precision: str) -> list[str]:
    """Bytes of a site, in this run and with full replicas."""
    server, traffic, replica = plan.server, plan.traffic, plan.replica_traffic
    both = server.uplink + server.downlink
    rows = [
        ("  by a server, fp32: up", _compared(server.uplink, server.replica)),
        ("  by a server, fp32: down", _compared(server.downlink, server.replica)),
        ("  by a server, fp32: both", _compared(both, 2 * server.replica)),
        ("  by rings: averaged, fp32", _compared(traffic.shared_bytes, replica.shared_bytes)[:2]),
    ]
    if traffic.expert_bytes:
        rows.append((f"  by rings: experts, {precision}", [decimal_bytes(traffic.expert_bytes), "-"]))
    rows.append(("  by rings: in all", _compared(traffic.total, replica.total)))
    if plan.merges:
        rows.append(("  by rings: with a merge", [decimal_bytes(traffic.merge_total), "-"]))
    rows.append(("  by rings: largest rank", [decimal_bytes(plan.rank_traffic.total), "-"]))
    return grid("Sent by a site in a round", ["this run", "full replicas", "less"], rows)


def _compared(value: int, replica: int) -> list[str]:
    less = f"{100 * (1 - value / replica):.1f} %" if replica else "-"
    return [decimal_bytes(value), decimal_bytes(replica), less]


def _seconds_table(plan: DecentralPlan) -> list[str]:
    """By the rate of the link that the ranks of a site share."""
    names = {"round": "a round", "merge_round": "a round with a merge", "replica_round": "a round of full replicas"}
    rows = [
        (f"  {text}", [quantity(plan.seconds[link][name]) for link in LINKS])
        for name, text in names.items()
        if name in plan.seconds[next(iter(LINKS))]
    ]
    return grid("Seconds, by the link of a site", list(LINKS), rows)
