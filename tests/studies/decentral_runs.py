"""Runs of the study of decentralized training without training: made-up outcomes that follow what is claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.config.schema import Config
from pretrain.studies.decentral.arms import ARMS, LOST, Arm
from pretrain.studies.decentral.command import make_task
from pretrain.studies.decentral.results import Outcome, Round, Study

LEVELS = {
    "central": 4.0,
    "diloco-10": 4.02,
    "diloco-50": 4.05,
    "average-10": 4.04,
    "average-50": 4.07,
    "spes-10": 4.03,
    "spes-50": 4.06,
    "merge-10": 4.005,
    "merge-50": 4.03,
    "four": 4.08,
    "four-lost": 4.09,
}
"""Final loss of each arm: central training is best, merging and outer momentum help, fewer rounds and more sites
cost."""
STEPS = 200

Change = Callable[[Arm, int], float]
"""(arm, seed) -> what is added to its loss."""


def nothing(arm: Arm, seed: int) -> float:
    return 0.0


def made_up(arm: Arm, seed: int, change: Change = nothing) -> Outcome:
    """What a run of this arm comes to, as the claims have it."""
    # What the seed does to all arms, and a little of each arm's own.
    loss = LEVELS[arm.name] + 0.1 * seed + 0.0005 * ((seed * len(arm.name)) % 3) + change(arm, seed)
    state, sent = (2_000_000, 700_000) if arm.decentral and arm.decentral["kind"] == "diloco" else (1_600_000, 500_000)
    away = [STEPS * share // 20 for share in (6, 7)] if arm.loses_a_site else []
    rounds = [_round(arm, step, away, sent) for step in range(arm.interval, STEPS + 1, arm.interval)]
    return Outcome(
        seed=seed,
        loss=loss,
        bits_per_byte=loss / 2,
        curve=[(step, loss + 1 - step / STEPS) for step in (50, 100, 150, 200)],
        disagreement=0.0,
        rounds=rounds if arm.decentral else [],
        away=tuple(away),
        returned=80 if away else None,
        state_bytes=state,
        planned_state_bytes=state,
        memory_bytes=2 * state,
        planned_bytes_per_round=sent if arm.decentral else 0,
        similarity=0.02,
        entropy=0.97,
        fullest=1.4,
        dead_experts=0,
        seconds=20.0,
    )


def _round(arm: Arm, step: int, away: Sequence[int], sent: int) -> Round:
    members = tuple(site for site in range(arm.sites) if step not in away or site != arm.sites - 1)
    losses = {site: 5.0 + 0.01 * site - step / STEPS for site in members}
    merged = arm.name.startswith("merge") and step <= STEPS // 2
    heals = bool(away) and step == away[-1] + arm.interval
    return Round(step, members, losses, sent * (1 + merged + heals), 0.1, 0.2, merged, heals)


def made_up_study(base: Config, out: Path, seeds: Sequence[int] = (1, 2, 3), change: Change = nothing) -> Study:
    """The study when every claim holds, but for what `change` adds to losses."""
    return Study(
        base=base,
        tasks={arm.name: make_task(base, arm, seeds[0], out) for arm in ARMS},
        outcomes={arm.name: [made_up(arm, seed, change) for seed in seeds] for arm in ARMS},
        command=["pretrain", "study", "decentral", "--seeds", str(len(seeds))],
        machine={"date": "2026-01-01", "device": "cpu"},
    )


assert {arm.name for arm in ARMS} == {*LEVELS}
assert LOST in LEVELS
