"""Spread, paired differences and verdicts on numbers whose answer is known."""

from __future__ import annotations

import math

import pytest

from pretrain.studies.claims import CLAIMS, judge, margin
from pretrain.studies.statistics import Spread, difference, gap_closed, judge_equal, judge_lower, spread
from tests.studies.synthetic import losses_as_in_the_papers


def test_spread_of_known_numbers() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.seeds) == (2.0, 1.0, 3)
    # 95 % interval of a mean of three: 4.303 / sqrt(3) deviations.
    assert found.interval == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)


def test_t_quantiles_against_torch() -> None:
    """Student's distribution integrated by another: a share of 95 % of its samples lies within the quantile."""
    import torch

    torch.manual_seed(0)
    for degrees in (2, 4, 9):
        samples = torch.distributions.StudentT(degrees).sample((400_000,)).abs()
        quantile = Spread(0.0, math.sqrt(degrees + 1), degrees + 1).half_width
        assert (samples < quantile).double().mean().item() == pytest.approx(0.95, abs=0.002)


def test_one_seed_resolves_nothing() -> None:
    assert judge_lower(spread([5.0])) == "not resolved"
    assert judge_equal(spread([0.0]), 1.0) == "not resolved"


def test_many_seeds_take_the_last_quantile() -> None:
    assert Spread(0.0, 1.0, 100).half_width == pytest.approx(2.228 / 10)


def test_differences_are_paired_by_seed() -> None:
    """The spread between seeds, ten times the difference, drops out; without pairing it would hide all."""
    first = {1: 2.0, 2: 3.0, 3: 1.0}
    second = {3: 1.101, 1: 2.1, 2: 3.099}
    found = difference(first, second)
    assert found.mean == pytest.approx(0.1)
    assert judge_lower(found) == "reproduced"
    shuffled = {1: second[2], 2: second[3], 3: second[1]}
    assert judge_lower(difference(first, shuffled)) == "not resolved"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.10, 0.11, 0.09], "reproduced"),
        ([-0.10, -0.11, -0.09], "not reproduced"),
        ([0.10, -0.11, 0.09], "not resolved"),
    ],
)
def test_verdict_on_an_order(values: list[float], verdict: str) -> None:
    assert judge_lower(spread(values)) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.001, -0.001, 0.0], "reproduced"),
        ([0.101, 0.099, 0.1], "not reproduced"),
        ([-0.101, -0.099, -0.1], "not reproduced"),
        ([0.021, 0.019, 0.02], "not resolved"),
        ([0.1, -0.1, 0.0], "not resolved"),
    ],
)
def test_verdict_on_equality(values: list[float], verdict: str) -> None:
    assert judge_equal(spread(values), 0.02) == verdict


def test_gap_closed() -> None:
    found = gap_closed({1: 3.0, 2: 4.0}, {1: 2.0, 2: 2.0}, {1: 2.1, 2: 2.2})
    assert found.mean == pytest.approx(0.9)
    assert found.deviation == pytest.approx(0.0)


def test_claims_on_numbers_like_the_papers() -> None:
    assert {one.verdict for one in judge(losses_as_in_the_papers())} == {"reproduced"}


def test_claims_on_the_opposite() -> None:
    """Negative control: every order turned round, and what should be equal far apart."""
    good = losses_as_in_the_papers()
    for claim in CLAIMS:
        bad = dict(good)
        if claim.equal:
            bad[claim.second] = {seed: loss + 0.5 for seed, loss in bad[claim.first].items()}
        else:
            bad[claim.first], bad[claim.second] = good[claim.second], good[claim.first]
        (judged,) = [one for one in judge(bad) if one.claim == claim]
        assert judged.verdict == "not reproduced", claim


def test_margin_is_a_share_of_the_gap() -> None:
    losses = losses_as_in_the_papers()
    gap = losses["small"][1] - losses["width-scratch"][1]
    assert margin(losses, "width") == pytest.approx(0.05 * gap, rel=0.01)
