"""Learning-rate schedules against torch and transformers, and at their ends."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from pretrain.config.schema import ScheduleConfig
from pretrain.optim.schedule import Schedule

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


def test_curve_that_starts_in_the_middle_of_a_run():
    # From the rate a run has come to, up to 1.3 times it, then a full cosine to the run's own end: SPARKLING,
    # arXiv 2602.02472, equations 25 to 28, with its run length and warm-up.
    total, at = 63_578, 31_789
    base = Schedule("cosine", total_steps=total, warmup_steps=round(0.03 * total), end=0.01)
    now = base.lr_ratio(at)
    assert now == pytest.approx(0.529, abs=5e-4)
    later = Schedule("cosine", total_steps=total - at, warmup_steps=250, start=now, peak=1.3 * now, end=base.end)
    assert later.lr_ratio(0) == now
    assert later.lr_ratio(250) == pytest.approx(1.3 * now)
    assert later.lr_ratio(total - at) == pytest.approx(base.lr_ratio(total))
    # Ratio to the base rate along the rest of the run, worked out from the equations apart from this code.
    for share, ratio in {0.504: 1.31, 0.6: 1.69, 0.75: 2.16, 0.85: 2.26, 0.95: 1.63}.items():
        step = round(share * total)
        assert later.lr_ratio(step - at) / base.lr_ratio(step) == pytest.approx(ratio, abs=6e-3)
