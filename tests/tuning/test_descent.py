"""Coordinate descent on made-up losses: what it finds, what it misses, and how many runs it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from pretrain.tuning import descent
from pretrain.tuning.descent import Settings, changed, descend, neighbours, settings_of

D1 = 3e-3
GRID = {"lr": [1, 2, 4, 8, 16], "decay": [0.0, 0.1, 0.2], "beta": [0.9, 0.95, 0.98], "kind": ["cosine", "linear"]}
START = settings_of({"lr": 1, "decay": 0.0, "beta": 0.9, "kind": "cosine"})


class Losses:
    """A loss function that counts, and refuses to be asked twice."""

    def __init__(self, loss: Callable[..., float]) -> None:
        self.loss = loss
        self.asked: list[Settings] = []

    def __call__(self, wanted: Sequence[Settings]) -> dict[Settings, float]:
        assert not {*wanted} & {*self.asked}
        assert len({*wanted}) == len(wanted) > 0
        self.asked += wanted
        return {one: self.loss(**dict(one)) for one in wanted}


def separable(*, lr: float, decay: float, beta: float, kind: str) -> float:
    """Lowest at lr 8, decay 0.1, beta 0.95, linear."""
    return 3 + 0.1 * (math.log2(lr) - 3) ** 2 + (decay - 0.1) ** 2 + 4 * (beta - 0.95) ** 2 + 0.02 * (kind == "cosine")


def coupled(*, x: int, y: int) -> float:
    """A valley along x = y that falls by 0.004 a step, crossing which costs 0.002: one step of one of them alone gains
    0.002, of both 0.008. Lowest at the end of the valley."""
    return 0.002 * (x - y) ** 2 - 0.004 * (x + y)


def test_finds_the_optimum_of_a_separable_loss() -> None:
    losses = Losses(separable)
    found = descend(START, GRID, losses, threshold=D1)
    best = settings_of({"lr": 8, "decay": 0.1, "beta": 0.95, "kind": "linear"})
    assert (found.best, found.loss) == (best, 3.0)
    # The largest gain first.
    assert found.baselines[:3] == (START, changed(START, {"lr": 8}), changed(START, {"lr": 8, "kind": "linear"}))
    assert found.baselines[-1] == found.baseline
    assert found.losses.keys() == {*losses.asked}
    assert len(losses.asked) < math.prod(map(len, GRID.values())) / 2
    # Nothing beside the last baseline is better by more than the threshold, and all of it was tried.
    beside = [found.losses[one] for one in neighbours(found.baseline, GRID)]
    assert min(beside) >= found.losses[found.baseline] - D1

    # Negative control: nothing is gained where no gain is large enough.
    stuck = descend(START, GRID, Losses(separable), threshold=10.0)
    assert (stuck.baseline, len(stuck.losses)) == (START, 10)


def test_number_of_runs() -> None:
    """By hand: what is beside an earlier baseline, too, was tried already."""
    grid = {"x": range(5), "y": range(4)}
    losses = Losses(lambda x, y: (x - 3) ** 2 + 0.1 * (y - 2) ** 2)
    found = descend(settings_of({"x": 0, "y": 0}), grid, losses, threshold=D1)
    assert found.baselines == tuple(settings_of({"x": x, "y": y}) for x, y in ((0, 0), (3, 0), (3, 2)))
    assert len(losses.asked) == (1 + 4 + 3) + 3 + 3
    assert found.loss == 0


def test_stops_early_where_two_keys_must_change_together() -> None:
    """The method's limit: with the threshold it never leaves the start, though the optimum is 0.032 below."""
    grid, start = {"x": range(5), "y": range(5)}, settings_of({"x": 0, "y": 0})
    found = descend(start, grid, Losses(coupled), threshold=D1)
    assert found.baseline == start
    assert found.loss == coupled(x=1, y=0)
    # Negative control: it is the threshold that stops it.
    assert descend(start, grid, Losses(coupled), threshold=1e-5).best == settings_of({"x": 4, "y": 4})


def nearly_as_good(*, a: int, b: int, c: int) -> float:
    """b = 1 is best, a = 5 is within the threshold of it."""
    return 1 - 0.02 * b - 0.0195 * (a == 5) + (0.1 if a == 5 and b else 0) + 0.01 * c


def test_prefers_a_near_best_baseline_that_saves_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, start = {"a": range(13), "b": (0, 1), "c": (0, 1)}, settings_of({"a": 0, "b": 0, "c": 0})
    # Beside b = 1 the 12 other values of a, and c, are new: 13 runs. Beside a = 5 it is b and c: 2.
    losses = Losses(nearly_as_good)
    found = descend(start, grid, losses, threshold=D1)
    assert found.baselines == (start, changed(start, {"a": 5}))
    assert len(losses.asked) == (1 + 12 + 1 + 1) + 2
    assert found.best == changed(start, {"b": 1})

    # Negative control: where 11 are too few to switch, the best one it is.
    monkeypatch.setattr(descent, "SWITCH_SAVES", 12)
    dear = Losses(nearly_as_good)
    assert descend(start, grid, dear, threshold=D1).baselines == (start, changed(start, {"b": 1}))
    assert len(dear.asked) == (1 + 12 + 1 + 1) + 13


@pytest.mark.parametrize("failed", [math.inf, math.nan])
def test_what_failed_never_wins(failed: float) -> None:
    def fails_below(*, lr: int, **rest: float | str) -> float:
        return failed if lr in (1, 8) else separable(lr=lr, **rest)

    found = descend(START, GRID, Losses(fails_below), threshold=D1)
    assert dict(found.best) in [{"lr": lr, "decay": 0.1, "beta": 0.95, "kind": "linear"} for lr in (4, 16)]
    assert found.losses[START] == math.inf


def test_ends_when_nothing_works() -> None:
    found = descend(START, GRID, Losses(lambda **_: math.inf), threshold=D1)
    assert (found.loss, found.baseline, len(found.losses)) == (math.inf, START, 10)


def test_what_is_not_allowed_is_never_run() -> None:
    losses = Losses(separable)
    found = descend(START, GRID, losses, threshold=D1, allowed=lambda one: dict(one)["lr"] not in (1, 8))
    assert {dict(one)["lr"] for one in losses.asked} == {2, 4, 16}
    assert found.loss == pytest.approx(3.1)
    # Negative control: nothing is left.
    assert descend(START, GRID, Losses(separable), threshold=D1, allowed=lambda _: False).loss == math.inf
