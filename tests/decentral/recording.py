"""What a site has in memory around each of its meetings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain import syncing
from pretrain.config.schema import Config
from pretrain.metrics.throughput import RunClock
from pretrain.model.shards import Shard
from pretrain.restore import restore_or_build
from pretrain.run import Run, TrainState
from pretrain.train import started, train_step
from tests.helpers.runs import tiny_config
from tests.helpers.sites import ScriptedTransport, Site, at_site, run_sites

Place = tuple[str, int | None, tuple[int, ...]]
"""Key, expert (None: no expert's), offset along the other axes."""


@dataclass
class Snapshot:
    """Of one rank of a site."""

    step: int
    weights: dict[Place, torch.Tensor] = field(default_factory=dict)
    """In the precision of the parameters."""
    masters: dict[Place, torch.Tensor] = field(default_factory=dict)
    states: dict[tuple[str, Place], torch.Tensor] = field(default_factory=dict)


@dataclass
class Meeting:
    """The same rank before and after."""

    before: Snapshot
    after: Snapshot
    decentral: dict[str, Any]
    sent_bytes: int


def places(shard: Shard, tensor: torch.Tensor) -> Iterator[tuple[Place, torch.Tensor]]:
    """A tensor in the shape of a shard's parameter, experts apart."""
    values = shard.view(tensor).detach().clone()
    if shard.logical.is_expert:
        for i, expert in enumerate(values.unbind()):
            yield (shard.key, shard.offset[0] + i, shard.offset[1:]), expert
    else:
        yield (shard.key, None, shard.offset), values


def snapshot(run: Run, state: TrainState) -> Snapshot:
    """Copies of everything."""
    found = Snapshot(state.step)
    for shard in run.engine.shards:
        found.weights |= dict(places(shard, shard.tensor))
    for slot in run.optimizer.slots:
        found.masters |= dict(places(slot.shard, slot.master))
        for name, tensor in slot.state.items():
            if tensor.shape == slot.master.shape:
                found.states |= {(name, place): value for place, value in places(slot.shard, tensor)}
    return found


def sites_config(corpus: Path, directory: Path, *, sites: int = 2, **sections: dict[str, Any]) -> Config:
    """`tiny_config` for several sites that meet every second step; 0 sites: without [decentral]."""
    keys = {"kind": "spes", "sites": sites, "sync_every_steps": 2} | sections.pop("decentral", {})
    batch = {"global_batch_size": 24, "micro_batch_size": 2} if sites == 3 else {}
    base = {"batch": batch, "budget": {"steps": 4}, "checkpoint": {"every_steps": 0}, "eval": {"every_steps": 0}}
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}}
    return tiny_config(corpus, directory, **merged, **({"decentral": keys} if sites else {}))


def meetings(config: Config, folder: Path, ranks: int = 1, **keywords: Any) -> list[list[list[Meeting]]]:
    """Train at all sites at once: [site][rank][meeting]. `keywords`: for `recorded`."""
    folder.mkdir()
    at_sites = [at_site(config, site) if config.decentral else config for site in range(config.sites)]
    return run_sites(record, ranks, [(of_one, folder, keywords) for of_one in at_sites])


def lives(config: Config, folder: Path, *of_sites: list[dict[str, Any]]) -> list[dict[int, Meeting]]:
    """Train at all sites, each started as often as it has keywords for `recorded`: [site][step], of its last life."""
    folder.mkdir()
    with ExitStack() as stack:

        def start(site: int, life: int) -> Site:
            begun = Site(record, 1, at_site(config, site), folder, of_sites[site][life])
            stack.callback(begun.close)
            return begun

        begun = [start(site, 0) for site in range(len(of_sites))]
        for life in range(1, max(map(len, of_sites))):
            again = [site for site, keywords in enumerate(of_sites) if life < len(keywords)]
            for site in again:
                begun[site].results()
            for site in again:
                begun[site] = start(site, life)
        return [{meeting.after.step: meeting for meeting in site.results()[0]} for site in begun]


def record(config: Config, folder: Path, keywords: dict[str, Any]) -> list[Meeting]:
    """`recorded`, to be called by position."""
    return recorded(config, folder, **keywords)


def recorded(
    config: Config,
    folder: Path,
    *,
    members: Mapping[int, Sequence[int]] | None = None,
    first: int | None = None,
    steps: int | None = None,
    prepare: Callable[[], None] | None = None,
    spoil: Callable[[Run], None] | None = None,
    save: int = 0,
) -> list[Meeting]:
    """Train at a site over a scripted transport to the end, or `steps`; returns every meeting, the first at the start.

    Where experts arrive late, that counts as one; so does the last step of a run of one place. `members`, `first`: see
    `ScriptedTransport`. `prepare`: called first, in the process. `spoil`: changes the run before it meets anyone.
    `save`: the step after which to write a checkpoint.
    """
    if prepare:
        prepare()
    transports: list[ScriptedTransport] = []

    def open_transport(decentral: Any, ranks: Any, stopping: Any) -> ScriptedTransport:
        transports.append(ScriptedTransport(folder, decentral, ranks, members or {}, first))
        return transports[0]

    syncing.open_transport = open_transport
    found = []
    with started(config) as meshes, restore_or_build(config, meshes, RunClock()) as (run, state):

        def note(before: Snapshot) -> None:
            rounds = [round_ for transport in transports for round_ in transport.rounds]
            sent = rounds[-1].sent_bytes if rounds else 0
            found.append(Meeting(before, snapshot(run, state), dict(state.decentral), sent))

        if spoil:
            spoil(run)
        before = snapshot(run, state)
        with syncing.meeting(run, state, lambda: False) as after_step:
            note(before)
            while state.step < (steps or config.total_steps):
                loss = train_step(run, state)
                before, rounds = snapshot(run, state), sum(len(transport.rounds) for transport in transports)
                after_step(loss)
                has_met = sum(len(transport.rounds) for transport in transports) > rounds
                changed = differing(before.weights, snapshot(run, state).weights)
                if has_met or changed or state.step == config.total_steps:
                    note(before)
                if state.step == save:
                    run.save(state)
    return found


def differing(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> list[Any]:
    """Places at which two mappings differ in any bit, or that one of them lacks."""
    both = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {at for at in both if not torch.equal(one[at], other[at])}, key=str)
