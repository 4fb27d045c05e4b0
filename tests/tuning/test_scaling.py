"""Scaling laws of hyperparameters: the published predictions, laws made up, and what the data cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.config.published import published
from pretrain.tuning import scaling
from pretrain.tuning.scaling import Point, PowerLaw, fit, fit_logs

SIZE = 1_207_959_552  # of the models that were predicted for
RATIOS = (1, 2, 4, 8)
GRID = [(size, ratio) for size in (134_217_728, 301_989_888, 536_870_912) for ratio in RATIOS]

# Predictions for 1.2B at ratios 1, 2, 4, 8, as released with arXiv 2509.02046 (hyperparameters_fit_*.md), to 7 digits.
# Left out: AdamW's clipping, which is a tenth off (the settings released last are probably not those that were fitted);
# SOAP's warm-up, where the valley is so flat that MINPACK stops 2.5e-4 from there.
RELEASED = {
    ("adamw", "optim.lr"): (0.002903615, 0.002955908, 0.003008201, 0.003060494),
    ("adamw", "optim.weight_decay"): (0.1900558, 0.1780987, 0.1661411, 0.1541829),
    ("adamw", "schedule.warmup_steps"): (1045.438, 950.7105, 855.9920, 761.2821),
    ("adamw", "batch.global_batch_size"): (263.3136, 288.3892, 307.7556, 322.7125),
    ("nadamw", "optim.lr"): (0.004806796, 0.004398215, 0.003989657, 0.003581123),
    ("nadamw", "optim.beta1"): (0.9739493, 0.9770133, 0.9800772, 0.9831409),
    ("nadamw", "schedule.warmup_steps"): (4548.032, 4521.945, 4495.858, 4469.771),
    ("nadamw", "batch.global_batch_size"): (148.8974, 178.7146, 208.5253, 238.3294),
    ("muon", "optim.muon.lr"): (0.006303379, 0.006187234, 0.006090880, 0.006010946),
    ("muon", "optim.muon.momentum"): (0.9805789, 0.9805789, 0.9805789, 0.9805789),
    ("muon", "optim.clip_grad"): (1.798313, 1.900443, 2.002567, 2.104686),
    ("muon", "schedule.decay_fraction"): (0.9909104, 1.009852, 1.028793, 1.047733),
    ("muon", "batch.global_batch_size"): (183.0003, 218.6421, 254.2815, 289.9185),
    ("soap", "optim.soap.lr"): (0.007366336, 0.007366166, 0.007366150, 0.007366148),
    ("soap", "optim.soap.block_size"): (516.4629, 516.4648, 516.4658, 516.4664),
    ("soap", "optim.soap.shampoo_beta"): (0.9214190, 0.9214190, 0.9214190, 0.9214190),
    ("soap", "batch.global_batch_size"): (211.1943, 265.7324, 317.6603, 367.1031),
}


def published_points(kind: str, key: str) -> list[Point]:
    """The twelve cells up to 520M and ratio 8, by size and ratio."""
    cells = [cell for cell in published()[kind] if (cell.model_size, cell.ratio) in GRID]
    return [Point(cell.model_size, cell.ratio, float(cell.settings[key])) for cell in cells]


def predictions(law: PowerLaw) -> list[float]:
    return [law.predict(SIZE, ratio) for ratio in RATIOS]


def made_up(law: tuple[float, float, float, float], *, noise: float = 0.0) -> list[Point]:
    """Values of a law A N^B C^G + D at the twelve cells, scattered by a share of them."""
    a, b, g, d = law
    rng = np.random.default_rng(0)
    return [Point(n, c, (a * n**b * c**g + d) * float(np.exp(noise * rng.standard_normal()))) for n, c in GRID]


@pytest.mark.parametrize(("kind", "key"), RELEASED)
def test_released_predictions_to_four_digits(kind: str, key: str):
    """The study fitted points 2 to 11 of the twelve; it held the last out and lost the first."""
    points = published_points(kind, key)
    law = fit(points[1:-1])
    assert predictions(law) == pytest.approx(RELEASED[kind, key], rel=1e-4)
    # And none of them was determined by the data.
    assert not law.identifiable
    assert law.warning.startswith("not identifiable: ")
    assert len(law.warning.splitlines()) == 1


@pytest.mark.parametrize("points", [slice(None), slice(0, -1), slice(2, None)])
def test_other_points_give_other_predictions(points: slice):
    law = fit(published_points("adamw", "optim.lr")[points])
    assert predictions(law) != pytest.approx(RELEASED["adamw", "optim.lr"], rel=1e-2)


def test_the_published_law_of_adamw_is_a_straight_line():
    """Huge terms that cancel; the line through the logarithms predicts the same, and turns negative further out."""
    points = published_points("adamw", "optim.lr")[1:-1]
    law = fit(points)
    assert abs(law.b) < 1e-3
    assert law.a == pytest.approx(-law.d, rel=0.01)
    assert "straight line" in law.warning
    matrix = np.array([(1, np.log(point.model_size), np.log(point.ratio)) for point in points])
    line = np.linalg.lstsq(matrix, np.array([point.value for point in points]), rcond=None)[0]
    assert predictions(law) == pytest.approx([line @ (1, np.log(SIZE), np.log(c)) for c in RATIOS], rel=1e-3)
    assert law.predict(1e11, 1) < 0


LAWS = {
    "rate": (300.0, -0.5, -0.3, 0.002),
    "no offset": (30.0, -0.4, -0.2, 0.0),
    "no data": (30.0, -0.4, 0.0, 0.001),
    "steep": (3e4, -0.8, -0.4, 0.004),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_law_is_recovered_from_its_values(law: tuple[float, float, float, float]):
    found = fit(made_up(law))
    assert (found.a, found.b, found.g, found.d) == pytest.approx(law, rel=1e-4, abs=1e-7)
    assert (found.identifiable, found.warning) == (True, "")
    a, b, g, d = law
    assert found.predict(SIZE, 16) == pytest.approx(a * SIZE**b * 16**g + d, rel=1e-6)


def test_scatter_is_judged():
    assert fit(made_up(LAWS["rate"], noise=0.05)).identifiable
    assert not fit(made_up(LAWS["rate"], noise=0.2)).identifiable
    # Powers of two, as a grid has them.
    snapped = [Point(p.model_size, p.ratio, 2.0 ** round(np.log2(p.value))) for p in made_up(LAWS["rate"])]
    assert not fit(snapped).identifiable


def test_both_parts_of_the_judgement_count(monkeypatch: pytest.MonkeyPatch):
    line = published_points("adamw", "optim.lr")[1:-1]
    step = published_points("soap", "optim.soap.lr")[1:-1]
    assert "+-" in fit(step).warning
    monkeypatch.setattr(scaling, "LARGEST_EXPONENT_ERROR", np.inf)
    assert fit(step).identifiable
    assert not fit(line).identifiable
    monkeypatch.setattr(scaling, "MOST_CANCELLATION", np.inf)
    assert fit(line).identifiable


def test_too_little_to_fit():
    points = made_up(LAWS["rate"])
    exact = fit(points[:4])  # as many as parameters: passes through all of them, and who knows how well
    assert not exact.identifiable
    three = fit(points[:3])
    assert three.predict(1e12, 99) == pytest.approx(np.mean([point.value for point in points[:3]]))
    assert "3 points" in three.warning
    equal = fit(published_points("adamw", "optim.beta2"))
    assert (equal.predict(SIZE, 8), equal.identifiable) == (0.98, False)
    assert "all values are 0.98" in equal.warning
    with pytest.raises(ValueError, match="no points"):
        fit([])


def test_a_law_in_logarithms():
    points = [Point(n, c, 30.0 * n**-0.4 * c**-0.2) for n, c in GRID]
    law = fit_logs(points, grid_factor=1.0001)  # values known exactly leave the prior nothing to say
    assert law.slopes == pytest.approx((-0.4, -0.2), abs=1e-6)
    assert law.predict(SIZE, 8) == pytest.approx(30.0 * SIZE**-0.4 * 8**-0.2, rel=1e-6)
    coarse = fit_logs(points)
    assert -0.4 < coarse.slopes[0] < -0.3  # drawn towards 0
    low, high = coarse.interval(SIZE, 8)
    assert low < 30.0 * SIZE**-0.4 * 8**-0.2 < high
    with pytest.raises(ValueError, match="must be positive, but one is 0"):
        fit_logs([*points, Point(1e9, 1, 0.0)])


def test_a_slope_without_data_is_left_at_the_prior():
    """All cells of one size: no slope over size, and an interval that widens with the distance."""
    law = fit_logs([Point(1e8, c, 0.01 * c**-0.3) for c in RATIOS])
    assert law.slopes[0] == pytest.approx(0.0, abs=1e-12)
    widths = [high / low for low, high in (law.interval(size, 2) for size in (1e8, 1e9, 1e10))]
    assert widths[0] < widths[1] < widths[2]
    assert widths[2] > 10


def test_intervals_hold_what_they_promise():
    """Laws drawn from the prior, with scatter: the next cell lies in about 95 % of the intervals, and in the middle
    quarter of far fewer."""
    rng = np.random.default_rng(1)
    inside = in_the_middle = 0
    for _ in range(400):
        slopes = rng.normal(0, scaling.PRIOR_SLOPE, 2)
        logs = [slopes @ (np.log(n / 3e8), np.log(c)) + 0.3 * rng.standard_normal() for n, c in [*GRID, (SIZE, 8)]]
        law = fit_logs([Point(n, c, float(np.exp(log))) for (n, c), log in zip(GRID, logs[:-1], strict=True)])
        low, high = np.log(law.interval(SIZE, 8))
        inside += low <= logs[-1] <= high
        in_the_middle += abs(logs[-1] - (low + high) / 2) <= (high - low) / 8
    assert 0.90 < inside / 400 < 0.99
    assert in_the_middle / 400 < 0.55


def test_published_values_lie_in_the_interval_that_their_own_study_did_not_give():
    """At 1.2B it predicted 0.0029 for AdamW and 0.0063 for Muon, and ran 0.002 and 0.004, a step of its grid below."""
    for kind, key, used in (("adamw", "optim.lr", 0.002), ("muon", "optim.muon.lr", 0.004)):
        law = fit_logs(published_points(kind, key))
        low, high = law.interval(SIZE, 1)
        assert low < used < high
        assert high / low > 2  # more than a step of the grid: they had to be tried
