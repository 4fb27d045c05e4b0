"""Sensitive hyperparameters: the published definition on small tables made by hand."""

from __future__ import annotations

import math

import pytest

from pretrain.tuning.sensitivity import Sensitivity, Trial, find_sensitive, near_optimal

MARGIN = 6.4e-3


def cell(losses: dict[float, float], *, warmup: int = 1) -> list[Trial]:
    """Trials by learning rate."""
    return [Trial({"lr": lr, "warmup": warmup}, loss) for lr, loss in losses.items()]


def test_one_common_value_makes_a_key_insensitive():
    """The best value differs, but 2 is near-optimal in both; with a smaller margin it is not."""
    cells = {"small": cell({1: 3.010, 2: 3.004, 4: 3.000}), "large": cell({1: 2.5, 2: 2.505, 4: 2.6})}
    assert find_sensitive(cells, MARGIN) == {
        "lr": Sensitivity("lr", False, (2,)),
        "warmup": Sensitivity("warmup", False, (1,)),
    }
    strict = find_sensitive(cells, 3e-3)
    assert strict["lr"] == Sensitivity("lr", True, (4, 1))
    assert not strict["warmup"].sensitive


def test_of_several_common_values_the_best_is_named():
    cells = {"small": cell({1: 3.0, 2: 3.005}), "large": cell({1: 2.503, 2: 2.5})}
    assert find_sensitive(cells, MARGIN)["lr"].values == (1,)
    assert find_sensitive({**cells, "huge": cell({1: 2.306, 2: 2.3})}, MARGIN)["lr"].values == (2,)


def test_the_covering_set_is_the_smallest():
    """1, 2 and 4 cover three cells each; who takes 4 first needs three values, where 1 and 2 do."""
    near = {"a": (1, 3), "b": (1, 4), "c": (1,), "d": (2, 4), "e": (2, 4), "f": (2,)}
    cells = {name: cell(dict.fromkeys(values, 3.0) | {8: 4.0}) for name, values in near.items()}
    found = find_sensitive(cells, MARGIN)["lr"]
    assert (found.sensitive, set(found.values)) == (True, {1, 2})
    third = find_sensitive({**cells, "g": cell({3: 3.0})}, MARGIN)["lr"]
    assert set(third.values) == {1, 2, 3}


def test_a_value_counts_by_its_best_trial():
    """What is varied beside a key does not matter: near-optimal trials do."""
    trials = [Trial({"lr": 1, "wd": 0.1}, 3.0), Trial({"lr": 2, "wd": 0.0}, 3.5), Trial({"lr": 2, "wd": 0.1}, 3.001)]
    other = [Trial({"lr": 2, "wd": 0.1}, 2.0), Trial({"lr": 2, "wd": 0.0}, 2.001), Trial({"lr": 1, "wd": 0.1}, 2.1)]
    found = find_sensitive({"small": trials, "large": other}, MARGIN)
    assert found["lr"] == Sensitivity("lr", False, (2,))
    assert found["wd"] == Sensitivity("wd", False, (0.1,))


def test_values_need_not_be_numbers():
    cells = {
        "small": [Trial({"scale": "a", "on": True}, 3.0), Trial({"scale": "b", "on": False}, 4.0)],
        "large": [Trial({"scale": "b", "on": True}, 2.0)],
    }
    found = find_sensitive(cells, MARGIN)
    assert (found["scale"].values, found["on"].values) == (("a", "b"), (True,))


def test_diverged_trials_are_never_near_optimal():
    trials = cell({1: math.nan, 2: 3.0, 4: math.inf})
    assert [trial.settings["lr"] for trial in near_optimal(trials, 1e9)] == [2]
    assert [trial.settings["lr"] for trial in near_optimal(cell({1: 3.1, 2: 3.0}), 0.2)] == [2, 1]
    assert near_optimal(cell({1: math.inf}), MARGIN) == []


def test_the_margin_itself_is_outside():
    assert len(near_optimal(cell({1: 3.0, 2: 3.25}), 0.25)) == 1
    assert len(near_optimal(cell({1: 3.0, 2: 3.25}), 0.26)) == 2


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({}, "no cells"),
        ({"small": cell({1: 3.0}), "large": cell({1: math.inf})}, "finite loss: large"),
        ({"small": cell({1: 3.0}), "large": [Trial({"lr": 1}, 2.0)]}, "same keys"),
    ],
)
def test_what_cannot_be_judged_is_refused(cells: dict[str, list[Trial]], message: str):
    with pytest.raises(ValueError, match=message):
        find_sensitive(cells, MARGIN)
