"""Claims on which every seed gives evidence, and the verdicts that follow.

Evidence is one number a seed, positive where that seed speaks for the claim; the verdict follows from its 95 %
interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pretrain.studies.statistics import Spread, Verdict, finite_spread, judge_equal, judge_lower
from pretrain.tuning.markdown import table

Evidence = Mapping[int, float]
"""Seed -> how much it speaks for a claim."""
StudyT = TypeVar("StudyT")
"""All that a study has found."""


@dataclass(frozen=True)
class Claim(Generic[StudyT]):
    """A statement, and what speaks for it."""

    text: str
    measure: str
    """What the numbers are."""
    evidence: Callable[[StudyT], list[Evidence]]
    """All of them must speak for it."""
    margin: Callable[[StudyT], float] | None = None
    """Of claims that a number is zero: how far from it counts as equal."""


@dataclass(frozen=True)
class Judged(Generic[StudyT]):
    """A claim with what the numbers say."""

    claim: Claim[StudyT]
    found: list[Spread]
    verdict: Verdict
    margin: float | None = None


def judge_claims(claims: Sequence[Claim[StudyT]], study: StudyT) -> list[Judged[StudyT]]:
    """The verdict on every claim."""
    return [_judge(claim, study) for claim in claims]


def _judge(claim: Claim[StudyT], study: StudyT) -> Judged[StudyT]:
    found = [finite_spread(evidence) for evidence in claim.evidence(study)]
    if claim.margin is not None:
        margin = claim.margin(study)
        return Judged(claim, found, _all([judge_equal(one, margin) for one in found]), margin)
    return Judged(claim, found, _all([judge_lower(one) for one in found]))


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all of several parts hold: no, as soon as one does not."""
    found = [*verdicts]
    if "not reproduced" in found:
        return "not reproduced"
    return "not resolved" if "not resolved" in found else "reproduced"


def summary_of(judged: Sequence[Judged[StudyT]], seeds: int) -> str:
    """What holds, in a few lines."""
    lines = []
    for verdict in ("reproduced", "not reproduced", "not resolved"):
        texts = [one.claim.text for one in judged if one.verdict == verdict]
        lines.append(f"- **{verdict.capitalize()}** ({len(texts)} of {len(judged)}): {'; '.join(texts) or 'none'}.")
    if seeds < 2:
        lines.append("- One seed has no spread: nothing can be resolved.")
    return "\n".join(lines)


def claims_table(judged: Sequence[Judged[StudyT]]) -> str:
    """Every claim with its numbers and the verdict."""
    rows = []
    for one in judged:
        limit = f", margin {one.margin:.4f}" if one.margin is not None else ""
        rows.append(
            [one.claim.text, one.claim.measure, "; ".join(map(interval, one.found)) + limit, f"**{one.verdict}**"]
        )
    return table(["claim", "measure", "here", "verdict"], rows)


def interval(found: Spread) -> str:
    """Mean, and the 95 % confidence interval."""
    if not found.seeds:
        return "-"
    if found.seeds < 2:
        return f"{found.mean:+.4f} ({found.seeds} seeds)"
    low, high = found.interval
    return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def plus_minus(found: Spread) -> str:
    """Mean and standard deviation of one seed."""
    if not found.seeds:
        return "failed"
    return f"{found.mean:.4f}" + (f" +- {found.deviation:.4f}" if found.seeds > 1 else "")


def claims_json(judged: Sequence[Judged[StudyT]]) -> list[dict[str, Any]]:
    """The claims and verdicts for results.json."""
    return [
        {
            "text": one.claim.text,
            "measure": one.claim.measure,
            "found": [
                {"mean": json_number(found.mean), "interval": [*map(json_number, found.interval)], "seeds": found.seeds}
                for found in one.found
            ],
            "margin": one.margin,
            "verdict": one.verdict,
        }
        for one in judged
    ]


def json_number(value: float) -> float | None:
    """JSON has no word for infinity and NaN."""
    return value if math.isfinite(value) else None
