"""What a synchronisation between sites costs, beside plain collectives and the bare link.

Every site is a process of this machine with tensors in the shapes of a model; nothing trains. In a round each way of
sending has its turn, all sites at once; figures are those of the slowest site.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.bench import site
from pretrain.bench.network import Link, Place, slow_network
from pretrain.bench.site import GLOO, OURS, SOCKETS, Job, Parts, measure_site
from pretrain.bench.workloads import MEDIUM, SMALL, Workload, run_config
from pretrain.config.decentral import DecentralConfig
from pretrain.config.load import load_config
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.plan.decentral import LINKS, plan_decentral, sync_traffic

SLOW_LINK = Link(bits_per_second=100e6, round_trip_seconds=0.05)
COORDINATOR_PORT = 29400
"""In a namespace all ports are free."""
CONFIG_FILE = Path("configs/decentral/spes-7b.toml")
GPUS, TOKENS_PER_SECOND = 8, 3670.0
"""Of one site of the 7B, and on each of its A800s in the paper's SPES run (arXiv 2602.11543, by notes on it)."""


@dataclass(frozen=True)
class SyncResult:
    """So many sites on one network."""

    workload: Workload
    sites: int
    link: Link | None
    """None: loopback."""
    sent_bytes: int
    """Payload of one site, as its round has counted it."""
    planned_bytes: int
    """The same as planned."""
    hops: int
    """See `site.Found`."""
    parts: list[Parts]
    """By round, of the site that took the longest."""
    seconds: dict[str, list[float]]
    """By round, of OURS, GLOO and SOCKETS, each the longest that a site took."""

    @property
    def link_seconds(self) -> float | None:
        """What the bytes take at the rate of the link, and messages that wait for each other at its delay."""
        if self.link is None:
            return None
        return 8 * self.sent_bytes / self.link.bits_per_second + self.hops * self.link.round_trip_seconds / 2

    def as_json(self) -> dict[str, Any]:
        """For programs; the model by its name."""
        return asdict(self) | {"workload": self.workload.name, "link_seconds": self.link_seconds}


@dataclass(frozen=True)
class Share:
    """What synchronising takes of the time of training, by bytes over rate alone."""

    kind: str
    sent_bytes: int
    """Of a site, in a round."""
    seconds: dict[str, float]
    """Of a round, by the rate of the link that a site has."""
    training_seconds: float
    """Between two rounds."""

    def of(self, link: str) -> float:
        """The share on one link."""
        return self.seconds[link] / (self.seconds[link] + self.training_seconds)


def measure_decentral(*, rounds: int, quick: bool, link: Link | None = None) -> list[SyncResult]:
    """Two and four sites on loopback, or on a slow link. Raises NetworkError."""
    # At 100 Mbit/s the larger one takes ten seconds each time.
    workload = SMALL if quick or link else MEDIUM
    return [measure_sites(workload, sites, rounds=rounds, link=link) for sites in ((2,) if quick else (2, 4))]


def measure_sites(workload: Workload, sites: int, *, rounds: int, link: Link | None) -> SyncResult:
    """Sites that train the workload, each a process."""
    with ExitStack() as stack:
        if link is None:
            places, port = [Place("127.0.0.1")] * sites, _free_port()
        else:
            places, port = stack.enter_context(slow_network(sites, link)), COORDINATOR_PORT
        config = decentral_config(workload, sites, coordinator=f"{places[0].address}:{port}")
        assert config.decentral
        jobs = [
            Job(
                workload.model,
                config.decentral.model_copy(update={"site": number, "bind": place.address}),
                place,
                rounds,
            )
            for number, place in enumerate(places)
        ]
        # One process loads everything, and all sites are forks of it. Not one warning a site.
        stack.enter_context(mock.patch.dict(os.environ, PYTHONWARNINGS="ignore", TORCH_CPP_LOG_LEVEL="ERROR"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([site.__name__])
        pool = stack.enter_context(ProcessPoolExecutor(sites, mp_context=context))
        found = list(pool.map(measure_site, jobs))
    seconds = [{OURS: [parts.exchange for parts in each.parts], **each.seconds} for each in found]
    return SyncResult(
        workload=workload,
        sites=sites,
        link=link,
        sent_bytes=max(each.sent_bytes for each in found),
        planned_bytes=sync_traffic(config, Layout.of(config, 1)).total,
        hops=found[0].hops,
        parts=[max(row, key=lambda parts: parts.total) for row in zip(*(each.parts for each in found), strict=True)],
        seconds={
            name: [max(row) for row in zip(*(each[name] for each in seconds), strict=True)]
            for name in (OURS, GLOO, SOCKETS)
        },
    )


def decentral_config(workload: Workload, sites: int, *, coordinator: str) -> Config:
    """A run of the workload at so many sites over the plain transport."""
    run = run_config(workload, "bf16", Path("nowhere"))
    batch = run.batch.model_copy(update={"global_batch_size": sites * workload.micro_batch_size})
    decentral = DecentralConfig(kind="spes", sites=sites, transport="fixed", coordinator=coordinator)
    return run.model_copy(update={"batch": batch, "decentral": decentral})


def training_shares(config_file: Path = CONFIG_FILE) -> list[Share]:
    """Of the 7B on its four sites, at the published speed: experts published by their owners, and full replicas."""
    config = load_config(config_file)
    plan = plan_decentral(config, Layout.of(config, GPUS))
    assert plan
    site_tokens = config.batch.tokens_per_step / plan.sites
    training = plan.sync_every_steps * site_tokens / (GPUS * TOKENS_PER_SECOND)
    return [
        Share(kind, traffic.total, {link: plan.seconds[link][key] for link in LINKS}, training)
        for kind, traffic, key in (
            ("spes", plan.traffic, "round"),
            ("diloco", plan.replica_traffic, "replica_round"),
        )
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
