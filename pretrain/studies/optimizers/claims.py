"""What is claimed of optimizers, most of it in arXiv 2509.02046, and whether the numbers here agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from pretrain.errors import UserError
from pretrain.studies.evidence import Claim, Evidence, Judged, judge_claims
from pretrain.studies.optimizers.cases import (
    FIRST,
    HALF,
    LARGE_DECAY,
    LARGER,
    LONGER,
    LONGEST,
    MATRIX,
    MOE,
    MUON_ROUTER,
    SCALAR,
    SCALED,
    SMALL_DECAY,
    UNDERTUNED,
    Case,
    Study,
    mean_loss,
)
from pretrain.studies.statistics import finite_spread
from pretrain.tuning.speedup import Result, SizeSpeedUps, speed_ups

MIDWAY = 0.75
"""Share of the steps at which ranks are compared with those at the end. At the last quarter the rate of a cosine is
15 % of its peak, that of a straight line 25 %."""
EQUAL_SHARE = 0.1
"""Two ways to update routers count as equal when they differ by less than this share of what Muon gains over AdamW."""


def judge(study: Study) -> list[Judged[Study]]:
    """The verdict on every claim."""
    return judge_claims(CLAIMS, study)


def less(study: Study, first: Case, second: Case) -> Evidence:
    """By how much the first case's loss is below the second's, by seed."""
    losses = study.losses
    return {seed: losses[second][seed] - loss for seed, loss in losses[first].items()}


def _minus(first: Evidence, second: Evidence) -> Evidence:
    return {seed: value - second[seed] for seed, value in first.items()}


def _mean(evidences: Iterable[Evidence]) -> Evidence:
    rows = list(evidences)
    return {seed: math.fsum(row[seed] for row in rows) / len(rows) for seed in rows[0]}


def matrix_lead(study: Study) -> Evidence:
    """By how much the worse matrix rule is below the best scalar rule."""
    losses = study.losses
    return {
        seed: min(losses[Case(name)][seed] for name in SCALAR) - max(losses[Case(name)][seed] for name in MATRIX)
        for seed in study.seeds
    }


def _muon_over_soap(study: Study, cell: str) -> Evidence:
    return less(study, study.best("muon", cell), study.best("soap", cell))


def lower_rate(study: Study, cell: str, optimizer: str) -> Evidence:
    """How much more half the rate is worth in a cell than in the first one."""
    gains = [less(study, Case(optimizer, there, HALF), Case(optimizer, there)) for there in (cell, FIRST)]
    return _minus(*gains)


def _lower_rates(study: Study, cell: str) -> list[Evidence]:
    return [_mean(lower_rate(study, cell, optimizer) for optimizer in SCALED)]


def flip_pair(study: Study) -> tuple[Case, Case]:
    """AdamW at its best rate and Muon at that of the shorter runs, in the cell of the longest runs."""
    return study.best("adamw", LONGEST), Case("muon", LONGEST)


def _flip(study: Study) -> list[Evidence]:
    adamw, muon = flip_pair(study)
    midway = [{seed: _at_midway(curve) for seed, curve in study.curves[case].items()} for case in (adamw, muon)]
    both = midway[0].keys() & midway[1].keys()
    return [{seed: midway[1][seed] - midway[0][seed] for seed in sorted(both)}, less(study, muon, adamw)]


def _at_midway(curve: Iterable[tuple[float, float]]) -> float:
    return min(curve, key=lambda point: abs(point[0] - MIDWAY))[1]


def mean_speed_ups(study: Study) -> SizeSpeedUps:
    """Speed-ups over AdamW at the first cell's size, from mean losses. Raises UserError when AdamW's losses make no
    curve."""
    return _speed_ups(study, lambda case: mean_loss(study.losses[case]))


def _speed_ups(study: Study, loss: Callable[[Case], float]) -> SizeSpeedUps:
    """`loss`: of a case, final. Runs without one are left out."""
    cells = {cell.name: cell for cell in study.sweep.cells}
    cases = [study.best(optimizer, cell) for cell in (FIRST, LONGER, LONGEST) for optimizer in SCALED]
    cases += [Case(optimizer) for optimizer in SCALAR if optimizer not in SCALED]
    found = [(case, cells[case.cell], loss(case)) for case in cases]
    (size,) = speed_ups(
        Result(case.optimizer, cell.model_size, cell.ratio, value)
        for case, cell, value in found
        if math.isfinite(value)
    )
    return size


def _speed_up_falls(study: Study) -> list[Evidence]:
    """Muon's speed-up in the first cell less that with the most tokens."""
    found: dict[int, float] = {}
    for seed in study.seeds:
        try:
            rows = _speed_ups(study, lambda case, seed=seed: study.losses[case][seed]).rows  # type: ignore[misc]
        except UserError:
            continue  # In this seed AdamW's losses make no curve: it says nothing.
        factors = [row.factor for row in rows if row.optimizer == "muon"]
        found[seed] = factors[0] - factors[-1]
    return [found]


def _router_margin(study: Study) -> float:
    return EQUAL_SHARE * abs(finite_spread(less(study, Case("muon", MOE), Case("adamw", MOE))).mean)


CLAIMS: tuple[Claim[Study], ...] = (
    Claim(
        "every matrix rule beats every scalar rule",
        "best of AdamW, NAdamW and Lion less worse of Muon and SOAP",
        lambda study: [matrix_lead(study)],
    ),
    Claim(
        "AdamW with a rate that was not tuned is a weak baseline",
        "AdamW at 6e-4 less AdamW tuned",
        lambda study: [less(study, Case("adamw"), Case("adamw", FIRST, UNDERTUNED))],
    ),
    Claim(
        "Muon is ahead of SOAP at a low data ratio",
        f"SOAP less Muon at {FIRST}",
        lambda study: [_muon_over_soap(study, FIRST)],
    ),
    Claim(
        "SOAP catches up with Muon as data grows",
        f"Muon's lead over SOAP at {FIRST} less that at {LONGEST}",
        lambda study: [_minus(_muon_over_soap(study, FIRST), _muon_over_soap(study, LONGEST))],
    ),
    Claim(
        "the speed-up over AdamW shrinks with data",
        f"Muon's speed-up at {FIRST} less that at {LONGEST}",
        _speed_up_falls,
    ),
    Claim(
        "the best learning rate falls with data",
        f"what halving the rate gains at {LONGEST} less what it gains at {FIRST}, mean of AdamW, Muon and SOAP",
        lambda study: _lower_rates(study, LONGEST),
    ),
    Claim(
        "the best learning rate falls with size",
        f"what halving the rate gains at {LARGER} less what it gains at {FIRST}, mean of AdamW, Muon and SOAP",
        lambda study: _lower_rates(study, LARGER),
    ),
    Claim(
        "Lion wants a large weight decay",
        "Lion with decay 0.1 less Lion with 0.7",
        lambda study: [less(study, Case("lion", FIRST, LARGE_DECAY), Case("lion", FIRST, SMALL_DECAY))],
    ),
    Claim(
        "ranks flip while the learning rate falls",
        f"Muon at the rate of {FIRST} less AdamW at {MIDWAY:.0%} of the steps of {LONGEST}; AdamW less Muon at the end",
        _flip,
    ),
    Claim(
        "Muon beats AdamW on a mixture of experts",
        "AdamW less Muon, routers on AdamW",
        lambda study: [less(study, Case("muon", MOE), Case("adamw", MOE))],
    ),
    Claim(
        "whether AdamW or Muon updates the routers makes no difference",
        "Muon with routers on AdamW less Muon with routers on Muon",
        lambda study: [less(study, Case(MUON_ROUTER, MOE), Case("muon", MOE))],
        margin=_router_margin,
    ),
)
