"""Learning-rate schedules against torch and transformers, and at their ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from pretrain.config.schema import ScheduleConfig
from pretrain.optim.schedule import Rewarm, Schedule, Schedules

TOTAL, WARMUP = 200, 20


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def oracle_values(scheduler, steps: int = TOTAL) -> list[float]:
    """Learning rates a scheduler gives for steps 0..steps."""
    values = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        values.append(scheduler.get_last_lr()[0])
    return values


def ours(**keys) -> list[float]:
    schedule = Schedule.from_config(ScheduleConfig(warmup_steps=WARMUP, **keys), TOTAL)
    return [schedule.lr_ratio(step) for step in range(TOTAL + 1)]


def test_cosine_is_transformers():
    oracle = get_cosine_with_min_lr_schedule_with_warmup(optimizer(), WARMUP, TOTAL, min_lr_rate=0.1)
    assert ours(kind="cosine", min_lr_ratio=0.1) == pytest.approx(oracle_values(oracle), abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_wsd_is_transformers(shape):
    decay = 50
    oracle = get_wsd_schedule(
        optimizer(),
        num_warmup_steps=WARMUP,
        num_decay_steps=decay,
        num_stable_steps=TOTAL - WARMUP - decay,
        decay_type=shape,
        min_lr_ratio=0.05,
    )
    values = ours(kind="wsd", decay_fraction=decay / TOTAL, decay_shape=shape, min_lr_ratio=0.05)
    # Their warm-up starts from the minimum, ours from zero.
    assert values[WARMUP:] == pytest.approx(oracle_values(oracle)[WARMUP:], abs=1e-12)


def test_linear_is_torch():
    opt = optimizer()
    oracle = torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / WARMUP),
            torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.25, total_iters=TOTAL - WARMUP),
        ],
        milestones=[WARMUP],
    )
    assert ours(kind="linear", min_lr_ratio=0.25) == pytest.approx(oracle_values(oracle), abs=1e-9)


def test_constant_stays_at_peak():
    assert ours(kind="constant")[WARMUP:] == [1.0] * (TOTAL - WARMUP + 1)


def test_sqrt_shape_of_wsd():
    values = ours(kind="wsd", decay_fraction=0.5, decay_shape="sqrt", min_lr_ratio=0.0)
    assert values[TOTAL // 2] == 1.0
    assert values[TOTAL // 2 + 25] == pytest.approx(0.5)  # a quarter of the fall: 1 - sqrt(1/4)
    assert values[-1] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_ends(kind):
    values = ours(kind=kind, min_lr_ratio=0.1)
    assert values[0] == 0.0
    assert values[1] == pytest.approx(1 / WARMUP)
    assert values[WARMUP] == 1.0
    assert values[WARMUP - 1] < 1.0
    assert values[TOTAL] == pytest.approx(0.1)
    assert values[TOTAL - 1] > 0.1
    assert all(0 <= value <= 1 for value in values)
    schedule = Schedule.from_config(ScheduleConfig(kind=kind, min_lr_ratio=0.1), TOTAL)
    assert schedule.lr_ratio(TOTAL + 50) == pytest.approx(0.1)
    assert schedule.lr_ratio(0) == 1.0  # no warm-up: at once at the peak


def test_decay_longer_than_what_warmup_leaves():
    schedule = Schedule("wsd", total_steps=100, warmup_steps=60, decay_steps=80)
    assert schedule.lr_ratio(60) == 1.0
    assert schedule.lr_ratio(80) == pytest.approx(0.5)


def test_wsd_without_decay_never_falls():
    assert Schedule("wsd", total_steps=100, decay_steps=0).lr_ratio(100) == 1.0


# Curves of entries that join in the middle of a run. The figures are SPARKLING's run length and warm-ups (arXiv
# 2602.02472): growth half way, 3 % warm-up, down to 1 % of the peak, entries re-warmed to 1.3 times in 250 steps.
LONG, HALF = 63_578, 31_789
LONG_WARMUP = round(0.03 * LONG)
REWARM = Rewarm(step=HALF, ratio=1.3, steps=250)


def base(kind: str = "cosine", **keys) -> Schedule:
    return Schedule(kind, total_steps=LONG, warmup_steps=LONG_WARMUP, end=0.01, **keys)


def paper_cosine(step: float, warmup: float, total: float, first: float, peak: float, last: float) -> float:
    """f of the paper's equations 25 and 26."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return last + (peak - last) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_cosine_of_new_entries_is_the_papers():
    schedules = Schedules(base(), (REWARM,))
    now = base().lr_ratio(HALF)
    assert now == pytest.approx(0.529, abs=5e-4)
    for step in range(1, LONG + 1):
        assert schedules.lr_ratio(step) == base().lr_ratio(step), "old entries know of nothing"
    for step in range(HALF + 1, LONG + 1):
        expected = paper_cosine(step - HALF, 250, LONG - HALF, now, 1.3 * now, 0.01)
        assert schedules.newer(step) == pytest.approx((expected,), rel=1e-12)
    assert schedules.newer(HALF + 1) == pytest.approx((now * (1 + 0.3 / 250),)), "the first update warms up already"
    assert schedules.newer(HALF + 250) == pytest.approx((1.3 * now,))
    assert schedules.newer(LONG)[0] == schedules.lr_ratio(LONG) == pytest.approx(0.01)


def ratios(schedules: Schedules) -> tuple[dict[float, float], float]:
    """New over old learning rate at shares of the run, and their sums' over what is left."""
    shares = (0.504, 0.55, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
    at = {share: schedules.newer(round(share * LONG))[0] / schedules.lr_ratio(round(share * LONG)) for share in shares}
    left = range(HALF + 1, LONG + 1, 10)  # smooth enough
    return at, sum(schedules.newer(step)[0] for step in left) / sum(schedules.lr_ratio(step) for step in left)


def test_new_entries_over_old_ones():
    # Worked out from the equations apart from this code.
    expected = [1.31, 1.50, 1.69, 2.03, 2.16, 2.24, 2.26, 2.12, 1.63, 1.15, 1.00]
    at, integral = ratios(Schedules(base(), (REWARM,)))
    assert list(at.values()) == pytest.approx(expected, abs=6e-3)
    assert integral == pytest.approx(1.757, abs=1e-3)
    # Other ratios; without a re-warm-up, the restarted cosine alone does much of it.
    for ratio, total in [(1.0, 1.36), (1.125, 1.53), (1.25, 1.69), (1.5, 2.02)]:
        curve = Rewarm(step=HALF, ratio=ratio, steps=250)
        assert ratios(Schedules(base(), (curve,)))[1] == pytest.approx(total, abs=6e-3)
    # Negative control: entries that follow the old ones.
    assert ratios(Schedules(base(), (None,))) == (dict.fromkeys(at, 1.0), 1.0)


def test_rewarm_at_once_and_from_elsewhere():
    now = base().lr_ratio(HALF)
    jump = base().rewarmed(HALF, ratio=1.3, steps=0)
    assert jump.lr_ratio(1) == pytest.approx(1.3 * now, rel=1e-6)
    from_zero = base().rewarmed(HALF, ratio=1.0, steps=100, start=0.0)
    assert [from_zero.lr_ratio(step) for step in (1, 50, 100)] == pytest.approx([now / 100, now / 2, now])


def test_wsd_of_new_entries():
    decay = LONG // 5
    schedule = base("wsd", decay_steps=decay)
    curve = schedule.rewarmed(HALF, ratio=1.3, steps=250)
    stable = LONG - decay
    assert {curve.lr_ratio(step - HALF) for step in range(HALF + 250, stable + 1)} == {1.3}
    assert curve.lr_ratio(125) == pytest.approx(1.15)
    for step in range(stable, LONG + 1, 100):  # the fall is the base's, from 1.3 instead of 1
        assert (curve.lr_ratio(step - HALF) - 0.01) / 1.29 == pytest.approx((schedule.lr_ratio(step) - 0.01) / 0.99)
    assert curve.lr_ratio(LONG - HALF) == pytest.approx(0.01)

    # A growth in the decay: up, and down from there without a rest.
    late = stable + decay // 2
    now, curve = schedule.lr_ratio(late), schedule.rewarmed(late, ratio=1.3, steps=250)
    assert now == pytest.approx(0.505, abs=1e-4)
    assert curve.lr_ratio(250) == pytest.approx(1.3 * now)
    assert curve.lr_ratio(251) < curve.lr_ratio(250)
    middle = (LONG - late - 250) // 2
    assert curve.lr_ratio(250 + middle) == pytest.approx((1.3 * now + 0.01) / 2, rel=1e-3)
    assert curve.lr_ratio(LONG - late) == pytest.approx(0.01)


def test_linear_and_constant_of_new_entries():
    now = base("linear").lr_ratio(HALF)
    line = base("linear").rewarmed(HALF, ratio=1.3, steps=250)
    assert line.lr_ratio(250) == pytest.approx(1.3 * now)
    middle = (LONG - HALF - 250) / 2
    assert line.lr_ratio(250 + round(middle)) == pytest.approx((1.3 * now + 0.01) / 2, rel=1e-3)
    assert line.lr_ratio(LONG - HALF) == pytest.approx(0.01)
    constant = base("constant").rewarmed(HALF, ratio=1.3, steps=250)
    assert [constant.lr_ratio(step) for step in (0, 125, 250, LONG - HALF)] == pytest.approx([1, 1.15, 1.3, 1.3])


def test_two_generations():
    first, second = LONG // 4, HALF
    growths = Rewarm(step=first, ratio=1.3, steps=250), Rewarm(step=second, ratio=1.5, steps=100)
    one, two = Schedules(base(), growths[:1]), Schedules(base(), growths)
    for step in (second + 1, second + 100, second + 5000, LONG - 1):
        assert two.lr_ratio(step) == base().lr_ratio(step)
        assert two.newer(step)[0] == one.newer(step)[0], "the second growth is none of the first's business"
    # Both start from the base curve, not from each other.
    assert two.newer(second + 100)[1] == pytest.approx(1.5 * base().lr_ratio(second))
    assert two.newer(second + 100)[1] != pytest.approx(1.5 * one.newer(second)[0], rel=0.1)
    assert (*two.newer(LONG), two.lr_ratio(LONG)) == pytest.approx((0.01, 0.01, 0.01))


def test_rewarming_all_entries():
    first, second, third = 10_000, 20_000, 30_000
    own = Rewarm(step=first, ratio=1.3, steps=250)
    everyone = Rewarm(step=second, ratio=1.2, steps=100, all_entries=True)
    schedules = Schedules(base(), (own, everyone, None))
    curve = base().rewarmed(second, ratio=1.2, steps=100)
    # Up to the second growth's step, as if there were none.
    assert schedules.lr_ratio(second) == base().lr_ratio(second)
    assert schedules.newer(second)[0] == base().rewarmed(first, ratio=1.3, steps=250).lr_ratio(second - first)
    for step in (second + 1, second + 100, third + 1, LONG):
        value = curve.lr_ratio(step - second)
        assert schedules.lr_ratio(step) == value
        # The third has no curve of its own: as age 0.
        assert schedules.newer(step) == (value, value, value)
    # A later growth for its own entries leaves the others on the common curve.
    later = Schedules(base(), (own, everyone, Rewarm(step=third, ratio=1.4, steps=10)))
    *common, new = later.lr_ratio(third + 10), *later.newer(third + 10)
    assert common == [curve.lr_ratio(third + 10 - second)] * 3
    assert new == pytest.approx(1.4 * base().lr_ratio(third))
    # Negative control: for new entries only, the others stay where they were.
    kept = Schedules(base(), (own, replace(everyone, all_entries=False), None))
    assert kept.lr_ratio(third) == base().lr_ratio(third) == kept.newer(third)[2]
    assert kept.newer(third)[0] != kept.newer(third)[1]


def test_a_run_that_never_grew():
    schedules = Schedules(base())
    assert schedules.newer(5) == ()
    assert schedules.lr_ratio(5) == base().lr_ratio(5)
