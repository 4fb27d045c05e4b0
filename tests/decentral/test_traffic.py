"""What sites send in a round over the plain transport, and hold to train, is what is planned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain import syncing
from pretrain.config.rules import Layout
from pretrain.config.schema import Config
from pretrain.decentral.transport import Round, Transport, open_transport
from pretrain.metrics.throughput import RunClock
from pretrain.plan.decentral import rank_traffic, site_memory, sync_traffic
from pretrain.plan.memory import rank_memory
from pretrain.restore import restore_or_build
from pretrain.train import started, train_step
from tests.decentral.recording import sites_config
from tests.helpers.runs import events, make_corpus
from tests.helpers.sites import at_site, free_port, run_sites

ALLOWED = 0.01
"""Of the plan: hashes are sent, too, and gradient buffers are padded."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass
class Held:
    """Of one rank of a site."""

    sent_bytes: int
    """In the last round."""
    state_bytes: int
    gradient_bytes: int


def train_site(config: Config) -> Held:
    """Some steps and a round, over the transport of the configuration."""
    transports: list[RecordingTransport] = []

    def recording(*arguments: Any) -> RecordingTransport:
        transports.append(RecordingTransport(open_transport(*arguments)))
        return transports[0]

    syncing.open_transport = recording
    with started(config) as meshes, restore_or_build(config, meshes, RunClock()) as (run, state):
        with syncing.meeting(run, state, lambda: False) as after_step:
            while state.step < config.total_steps:
                after_step(train_step(run, state))
        buffers = [b for chunk in run.engine.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return Held(
            sent_bytes=transports[0].rounds[-1].sent_bytes,
            state_bytes=run.optimizer.state_bytes(),
            gradient_bytes=sum(buffer.grad_data.nbytes for buffer in buffers),
        )


class RecordingTransport:
    """Another transport, and the rounds it has opened."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rounds: list[Round] = []

    def open(self, header: dict[str, Any]) -> Round:
        self.rounds.append(self._transport.open(header))
        return self.rounds[-1]

    def close(self) -> None:
        self._transport.close()


def run_config(corpus: Path, directory: Path, kind: str, sites: int, precision: str) -> Config:
    """A model of which the experts are more than half, at sites that meet once."""
    return sites_config(
        corpus,
        directory,
        sites=sites,
        budget={"steps": 3},
        run={"precision": precision},
        model={"num_experts": 12, "expert_ffn_size": 64},
        decentral={
            "kind": kind,
            "sync_every_steps": 3,
            "transport": "fixed",
            "coordinator": f"127.0.0.1:{free_port()}",
        },
    )


def is_near(measured: float, planned: float) -> bool:
    return abs(measured / planned - 1) <= ALLOWED


CASES = [
    pytest.param("spes", 3, 1, {}, "bf16", id="spes-3-sites-bf16"),
    pytest.param("spes", 2, 2, {"expert": 2}, "bf16", id="spes-ep2-bf16"),
    pytest.param("spes", 2, 2, {}, "fp32", id="spes-dp2"),
    pytest.param("diloco", 2, 1, {}, "fp32", id="diloco"),
]


@pytest.mark.parametrize(("kind", "sites", "ranks", "parallel", "precision"), CASES)
def test_measured_bytes_are_those_planned(
    corpus: Path, tmp_path: Path, kind: str, sites: int, ranks: int, parallel: dict[str, int], precision: str
) -> None:
    config = run_config(corpus, tmp_path, kind, sites, precision)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    found = run_sites(train_site, ranks, [(at_site(config, site),) for site in range(sites)])
    layout = Layout.of(config, ranks)

    def is_as_planned(plan: Config) -> dict[str, bool]:
        """By quantity, at all sites."""
        planned = {
            "sent by a site": (sync_traffic(plan, layout).total, lambda site: sum(rank.sent_bytes for rank in site)),
            "sent by a rank": (rank_traffic(plan, layout).total, lambda site: max(rank.sent_bytes for rank in site)),
            "states": (site_memory(plan).optimizer, lambda site: sum(rank.state_bytes for rank in site)),
            "gradients": (rank_memory(plan, layout).gradients, lambda site: max(rank.gradient_bytes for rank in site)),
        }
        return {
            name: all(is_near(measure(site), value) for site in found) for name, (value, measure) in planned.items()
        }

    assert all(is_as_planned(config).values()), is_as_planned(config)
    # The event has the bytes of rank 0.
    (event,) = events(at_site(config, 1).site_directory, "sync")
    assert event["sent_bytes"] == found[1][0].sent_bytes
    # The other kind sends and holds other bytes, and so does one site less.
    other = {"kind": "diloco" if kind == "spes" else "spes"}
    assert config.decentral
    swapped = config.model_copy(update={"decentral": config.decentral.model_copy(update=other)})
    assert not any(is_as_planned(swapped).values())
    assert not is_near(sync_traffic(config, layout, sites - 1).total, sync_traffic(config, layout).total)
