"""The sites of a run meet: when they start, and at every synchronisation.

A round is a transaction over all its members. What it brings is staged in host memory; when every rank of every member
has all of it, all put it in place, else nobody does, and those who remain meet again. See decentral/README.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pretrain.config.ownership import owner_of
from pretrain.config.schema import Config
from pretrain.decentral.checking import compare
from pretrain.decentral.experts import Item, expert_items, stage_experts, take_experts
from pretrain.decentral.late import LateExperts
from pretrain.decentral.merge import merged, noted, similarity
from pretrain.decentral.reown import absences
from pretrain.decentral.roles import Roles, check_same_run, common_keys, roles_of
from pretrain.decentral.sending import from_source, mean_of_givers
from pretrain.decentral.transport import (
    Round,
    RoundError,
    SitesError,
    StopWaitingError,
    Transport,
    open_transport,
)
from pretrain.parallel.routing_stats import copy_selection_biases, restore_selection_biases
from pretrain.retraining import retrain
from pretrain.run import Run, TrainState, open_batches, shared_slots

AfterStep = Callable[[float], None]
"""Called after every optimizer step with its loss."""

ATTEMPTS = 5
"""Times that a round may fail one after the other before a site gives up: members that fail leave, so that more than a
few failures have another cause."""


@dataclass(frozen=True)
class Staged:
    """What a round brings, on the host."""

    shared: list[torch.Tensor]
    """Mean of the shared weights, per slot."""
    outer: list[torch.Tensor]
    """State of the outer optimizer, for sites that were away."""
    experts: dict[tuple[str, int], torch.Tensor]
    biases: dict[int, torch.Tensor]
    """Layer -> mean selection bias."""


@contextmanager
def meeting(run: Run, state: TrainState, stopping: Callable[[], bool]) -> Iterator[AfterStep]:
    """Join the other sites of the run, and meet them again at every synchronisation, for the time of a `with` block.

    Yields what to call after every step; without [decentral] it does nothing. `stopping`: whether this rank was asked
    to stop, which ends waiting for other sites. Collective.
    """
    if run.config.decentral is None:
        yield lambda loss: None
        return
    transport = open_transport(run.config.decentral, run.ranks, stopping)
    try:
        sites = Sites(run, state, transport)
        sites.join()
        yield sites.after_step
    finally:
        transport.close()


def round_is_due(config: Config, state: TrainState) -> bool:
    """Whether a synchronisation comes after the steps that are done."""
    if config.decentral is None:
        return False
    at_boundary = state.step % config.decentral.sync_every_steps == 0 or state.step == config.total_steps
    return at_boundary and 0 < state.step != state.decentral["round_step"]


class Sites:
    """This site among the others. All methods are collective over the ranks of the site."""

    def __init__(self, run: Run, state: TrainState, transport: Transport) -> None:
        assert run.config.decentral
        self.run, self.state, self.transport = run, state, transport
        self.decentral = run.config.decentral
        self.bucket_bytes = self.decentral.bucket_mib << 20
        self.late: LateExperts | None = None
        self._losses: list[float] = []

    def join(self) -> None:
        """Meet the other sites at the start, and take over what this one has missed."""
        if self.state.step < self.run.config.total_steps or self.is_due:
            self._meet()

    def after_step(self, loss: float) -> None:
        """Synchronise when it is time to. loss: of the step that was done."""
        self._losses.append(loss)
        if self.late and self.late.arrival_step == self.state.step:
            with self.run.clock.phase("sync"):
                self._take_late()
        if self.is_due:
            with self.run.clock.phase("sync"):
                self._meet()

    @property
    def is_due(self) -> bool:
        """See `round_is_due`."""
        return round_is_due(self.run.config, self.state)

    def _meet(self) -> None:
        """A round, begun again while members fail. Nothing happens when this site is asked to stop."""
        started = time.monotonic()
        for _ in range(ATTEMPTS):
            try:
                round_ = self._open()
            except StopWaitingError:
                return
            opened = time.monotonic()
            roles = roles_of(round_.headers)
            check_same_run(round_.headers, site=round_.site, source=roles.source)
            try:
                staged = self._stage(round_, roles)
            except RoundError as error:
                self.run.event("round_failed", self.state, members=list(round_.members), reason=str(error))
                staged = None
            if self._commit(round_, staged is not None):
                break
        else:
            raise self._give_up(
                SitesError(
                    f"decentral.timeout_seconds = {self.decentral.timeout_seconds:g}: the round after step "
                    f"{self.state.step} has failed {ATTEMPTS} times; check the network between the sites, or allow "
                    f"more time"
                )
            )
        assert staged
        self._take(round_, roles, staged)
        if round_.site in roles.moved | roles.stale:
            self._move_to(round_, roles)
        figures = self._after_round(round_, roles)
        seconds = {"wait_seconds": round(opened - started, 3), "seconds": round(time.monotonic() - opened, 3)}
        self._note(round_, roles, {**figures, **seconds})
        self._losses.clear()

    def _open(self) -> Round:
        try:
            return self.transport.open(self._header())
        except SitesError as error:
            raise self._give_up(error) from error

    def _commit(self, round_: Round, ok: bool) -> bool:
        try:
            return round_.commit(ok)
        except SitesError as error:
            # Whether the others took the round over is unknown; they tell when this site comes back.
            raise self._give_up(error) from error

    def _give_up(self, error: SitesError) -> SitesError:
        """Save what was trained since the last round: a site that comes back goes on from here."""
        if self.is_due:
            self.run.save(self.state)
            self.run.checkpoints.wait()
        return error

    def _header(self) -> dict[str, Any]:
        state = self.state
        return {
            "round": state.decentral["round"],
            "step": state.step,
            "due": self.is_due,
            "late": state.decentral["late"],
            "config": common_keys(self.run.config)
            | {"data.train": state.data_fingerprint, "world size": self.run.mesh.world_size},
            "loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "position": {
                "samples": state.samples,
                "tokens": state.tokens,
                "flops": state.flops,
                "decentral": state.decentral,
                "optimizer": self.run.optimizer.state_dict(),
            },
        }

    def _stage(self, round_: Round, roles: Roles) -> Staged:
        """Exchange with the members. Raises RoundError when one fails. No collective inside the site."""
        if not roles.moves_anything:
            return Staged([], [], {}, {})
        run, bucket_bytes = self.run, self.bucket_bytes
        masters = [slot.master for slot in shared_slots(run.config, run.optimizer)]
        shared = mean_of_givers(round_, masters, roles.givers, bucket_bytes=bucket_bytes)
        outer: list[torch.Tensor] = []
        if run.outer and roles.stale:
            outer = from_source(round_, run.outer.state(), roles.source, bucket_bytes=bucket_bytes)
        experts: dict[tuple[str, int], torch.Tensor] = {}
        if not self._comes_late(round_, roles):
            items, carrier = self._items(round_, roles), run.mesh.groups.expt_dp.rank()
            experts = stage_experts(round_, items, roles.publisher, carrier=carrier, bucket_bytes=bucket_bytes)
        layers = copy_selection_biases(run.engine)
        means = mean_of_givers(round_, list(layers.values()), roles.givers, bucket_bytes=bucket_bytes)
        return Staged(shared, outer, experts, dict(zip(layers, means, strict=True)))

    def _comes_late(self, round_: Round, roles: Roles) -> bool:
        """Whether the experts of this round may arrive later: nobody needs them at once, and there is time.

        All members say the same: they come from one step and one round, or experts are not late.
        """
        step, delay, done = self.state.step, self.decentral.expert_delay_steps, self.state.decentral
        return bool(
            delay
            and roles.averaging
            and not roles.stale | roles.moved | roles.behind
            and step + delay <= self.run.config.total_steps
            and not self.decentral.merge.coefficient_at(step)
            # Other owners train at once what they take over, in a model that is made anew.
            and absences(self.decentral, done, round_.members)["dropped"] == done["dropped"]
        )

    def _items(self, round_: Round, roles: Roles) -> list[Item]:
        """Copies of experts that travel; none where every site trains all of them."""
        if self.decentral.kind == "diloco":
            return []
        dropped = round_.headers[roles.source]["position"]["decentral"]["dropped"]
        owner = partial(owner_of, sites=self.decentral.sites, dropped=dropped)
        return expert_items(self.run.engine.shards, owner, carriers=self.run.mesh.groups.expt_dp.size())

    @torch.no_grad()
    def _take(self, round_: Round, roles: Roles, staged: Staged) -> None:
        """Put what is staged in place."""
        run, is_stale = self.run, round_.site in roles.stale
        if round_.site in roles.takers:
            self._take_experts(round_, roles, staged.experts)
            if is_stale:
                run.optimizer.begin_again()
            weights = staged.shared
            if run.outer and is_stale:
                run.outer.take(staged.outer)
            if run.outer and roles.averaging:
                weights = run.outer.step(staged.shared)
            for slot, weight in zip(shared_slots(run.config, run.optimizer), weights, strict=True):
                slot.master.copy_(weight)
            run.optimizer.load_finished()
            restore_selection_biases(run.engine, staged.biases)

    def _take_experts(self, round_: Round, roles: Roles, staged: Mapping[tuple[str, int], torch.Tensor]) -> None:
        items, group = self._items(round_, roles), self.run.mesh.groups.expt_dp
        if self._comes_late(round_, roles):
            self.late = LateExperts(
                round_.background(),
                items,
                roles.publisher,
                carrier=group.rank(),
                bucket_bytes=self.bucket_bytes,
                arrival_step=self.state.step + self.decentral.expert_delay_steps,
            )
            return
        take_experts(items, staged, roles.publisher, site=round_.site, group=group)

    def _take_late(self) -> None:
        """Put experts in place that have come since the round. Without them, the copies stay as they were.

        Raises RuntimeError where they differ from what their owners sent.
        """
        assert self.late
        late, self.late = self.late, None
        started = time.monotonic()
        staged, checked = late.arrived(), {}
        if staged is not None:
            take_experts(late.items, staged, late.publisher, site=late.round.site, group=self.run.mesh.groups.expt_dp)
            checked = compare(late.round, late.carried)
        self.state.decentral = {**self.state.decentral, "late": False}
        self.run.event(
            "experts",
            self.state,
            taken=staged is not None,
            sent_bytes=late.round.sent_bytes,
            wait_seconds=round(time.monotonic() - started, 3),
            **checked,
        )

    def _move_to(self, round_: Round, roles: Roles) -> None:
        """Take over the position of a site that is further."""
        run, state, source = self.run, self.state, round_.headers[roles.source]
        position, is_stale = source["position"], round_.site in roles.stale
        if is_stale:
            run.optimizer.load_state_dict(position["optimizer"])
        handovers = state.decentral["handovers"]
        state.step, state.samples = source["step"], position["samples"]
        state.tokens, state.flops = position["tokens"], position["flops"]
        # Its copies of experts are those it had, unless it has taken over the keeper's.
        late = (roles.keeper if is_stale else round_.site) in roles.behind
        state.decentral = {**position["decentral"], "late": late}
        run.batches = open_batches(run.config, run.mesh, run.train_data, consumed_samples=state.samples)
        if state.decentral["handovers"] != handovers:
            retrain(run, state)

    def _after_round(self, round_: Round, roles: Roles) -> dict[str, Any]:
        """Count the round, merge experts, check all and hand over those of absent sites; returns what to note."""
        state = self.state
        figures: dict[str, Any] = {}
        if roles.averaging:
            done = {"round": state.decentral["round"] + 1, "round_step": state.step, "late": self.late is not None}
            state.decentral = {**state.decentral, **done}
            if self.decentral.kind == "spes":
                figures |= self._merge(round_, roles)
            figures |= self._check(round_, roles)
            self._count_absences(round_)
        elif state.decentral["round"] < 0:
            state.decentral = {**state.decentral, "round": 0, "round_step": state.step}
        return figures

    def _check(self, round_: Round, roles: Roles) -> dict[str, Any]:
        """Compare hashes of what all sites have now. Raises RuntimeError where they differ."""
        run = self.run
        shared = [slot.master for slot in shared_slots(run.config, run.optimizer)]
        experts = [] if self.late else [item.tensor for item in self._items(round_, roles)]
        return compare(round_, [*shared, *experts, *copy_selection_biases(run.engine).values()])

    @torch.no_grad()
    def _merge(self, round_: Round, roles: Roles) -> dict[str, Any]:
        """Mix experts where that is due, as a transaction of its own; returns how alike they were before."""
        run, merge, step = self.run, self.decentral.merge, self.state.step
        model = run.config.model
        if not merge.coefficient_at(step):
            if self.late:
                return {}
            return noted(similarity(run.engine, model, bucket_bytes=self.bucket_bytes))
        own = [slot for slot in run.optimizer.slots if slot.shard.logical.is_expert]
        found = merged(run.engine, model, merge, step, slots=own, bucket_bytes=self.bucket_bytes)
        before = [slot.master.to("cpu", copy=True) for slot in own]
        for slot, new in zip(own, found.masters, strict=True):
            slot.master.copy_(new)
        run.optimizer.load_finished()

        def publisher(owner: int) -> int | None:
            return owner if owner in round_.members else None

        # Only owners compute, and publish again: the same everywhere, whatever machines the sites have.
        items, group = self._items(round_, roles), run.mesh.groups.expt_dp
        try:
            staged = stage_experts(round_, items, publisher, carrier=group.rank(), bucket_bytes=self.bucket_bytes)
        except RoundError:
            staged = None
        is_merged = round_.commit(staged is not None)
        if is_merged:
            assert staged is not None
            take_experts(items, staged, publisher, site=round_.site, group=group)
        else:
            for slot, old in zip(own, before, strict=True):
                slot.master.copy_(old)
            run.optimizer.load_finished()
        return {"merged": is_merged, **noted(found.similarity)}

    def _count_absences(self, round_: Round) -> None:
        """Note who was not there; hand over the experts of those who have been away too long, or are back."""
        done = self.state.decentral
        found = absences(self.decentral, done, round_.members)
        self.state.decentral = {**done, "missed": found["missed"]}
        if found["dropped"] != done["dropped"]:
            self._hand_over(found["dropped"])

    def _hand_over(self, dropped: list[int]) -> None:
        """Give experts the owners that follow from who is away."""
        run, state, sites = self.run, self.state, self.decentral.sites
        old = state.decentral["dropped"]
        experts = [
            expert
            for expert in range(run.config.model.num_experts)
            if owner_of(expert, sites, old) != owner_of(expert, sites, dropped)
        ]
        handovers = [*state.decentral["handovers"], {"step": state.step, "experts": experts}]
        state.decentral = {**state.decentral, "dropped": dropped, "handovers": handovers}
        run.event("handover", state, dropped=dropped, experts=experts)
        retrain(run, state)

    def _note(self, round_: Round, roles: Roles, figures: Mapping[str, Any]) -> None:
        absent = [site for site in range(self.decentral.sites) if site not in round_.members]
        state = self.state
        fields: dict[str, Any] = {
            "round": state.decentral["round"],
            "members": list(round_.members),
            "absent": absent,
            "losses": {str(site): header["loss"] for site, header in round_.headers.items()},
            "sent_bytes": round_.sent_bytes,
            **{name: sorted(sites) for name in ("stale", "moved", "behind") if (sites := getattr(roles, name))},
            **figures,
        }
        self.run.event("sync" if roles.averaging else "joined", state, **fields)
        if self.run.recorder and absent:
            print(f"round {fields['round']} without site {', '.join(map(str, absent))}", flush=True)
