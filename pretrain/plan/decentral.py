"""Sites that train together: what each holds, and the bytes of a round, from the configuration alone.

Letters: N sites, of which m are members of a round; S shared parameters, X those of all routed experts, T = S + X.

Under `kind = "spes"` a site holds all T weights, and gradients, masters and optimizer states of S + X / N of them. In a
round the S are averaged, in fp32, and every expert goes from its owner to the other members, in the precision of the
run. The collectives are rings: an all-reduce sends 2 (m - 1) / m times the bytes of its tensor, an all-gather m - 1
times those of each member's. Under "diloco" all T are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.decentral import DecentralConfig
from pretrain.config.ownership import trained_experts
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.model.counts import count_flops, count_parameters
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import route
from pretrain.optim.states import state_numel, states_of
from pretrain.plan.memory import BYTES_PER_VALUE, FP32_BYTES, RankMemory, owned_boxes, rank_memory, trained_boxes

LINKS = {"100 Mbit/s": 100e6, "1 Gbit/s": 1e9, "10 Gbit/s": 10e9}
"""Rates, in bits per second, for which a plan says how long a round takes."""


@dataclass(frozen=True)
class SiteMemory:
    """Bytes of one copy of the model and of its training, without activations, over all ranks that share it."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RoundMemory:
    """Bytes that rounds need on one rank, that which needs the most, beside training."""

    bucket: int
    """On the device, during a round."""
    staged: int
    """On the host, during a round: new shared parameters in fp32, and experts of other sites."""
    outer: int
    """On the host, at all times: anchor and momentum of the outer optimizer."""


@dataclass(frozen=True)
class Traffic:
    """Payload bytes sent in a round."""

    shared_bytes: int
    """All-reduced in fp32: shared parameters and selection biases of routers; under diloco the experts, too."""
    expert_bytes: int
    """All-gathered from their owners, in the precision of the run."""

    @property
    def total(self) -> int:
        return self.shared_bytes + self.expert_bytes

    @property
    def merge_total(self) -> int:
        """Of a round with a merge, after which the owners publish their experts again."""
        return self.total + self.expert_bytes


@dataclass(frozen=True)
class ServerTraffic:
    """Bytes per site and round through a parameter server, all in one precision: what arXiv 2602.11543 counts.

    A site sends what it trains, S + X / N, and gets all of the model, T.
    """

    uplink: int
    downlink: int
    replica: int
    """Each way, if every site sends and gets a full replica."""

    @property
    def uplink_saving(self) -> float:
        return 1 - self.uplink / self.replica

    @property
    def two_way_saving(self) -> float:
        return 1 - (self.uplink + self.downlink) / (2 * self.replica)


@dataclass(frozen=True)
class DecentralPlan:
    """How the sites of a run train together; memory and bytes beside those of sites that train full replicas."""

    kind: str
    sites: int
    transport: str
    directory: str
    """Of all sites; each writes to a folder in it."""
    quorum: int
    """Fewest members of a round."""
    outer: str
    sync_every_steps: int
    rounds: int
    """The last one comes after the last step."""
    merges: int
    trained_experts: int
    """Of each layer, at one site."""
    site_flops: int
    """Of one site in the whole run; frozen experts need no gradients of their weights."""
    replica_flops: int
    site_memory: SiteMemory
    replica_memory: SiteMemory
    replica_rank_memory: RankMemory
    """Of the rank that needs the most; that of this run stands with its stage."""
    round_memory: RoundMemory
    server: ServerTraffic
    traffic: Traffic
    """Of one site."""
    rank_traffic: Traffic
    """Of the rank that sends the most."""
    replica_traffic: Traffic
    """Of one site that averages a full replica."""
    seconds: dict[str, dict[str, float]]
    """By the rate of the link that the ranks of a site share: round, merge_round and replica_round, without latency."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        plan = asdict(self)
        for name in ("site_memory", "replica_memory", "replica_rank_memory"):
            plan[name]["total"] = getattr(self, name).total
        for name in ("traffic", "rank_traffic", "replica_traffic"):
            traffic = getattr(self, name)
            plan[name] |= {"total": traffic.total, "merge_total": traffic.merge_total}
        plan["server"] |= {
            "uplink_saving": self.server.uplink_saving,
            "two_way_saving": self.server.two_way_saving,
        }
        return plan


def plan_decentral(config: Config, layout: Layout) -> DecentralPlan | None:
    """The plan of the sites of a run without growth, each with this layout; None without [decentral]."""
    decentral = config.decentral
    if decentral is None:
        return None
    replica = _full_replica(config, decentral)
    trained = trained_experts(config)
    traffic, replica_traffic = sync_traffic(config, layout), sync_traffic(replica, layout)
    sent = {"round": traffic.total, "replica_round": replica_traffic.total}
    if merges := _merges(config, decentral):
        sent["merge_round"] = traffic.merge_total
    return DecentralPlan(
        kind=decentral.kind,
        sites=decentral.sites,
        transport=decentral.transport,
        directory=str(config.run.directory),
        quorum=decentral.quorum,
        outer=decentral.outer_rule,
        sync_every_steps=decentral.sync_every_steps,
        rounds=math.ceil(config.total_steps / decentral.sync_every_steps),
        merges=merges,
        trained_experts=config.model.num_experts if trained is None else len(trained),
        site_flops=_site_flops(config),
        replica_flops=_site_flops(replica),
        site_memory=site_memory(config),
        replica_memory=site_memory(replica),
        replica_rank_memory=rank_memory(replica, layout),
        round_memory=round_memory(config, layout),
        server=server_traffic(config),
        traffic=traffic,
        rank_traffic=rank_traffic(config, layout),
        replica_traffic=replica_traffic,
        seconds={link: {name: 8 * count / rate for name, count in sent.items()} for link, rate in LINKS.items()},
    )


def _full_replica(config: Config, decentral: DecentralConfig) -> Config:
    """The same run with every site training, and averaging, the whole model."""
    return config.model_copy(update={"decentral": decentral.model_copy(update={"kind": "diloco", "outer": "average"})})


def _merges(config: Config, decentral: DecentralConfig) -> int:
    """Rounds with a merge."""
    merge = decentral.merge
    last = min(config.total_steps, merge.until_step - 1)
    return last // merge.every_steps if merge.coefficient else 0


def _trained_share(config: Config) -> float:
    """Share of the experts that a site trains: 1 / N, or all."""
    trained = trained_experts(config)
    return 1.0 if trained is None else len(trained) / config.model.num_experts


def _site_flops(config: Config) -> int:
    """FLOPs of one site's tokens, at even load.

    A weight's gradient is a multiply-add per token, a third of what it costs.
    """
    tokens = config.total_steps * config.batch.tokens_per_step // config.sites
    counts = count_parameters(config.model)
    active_experts = counts.by_part["routed_experts"] - (counts.total - counts.active)
    per_token = count_flops(config.model, config.batch.sequence_length).per_token
    return round(tokens * (per_token - 2 * active_experts * (1 - _trained_share(config))))


def site_memory(config: Config) -> SiteMemory:
    """Weights of the whole model; gradients, masters and optimizer states of what a site trains.

    bf16 and AdamW: 2 T + 16 (S + X / N) bytes.
    """
    width, share = BYTES_PER_VALUE[config.run.precision], _trained_share(config)
    master = config.run.precision == "bf16"
    weights = trained = optimizer = 0
    for tensor in logical_tensors(config.model):
        if not tensor.trainable:
            continue
        part = share if tensor.is_expert else 1.0
        states = states_of(tensor, route(tensor, config.optim).rule, config.optim)
        weights += tensor.numel
        trained += round(part * tensor.numel)
        optimizer += round(part * (master * tensor.numel + state_numel(states, tensor, tensor.shape)))
    return SiteMemory(width * weights, FP32_BYTES * trained, FP32_BYTES * optimizer)


def server_traffic(config: Config, bytes_per_value: int = FP32_BYTES) -> ServerTraffic:
    """Bytes through a parameter server."""
    counts = count_parameters(config.model)
    experts = counts.by_part["routed_experts"]
    uplink = counts.total - experts + round(_trained_share(config) * experts)
    return ServerTraffic(bytes_per_value * uplink, bytes_per_value * counts.total, bytes_per_value * counts.total)


@dataclass(frozen=True)
class _Exchange:
    """Values that the ranks of one pipeline stage exchange with the same ranks of other sites."""

    averaged: list[int]
    """By data-parallel rank, those of what it owns."""
    averaged_experts: list[int]
    """diloco: by expert-data-parallel rank."""
    biases: int
    """Of each rank, all of which average their own copies."""
    published: list[int]
    """By expert-data-parallel rank, those of the site's experts that it sends."""

    def owned(self) -> int:
        """Weights that are averaged on the rank that owns the most."""
        return max(self.averaged) + max(self.averaged_experts)

    def of_largest_rank(self) -> tuple[int, int]:
        """Values averaged and published by the rank that has the most of each."""
        return self.owned() + self.biases, max(self.published)

    def of_site(self, layout: Layout) -> tuple[int, int]:
        """Values averaged and published by all ranks of the stage; what tensor-parallel ranks have copies of, as norms,
        counts once for each."""
        experts = layout.expert * layout.expert_tensor
        biases = self.biases * layout.world_size // layout.pipeline
        averaged = layout.tensor * sum(self.averaged) + experts * sum(self.averaged_experts) + biases
        return averaged, experts * sum(self.published)


def sync_traffic(config: Config, layout: Layout, members: int | None = None) -> Traffic:
    """Bytes that all ranks of one site send in a round of so many members (default: all sites)."""
    stages = [exchange.of_site(layout) for exchange in _exchanges(config, layout)]
    averaged, published = (sum(values) for values in zip(*stages, strict=True))
    return _sent(config, averaged, published, members)


def rank_traffic(config: Config, layout: Layout, members: int | None = None) -> Traffic:
    """Bytes that one rank sends in a round, the one that sends the most."""
    ranks = (exchange.of_largest_rank() for exchange in _exchanges(config, layout))
    return max((_sent(config, *values, members) for values in ranks), key=lambda traffic: traffic.total)


def _sent(config: Config, averaged: int, published: int, members: int | None) -> Traffic:
    m = config.sites if members is None else members
    return Traffic(
        shared_bytes=2 * (m - 1) * FP32_BYTES * averaged // m,
        expert_bytes=(m - 1) * BYTES_PER_VALUE[config.run.precision] * published,
    )


def round_memory(config: Config, layout: Layout) -> RoundMemory:
    """What a round of all sites stages, and what the outer optimizer keeps."""
    decentral = config.decentral
    assert decentral is not None
    width, stages = BYTES_PER_VALUE[config.run.precision], list(_exchanges(config, layout))
    ranks = [stage.of_largest_rank() for stage in stages]
    staged = max(FP32_BYTES * averaged + width * (config.sites - 1) * published for averaged, published in ranks)
    return RoundMemory(
        bucket=min(decentral.bucket_mib << 20, staged),
        staged=staged,
        outer=2 * FP32_BYTES * max(stage.owned() for stage in stages) if decentral.outer_rule == "nesterov" else 0,
    )


def _exchanges(config: Config, layout: Layout) -> Iterator[_Exchange]:
    """Of each pipeline rank."""
    publishes = trained_experts(config) is not None
    for rank in range(layout.pipeline):
        boxes = trained_boxes(config, layout, rank)
        dense, experts = (
            [sum(box.numel for box in mine) for mine in owned_boxes(layout, boxes, experts=experts)]
            for experts in (False, True)
        )
        biased = [layer for layer in layout.stage_layers(rank) if config.model.is_moe_layer(layer)]
        has_bias = config.model.router.bias_update_rate > 0
        # The experts of a site are dealt in turn to the ranks that hold copies of them.
        carriers = layout.expert_data_parallel
        sent = [box.numel for box in boxes if box.is_expert]
        yield _Exchange(
            averaged=dense,
            averaged_experts=[0] if publishes else experts,
            biases=has_bias * len(biased) * config.model.num_experts,
            published=[sum(sent[carrier::carriers]) for carrier in range(carriers)] if publishes else [0],
        )
