"""What the papers on growth claim about the order of the arms, and whether the numbers here agree.

A claim is a statement about two arms; its verdict is computed from the paired differences of their final losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.studies.arms import SMALL, Family, arm_named, from_scratch
from pretrain.studies.statistics import Spread, Verdict, difference, judge_equal, judge_lower

MARGIN_SHARE = 0.05
"""Two arms count as equal when they differ by less than this share of the gap between the small model and the final
size from scratch. In arXiv 2602.02472, table 6, zero-copy is within 0.0012 of the full method, 2 % of that gap; 5 % is
what a study of this size could hope to see."""
LOCKED_DISTANCE = 1e-3
"""Halves closer than this are copies still; with any asymmetry they are further apart after one step
(arXiv 2602.02472)."""

Losses = Mapping[str, Mapping[int, float]]
"""Arm -> seed -> final validation loss."""


@dataclass(frozen=True)
class Claim:
    """`first` ends lower than `second`, or, if `equal`, at the same loss."""

    first: str
    second: str
    text: str
    equal: bool = False


@dataclass(frozen=True)
class Judged:
    """A claim with what the numbers say."""

    claim: Claim
    second_minus_first: Spread
    verdict: Verdict
    margin: float | None = None
    """Of claims that two arms are equal."""


CLAIMS = (
    Claim("width-scratch", "width-full", "from scratch ends below the full method at equal tokens"),
    Claim("width-full", "width-asymmetric", "re-warming the new entries helps"),
    Claim("width-asymmetric", "width-copied", "asymmetric state beats copied state"),
    Claim("width-asymmetric", "width-dropped", "asymmetric state beats dropped state"),
    Claim("width-full", "width-rewarm-all", "re-warming the new entries alone beats re-warming all"),
    Claim("width-full", "width-zero-copy", "zero-copy without re-warm is as good as the full method", equal=True),
    Claim("width-full", "width-random", "random new entries are worse"),
    Claim("width-full", SMALL, "growing beats staying small at equal tokens"),
    Claim("width-full", "width-scratch-short", "growing beats training the final size at equal FLOPs"),
    Claim("depth-interpose-late", "depth-stack-late", "interposition beats stacking late"),
    Claim("depth-interpose-early", "depth-stack-early", "interposition and stacking are equal early", equal=True),
    Claim("depth-interpose-late", SMALL, "growing late beats staying small at equal tokens"),
    Claim("depth-interpose-late", "depth-scratch-short", "growing late beats the final size at equal FLOPs"),
    Claim("experts-noise", "experts-plain", "noise makes no difference once the state is asymmetric", equal=True),
    Claim("experts-noise", "experts-exact", "breaking the tie of twins helps"),
    Claim("experts-noise", SMALL, "growing beats staying small at equal tokens"),
)


def judge(losses: Losses) -> list[Judged]:
    """The verdict on every claim."""
    return [_judge(claim, losses) for claim in CLAIMS]


def margin(losses: Losses, family: Family) -> float:
    """Largest difference at which two arms of a family count as equal, in nats per token."""
    return MARGIN_SHARE * abs(difference(losses[from_scratch(family).name], losses[SMALL]).mean)


def _judge(claim: Claim, losses: Losses) -> Judged:
    found = difference(losses[claim.first], losses[claim.second])
    if not claim.equal:
        return Judged(claim, found, judge_lower(found))
    limit = margin(losses, arm_named(claim.first).family)
    return Judged(claim, found, judge_equal(found, limit), limit)
