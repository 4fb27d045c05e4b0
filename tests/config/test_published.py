"""The published settings: that they are what was published, that our keys take them, and which suit a run."""

import math
from typing import get_args

import pytest

from pretrain.config import published as module
from pretrain.config.optim import Kind
from pretrain.config.published import data_ratio, published, rescaled, suggest, update_size
from pretrain.config.rules import check
from pretrain.optim.muon import muon_scale
from tests.helpers.configs import DENSE, make_config

CELLS = [cell for cells in published().values() for cell in cells]

# Runs of the study at a batch of 128 sequences and ratio 1, in steps; hidden size of its models, which have 32 layers.
STEPS = {"130m": 5_120, "300m": 11_520, "520m": 20_480, "1.2b": 46_080}
HIDDEN = {"130m": 512, "300m": 768, "520m": 1024, "1.2b": 1536}


def test_every_cell_of_the_study_is_there():
    counts = {kind: len(cells) for kind, cells in published().items()}
    four_sizes, three_sizes = 4 * 4 + 2, 3 * 4
    assert counts == {
        **dict.fromkeys(("adamw", "nadamw", "muon", "soap"), four_sizes),
        **dict.fromkeys(("mars", "cautious", "lion", "adam_mini", "scion", "kron"), three_sizes),
        "sophia": 6,
        **dict.fromkeys(("muonh", "adamh"), 4),
    }
    assert len({(cell.kind, cell.size, cell.ratio) for cell in CELLS}) == len(CELLS)
    assert sum(cell.loss is not None for cell in CELLS) == 150
    for cell in CELLS:
        hidden = HIDDEN[cell.size]
        assert cell.model_size == 32 * (3 * hidden * 4 * hidden + 4 * hidden**2)
        assert cell.steps == STEPS[cell.size] * cell.ratio * 128 // cell.settings["batch.global_batch_size"]


def test_losses_fall_with_size_and_data():
    """Holds in all of the published table, and would hardly survive a misplaced digit."""
    losses = {(cell.kind, cell.model_size, cell.ratio): cell.loss for cell in CELLS if cell.loss is not None}
    pairs = [(one, two) for one in losses for two in losses if one != two and one[0] == two[0]]
    larger = [(one, two) for one, two in pairs if one[1] <= two[1] and one[2] <= two[2]]
    assert len(larger) > 500
    assert all(losses[one] > losses[two] for one, two in larger)
    assert not all(losses[one] > losses[two] for one, two in pairs)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_settings_that_its_configuration_takes(kind: str):
    for cell in published()[kind]:
        steps = {"optim.kind": kind, "budget.steps": cell.steps}
        assert check(make_config(DENSE, {**cell.settings, **steps}), 1) == []
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        make_config(DENSE, {"optim.no_such_key": 1})


@pytest.mark.parametrize(
    ("kind", "size", "ratio", "expected"),
    [
        ("adamw", 134_217_728, 1, ("130m", 1)),
        # Between 134M and 302M by logarithms lies 201M; the mean would be 218M.
        ("adamw", 200e6, 1, ("130m", 1)),
        ("adamw", 203e6, 1, ("300m", 1)),
        ("adamw", 1.2e9, 2.9, ("1.2b", 4)),
        ("adamw", 1.2e9, 16, ("1.2b", 8)),
        ("lion", 1.2e9, 1, ("520m", 1)),
        ("sophia", 536e6, 8, ("130m", 8)),
        ("muonh", 300e6, 8, ("300m", 1)),
    ],
)
def test_the_nearest_cell_is_suggested(kind: str, size: float, ratio: float, expected: tuple[str, int]):
    cell = suggest(kind, size, ratio).cell
    assert (cell.kind, cell.size, cell.ratio) == (kind, *expected)


def test_values_by_hand():
    muon = suggest("muon", 134_217_728, 1).cell
    assert muon.settings["optim.muon.lr"] == 0.016
    assert muon.settings["optim.lr"] == 0.0032  # a fifth of it, and no digits more
    assert (muon.settings["schedule.warmup_steps"], muon.settings["schedule.decay_fraction"]) == (0, 0.8)
    assert (muon.batch_tokens, muon.loss) == (524_288, 3.4626)
    assert suggest("muonh", 134_217_728, 1).cell.settings["optim.hyperball.lr"] == 0.02
    assert suggest("kron", 134_217_728, 1).cell.settings["optim.kron.normalize_gradients"] is True
    with pytest.raises(KeyError):
        suggest("sgd", 1e9, 1)


def test_far_from_what_was_published_is_said():
    assert suggest("adamw", 100e6, 0.6).warnings == ()
    assert suggest("adamw", 2.4e9, 31).warnings == ()
    (small,) = suggest("adamw", 100e3, 1).warnings
    sweep = "a place to start a sweep from, no more"
    assert small == f"the model is 1,342 times smaller than any tuned (130m): {sweep}"
    large, long = suggest("adamw", 100e9, 100).warnings
    assert "83 times larger than any tuned (1.2b)" in large
    assert "the data ratio is 6.2 times higher than any tuned (16x)" in long
    assert len(suggest("lion", 2.4e9, 1).warnings) == 1  # was not run at 1.2b


def test_far_is_by_the_stated_factor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FAR", 1.1)
    assert len(suggest("adamw", 100e6, 0.6).warnings) == 2


def test_rates_of_muon_are_converted_between_scales():
    settings = suggest("muon", 536_870_912, 1).cell.settings
    moonshot = rescaled(settings, "muon", scale="moonshot", hidden_size=1024)
    # By hand: 0.2 sqrt(1024) = 6.4.
    assert moonshot["optim.muon.lr"] == pytest.approx(8e-3 / 6.4)
    assert moonshot["optim.weight_decay"] == pytest.approx(0.64)
    assert moonshot["optim.lr"] == settings["optim.lr"]
    assert rescaled(moonshot, "muon", scale="keller_jordan", hidden_size=1024) == pytest.approx(settings)
    # The update and the decay of a square matrix stay as they are, by the optimizer's own scale.
    for scale in ("moonshot", "keller_jordan", "spectral"):
        other = rescaled(settings, "muon", scale=scale, hidden_size=1024)
        update = other["optim.muon.lr"] * muon_scale(scale, 1024, 1024)
        assert update == pytest.approx(8e-3 * muon_scale("keller_jordan", 1024, 1024))
        assert other["optim.muon.lr"] * other["optim.weight_decay"] == pytest.approx(8e-4)
        assert update_size(scale, 768) == pytest.approx(muon_scale(scale, 768, 768))
    assert settings["optim.muon.lr"] * muon_scale("moonshot", 1024, 1024) > 6 * 8e-3  # without a conversion


def test_data_ratio():
    assert data_ratio(20 * 7e6 * 3, 7e6) == 3
    assert math.isclose(data_ratio(2.68e9, 134_217_728), 1, rel_tol=2e-3)
