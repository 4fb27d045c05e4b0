"""The report of the study on made-up results: text, table and pictures say what the numbers say."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pretrain.studies.arms import ARMS
from pretrain.studies.claims import CLAIMS
from pretrain.studies.pictures import draw_curves, draw_final_losses
from pretrain.studies.report import Study, markdown, summary, to_json
from pretrain.studies.results import Outcome, Point
from tests.studies.synthetic import SEEDS, synthetic_study


def with_losses(study: Study, name: str, change: float) -> Study:
    """The study with one arm's losses moved."""
    moved = [dataclasses.replace(one, loss=one.loss + change) for one in study.outcomes[name]]
    return dataclasses.replace(study, outcomes={**study.outcomes, name: moved})


def row(text: str, name: str) -> list[str]:
    """Cells of the line of an arm in its family's table."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | ") and "`mlp" not in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_arms() -> None:
    study = synthetic_study()
    text = markdown(study)
    losses = [one.loss for one in study.outcomes["width-full"]]
    _, label, loss, bits, closed, flops, growth = row(text, "width-full")
    assert label == "copy-copy, asymmetric, re-warm"
    assert loss == f"{np.mean(losses):.4f} +- {np.std(losses, ddof=1):.4f}"
    assert bits == f"{sum(losses) / 6:.3f}"
    assert closed.startswith("90% +- ")  # (3.00 - 2.48) / (3.00 - 2.42)
    assert (flops, growth) == ("2e+12", "at 4/8: 3.500 -> 3.600")
    assert row(text, "small")[4:] == ["-", "2e+12", "-"]
    assert all(row(text, arm.name)[1] == arm.label for arm in ARMS)


def test_summary_follows_the_numbers() -> None:
    study = synthetic_study()
    assert f"**Reproduced** ({len(CLAIMS)} of {len(CLAIMS)})" in summary(study)
    claim = next(claim for claim in CLAIMS if claim.second == "width-copied")
    opposite = summary(with_losses(study, "width-copied", -1.0))
    line = next(line for line in opposite.splitlines() if "**Not reproduced** (1 of " in line)
    assert claim.text in line
    assert f"**Reproduced** ({len(CLAIMS) - 1} of {len(CLAIMS)})" in opposite


def test_without_a_gap_none_is_closed() -> None:
    worse = with_losses(synthetic_study(), "width-scratch", 1.0)
    assert row(markdown(worse), "width-full")[4] == "-"
    assert "that the full method closes: -." in summary(worse)


def test_one_seed_is_said_to_resolve_nothing() -> None:
    study = synthetic_study()
    single = dataclasses.replace(study, outcomes={name: found[:1] for name, found in study.outcomes.items()})
    assert f"**Not resolved** ({len(CLAIMS)} of {len(CLAIMS)})" in summary(single)
    assert "One seed has no spread" in markdown(single)
    assert to_json(single)["claims"][0]["interval"] is None


def test_locked_twins_are_told_from_free_ones() -> None:
    study = synthetic_study()
    assert "copies still: `width-copied`, `width-dropped`, `experts-exact`. Apart: `width-full`, " in markdown(study)

    def freed(one: Outcome) -> Outcome:
        return dataclasses.replace(one, twins=study.outcomes["width-full"][0].twins)

    # One seed that is apart is enough.
    first, *rest = study.outcomes["width-copied"]
    changed = dataclasses.replace(study, outcomes={**study.outcomes, "width-copied": [freed(first), *rest]})
    assert "copies still: `width-dropped`, `experts-exact`. Apart: " in markdown(changed)


def test_the_sweep_names_the_best_rate_and_doubts_an_edge() -> None:
    study = synthetic_study()
    text = markdown(study)
    assert "| small model | 3.2000 | - | - | - | **3.1000** | 3.3000 |" in text
    assert "Best at an end" not in text
    edge = dataclasses.replace(study, sweep={**study.sweep, "depth": {2.5e-3: 3.0, 6e-3: 3.1}})
    assert "a better one may lie beyond: twice the layers." in markdown(edge)


def test_json_holds_every_seed_and_verdict() -> None:
    values = json.loads(json.dumps(to_json(synthetic_study()), allow_nan=False))
    assert set(values["arms"]) == {arm.name for arm in ARMS}
    assert [one["seed"] for one in values["arms"]["width-full"]["seeds"]] == list(SEEDS)
    assert len(values["claims"]) == len(CLAIMS)
    assert values["claims"][0]["interval"][0] > 0


def test_pictures_show_every_arm() -> None:
    study = synthetic_study()
    figure = draw_final_losses(study.losses)
    labels = [text.get_text() for ax in figure.axes for text in ax.get_yticklabels()]
    assert [labels.count(arm.label) >= 1 for arm in ARMS] == [True] * len(ARMS)
    (line, *_) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(SEEDS)]
    assert sorted(line.get_xdata()) == pytest.approx(sorted(study.losses["small"].values()))


def test_curves_are_means_over_seeds() -> None:
    tokens = [100, 400, 600, 800]
    points = [[Point(n, 10.0 * n, 3.0 + shift - n / 1000) for n in tokens] for shift in (0.0, 0.2)]
    figure = draw_curves({arm.name: points for arm in ARMS})
    over_tokens, over_flops = figure.axes
    (line, *_) = over_tokens.lines
    assert list(line.get_xdata()) == tokens[1:]  # What comes before 40 % of the tokens is left out.
    assert list(line.get_ydata()) == pytest.approx([2.7, 2.5, 2.3])
    assert list(over_flops.lines[0].get_xdata()) == [4000.0, 6000.0, 8000.0]
