"""Configuration keys of `[decentral]`: several sites train one model together and synchronise now and then.

A site is a run of its own with any parallel layout inside; all sites share one file. Words: a round is one
synchronisation, its members the sites that take part; the owner of an expert is the one site that trains it.
"""

from __future__ import annotations

from typing import Literal

from pretrain.config.base import Beta, Count, Fraction, PositiveFloat, PositiveInt, Section


class MergeConfig(Section):
    """Merging as warm-up: every expert moves towards the mean of those most like it (SPES, arXiv 2602.11543)."""

    coefficient: Fraction = 0.0
    """Share of an expert that comes from its neighbours at the first step (0: no merging); it falls linearly to zero
    at until_step."""
    every_steps: PositiveInt = 500
    """Steps between merges; a multiple of sync_every_steps, as they follow a round."""
    until_step: PositiveInt = 10_000
    """Merging ends here."""
    neighbours: PositiveInt = 4
    """Other experts of the layer that an expert moves towards: those whose gate matrices have the largest cosine with
    its own."""

    def coefficient_at(self, step: int) -> float:
        """Share from the neighbours after `step` optimizer steps: 0 where no merge is due."""
        if step % self.every_steps:
            return 0.0
        return self.coefficient * (1 - min(step / self.until_step, 1.0))


class DecentralConfig(Section):
    """How sites that are far apart train one model together."""

    kind: Literal["spes", "diloco"]
    """spes: every site trains the shared parameters and its own part of the experts, and holds the others frozen
    (arXiv 2602.11543); diloco: every site trains the whole model (arXiv 2311.08105)."""
    sites: PositiveInt
    """How many there are. They cut every global batch, and the experts of every layer, into as many parts."""
    site: Count = 0
    """The one that this process belongs to, from 0; `--set decentral.site=1`."""
    sync_every_steps: PositiveInt = 100
    """Optimizer steps between rounds."""
    outer: Literal["auto", "average", "nesterov"] = "auto"
    """What a round makes of the shared parameters: their mean over the members, or a step with Nesterov momentum from
    where the round before left them towards that mean; auto: nesterov for diloco, average for spes. A run may change to
    nesterov from checkpoints of a round."""
    outer_lr: PositiveFloat = 0.7
    """nesterov: step size."""
    outer_momentum: Beta = 0.9
    """nesterov: share of the momentum that stays each round."""
    expert_delay_steps: Count = 0
    """spes: steps of training during which the experts of a round may still be on their way (0: it waits for them)."""
    bucket_mib: PositiveInt = 64
    """Largest part, in MiB, of what a round exchanges that is in device memory beside the training state; all else is
    staged in host memory."""
    merge: MergeConfig = MergeConfig()

    transport: Literal["torchft", "fixed"] = "torchft"
    """torchft: sites may fail, leave and come back; fixed: all sites take part all the time, and the failure of one
    ends the run."""
    coordinator: str = "127.0.0.1:29400"
    """HOST:PORT of `pretrain coordinator`; with transport = "fixed", an address of site 0's where the sites meet."""
    bind: str = "127.0.0.1"
    """Address of this machine, or name of its network interface, that the sockets for other sites listen on."""
    min_sites: Count = 0
    """Fewest members of a round (0: more than half of the sites)."""
    join_seconds: PositiveFloat = 60.0
    """How long a round that has its fewest members waits for a site that is alive but late."""
    wait_seconds: PositiveFloat = 3600.0
    """How long a site waits at a round for others; longer than sync_every_steps of the slowest site take."""
    timeout_seconds: PositiveFloat = 120.0
    """How long one collective or one vote of a round may take."""
    reown_after_rounds: Count = 0
    """spes: rounds a site may miss before the others take over its experts (0: these stay as they are)."""
    reown_rewarm_steps: Count = 0
    """Steps over which the rate of experts that changed hands rises from zero; their optimizer state is fresh."""

    @property
    def quorum(self) -> int:
        """Fewest members of a round: min_sites, or the smallest majority."""
        return self.min_sites or self.sites // 2 + 1

    @property
    def outer_rule(self) -> Literal["average", "nesterov"]:
        """`outer` with auto resolved."""
        if self.outer == "auto":
            return "nesterov" if self.kind == "diloco" else "average"
        return self.outer
