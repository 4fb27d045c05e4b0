"""Configuration keys of `[[growth]]`: what a run's model becomes in the middle of the run.

Each entry is one growth point. Operators of one point act together; their maps commute.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.base import Count, Factor, NonNegativeFloat, PositiveFloat, PositiveInt, Section

Init = Literal["copy", "zero-copy", "copy-zero", "random", "random-copy", "copy-random", "random-zero", "uneven"]
Fill = Literal["copy", "zero", "random"]

_FILLS: dict[str, tuple[Fill, Fill]] = {
    "copy": ("copy", "copy"),
    "zero-copy": ("zero", "copy"),
    "copy-zero": ("copy", "zero"),
    "random": ("random", "random"),
    "random-copy": ("random", "copy"),
    "copy-random": ("copy", "random"),
    "random-zero": ("random", "zero"),
    "uneven": ("copy", "copy"),
}


class DepthGrowth(Section):
    """More layers, each a copy of an existing one (orthogonal growth, arXiv 2510.08008)."""

    method: Literal["interpose", "stack"] = "interpose"
    """interpose: every layer is repeated in place (0 0 1 1 ...); stack: the whole block is (0 1 ... 0 1 ...)."""
    factor: Factor = 2
    """How often a layer occurs afterwards."""
    keep_first: Count = 0
    """Leading layers that are not repeated."""
    keep_last: Count = 0
    """Trailing layers that are not repeated."""
    identity: bool = False
    """Zero the output projections of the new layers, so that each starts as the identity."""


class UtilityConfig(Section):
    """Copies go to the experts with the largest gradients (Expert Upcycling, arXiv 2604.19835)."""

    steps: PositiveInt = 10
    """Steps before the growth over which the squared gradient norm of every expert is averaged."""
    max_copies: PositiveInt = 3
    """Largest number of copies of one expert."""


class ExpertGrowth(Section):
    """More routed experts, copies of the existing ones, and router rows for them."""

    factor: Factor = 2
    top_k: Literal["double", "hold"] = "double"
    """double: experts per token grow with the experts, which can preserve the function; hold: they do not."""
    order: Literal["append", "interleave"] = "append"
    """Place of the copies: after all experts (group-limited routing then has as many groups more), or each after its
    source (the groups stay and get larger)."""
    noise: NonNegativeFloat = 0.01
    """Gaussian noise on the copies and their router rows, as a share of the standard deviation of each tensor."""
    bias_noise: NonNegativeFloat = 0.0
    """hold: uniform noise within +- this on the selection bias of the copies."""
    exact_start: bool = False
    """hold: lower the selection bias of the copies out of reach, so that none is chosen until balancing raises it."""
    utility: UtilityConfig | None = None
    """hold: choose the experts that are copied by their gradients; without it every expert is copied alike."""


class WidthGrowth(Section):
    """A wider axis (SPARKLING, arXiv 2602.02472): new rows of the matrices that write it, new columns of those that
    read it."""

    factor: Annotated[float, Field(gt=1)] = 2.0
    init: Init = "copy"
    """New rows - new columns. `copy` copies both and preserves the function for whole factors; `uneven` does, too, with
    unequal columns; the others are the alternatives the paper compares with. `zero-copy` keeps the gate's rows (and
    queries and keys) as copies, as nothing would learn otherwise."""
    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    """uneven: share of the columns' weight that the copy gets."""
    noise: NonNegativeFloat = 0.0
    """Gaussian noise on the copies, as a share of the standard deviation of each tensor. Breaks the tie between several
    copies of one source, which factors above 2 need."""

    @property
    def fan_out(self) -> Fill:
        """What new rows are."""
        return _FILLS[self.init][0]

    @property
    def fan_in(self) -> Fill:
        """What new columns are."""
        return _FILLS[self.init][1]


class RewarmConfig(Section):
    """A learning-rate curve of their own for the entries that a growth brings in."""

    steps: Count = 250
    """Length of the linear warm-up."""
    ratio: PositiveFloat = 1.3
    """Its end, relative to the learning rate at the growth; the entries then follow a curve of their own down to the
    same end of the schedule."""
    start: NonNegativeFloat = 1.0
    """Its beginning, relative to the learning rate at the growth (0 suits a state that is reset)."""
    entries: Literal["new", "all"] = "new"
    """all: the whole model follows it."""


class ParallelChange(Section):
    """Sizes of [parallel] that change at a growth; those not given stay."""

    tensor: PositiveInt | None = None
    pipeline: PositiveInt | None = None
    pipeline_chunks: PositiveInt | None = None
    context: PositiveInt | None = None
    expert: PositiveInt | None = None
    expert_tensor: PositiveInt | None = None


class GrowthConfig(Section):
    """One growth point: when, what grows, and what the optimizer does about it."""

    at_step: Count = 0
    """Optimizer steps done before it; this or at_tokens."""
    at_tokens: Count = 0
    """Tokens trained on before it, rounded up to whole steps."""

    depth: DepthGrowth | None = None
    experts: ExpertGrowth | None = None
    hidden: WidthGrowth | None = None
    """The residual stream. Heads and their channels stay."""
    ffn: WidthGrowth | None = None
    """Intermediate channels of dense layers."""
    expert_ffn: WidthGrowth | None = None
    """Intermediate channels of routed experts."""
    shared_expert_ffn: WidthGrowth | None = None
    """Intermediate channels of the shared expert."""
    query_groups: WidthGrowth | None = None
    """Attention, by whole groups: key/value heads with their query heads."""

    optimizer_state: Literal["asymmetric", "reset", "copy", "exact"] = "asymmetric"
    """asymmetric: old entries keep their state, new ones start at zero; reset: all start at zero, the step count too;
    copy: new entries get their source's; exact: as copy, scaled such that experts duplicated without noise, with
    top_k = "double", train exactly as before (while no gradient is clipped, without router.z_loss and any matrix rule
    on the router; not for Sophia and Kron)."""
    rewarm: RewarmConfig | None = None
    parallel: ParallelChange | None = None
    """The layout from here on."""

    @property
    def widths(self) -> dict[str, WidthGrowth]:
        """Key -> growth, of the axes that get wider."""
        found = {name: getattr(self, name) for name in WIDTH_AXES}
        return {name: width for name, width in found.items() if width is not None}


# Key of a growth -> axis of logical tensors, and size in the model's configuration.
WIDTH_AXES = {
    "hidden": ("hidden", "hidden_size"),
    "ffn": ("ffn", "ffn_size"),
    "expert_ffn": ("expert_ffn", "expert_ffn_size"),
    "shared_expert_ffn": ("shared_ffn", "shared_expert_ffn_size"),
    "query_groups": ("kv_group", "num_query_groups"),
}
