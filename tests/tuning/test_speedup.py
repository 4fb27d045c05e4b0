"""Token speed-ups: the published ones from the published losses, curves made up, and the command on run directories."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config.load import dump_config
from pretrain.errors import UserError
from pretrain.model.counts import count_parameters
from pretrain.tuning.speedup import THRESHOLD, LossCurve, Result, SizeSpeedUps, fit_curve, speed_ups
from pretrain.tuning.speedup_command import published_results, read_results, table
from tests.helpers.configs import DENSE, MOE, make_config

SIZES = {"130M": 134_217_728, "300M": 301_989_888, "520M": 536_870_912, "1.2B": 1_207_959_552}

# By the released script of arXiv 2509.02046 from its losses: at 1x, 2x, 4x, 8x and, where it was run, 16x.
SPEED_UPS = {
    ("130M", "muon"): (1.43, 1.34, 1.31, 1.30, 1.35),
    ("130M", "soap"): (1.28, 1.29, 1.31, 1.30, 1.38),
    ("130M", "kron"): (1.22, 1.17, 1.20, 1.28),
    ("130M", "scion"): (1.34, 1.26, 1.22, 1.17),
    ("130M", "nadamw"): (0.99, 1.12, 1.05, 1.11, 1.16),
    ("130M", "mars"): (0.96, 1.11, 1.01, 1.15),
    ("130M", "cautious"): (0.98, 1.06, 0.95, 1.09),
    ("130M", "lion"): (0.90, 1.01, 0.94, 1.08),
    ("130M", "adam_mini"): (0.93, 0.97, 0.95, 0.92),
    ("300M", "muon"): (1.30, 1.21, 1.18, 1.20, 1.27),
    ("300M", "soap"): (1.22, 1.17, 1.14, 1.18, 1.30),
    ("300M", "kron"): (1.14, 1.13, 1.13, 1.16),
    ("300M", "scion"): (1.22, 1.14, 1.10, 1.07),
    ("300M", "nadamw"): (1.10, 1.05, 1.04, 1.03, 1.08),
    ("300M", "mars"): (1.10, 1.08, 0.99, 1.04),
    ("520M", "muon"): (1.30, 1.23, 1.23, 1.24),
    ("520M", "soap"): (1.22, 1.20, 1.23, 1.27),
    ("520M", "kron"): (1.17, 1.14, 1.20, 1.24),
    ("520M", "scion"): (1.21, 1.17, 1.12, 1.15),
    ("520M", "nadamw"): (1.09, 1.10, 1.07, 1.09),
    ("520M", "mars"): (1.04, 1.09, 1.09, 1.12),
    ("1.2B", "muon"): (1.18, 1.12, 1.13, 1.10),
    ("1.2B", "soap"): (1.06, 1.09, 1.08, 1.09),
    ("1.2B", "nadamw"): (1.02, 1.04, 1.04, 1.09),
}

# At 8x for 130M, 300M, 520M, 1.2B, with curves through 1x to 8x alone.
SPEED_UPS_TO_8X = {
    "muon": (1.41, 1.26, 1.24, 1.10),
    "soap": (1.41, 1.24, 1.27, 1.09),
    "kron": (1.38, 1.21, 1.24),
    "nadamw": (1.18, 1.06, 1.09, 1.09),
    "mars": (1.22, 1.08, 1.12),
}

# a, b, c of the baseline's curves: with 16x, and up to 8x.
CURVES = {
    ("130M", 16): (0.455, 0.435, 3.073),
    ("130M", 8): (0.418, 0.495, 3.111),
    ("300M", 16): (0.371, 0.438, 2.892),
    ("300M", 8): (0.350, 0.477, 2.913),
    ("520M", 16): (0.342, 0.397, 2.763),
    ("1.2B", 16): (0.239, 0.485, 2.665),
}


def published(up_to: float = 16, baseline: str = "adamw") -> dict[str, SizeSpeedUps]:
    results = [result for result in published_results() if result.ratio <= up_to]
    return dict(zip(SIZES, speed_ups(results, baseline=baseline), strict=True))


def factors(size: SizeSpeedUps, optimizer: str) -> list[float]:
    return [row.factor for row in size.rows if row.optimizer == optimizer]


def test_published_speed_ups():
    sizes = published()
    assert {name: size.model_size for name, size in sizes.items()} == SIZES
    for (name, optimizer), expected in SPEED_UPS.items():
        assert factors(sizes[name], optimizer) == pytest.approx(expected, abs=0.01)
    to_8x = published(up_to=8)
    for optimizer, expected in SPEED_UPS_TO_8X.items():
        at_8x = [
            row.factor for size in to_8x.values() for row in size.rows if (row.optimizer, row.ratio) == (optimizer, 8)
        ]
        assert at_8x == pytest.approx(expected, abs=0.01)
    # The point at 16x matters, and so does the baseline.
    assert factors(to_8x["130M"], "muon")[3] - factors(sizes["130M"], "muon")[3] > 0.1
    assert factors(published(baseline="nadamw")["130M"], "muon") != pytest.approx(SPEED_UPS["130M", "muon"], abs=0.05)


def test_published_curves():
    """To what the rounding of the losses to four decimals allows: half a digit of each moves b by up to 2e-3."""
    for (name, up_to), expected in CURVES.items():
        curve = published(up_to)[name].curve
        assert (curve.a, curve.b, curve.c) == pytest.approx(expected, abs=2e-3)
    assert max(size.curve.residual for size in published().values()) == pytest.approx(3.4e-3, abs=5e-5)


def test_published_resolution():
    """An error of 3e-3 in a loss at 8x moves the speed-up by 4 to 5 %, at 1.2B by 7 %."""
    shares = {name: size.curve.resolution(8, 3e-3) for name, size in published().items()}
    assert shares == pytest.approx({"130M": 0.037, "300M": 0.046, "520M": 0.050, "1.2B": 0.071}, abs=1e-3)
    # Against a difference: the same loss less a small error.
    curve = published()["520M"].curve
    moved = curve.data_for(curve.loss(8) - 1e-6) / 8 - 1
    assert moved == pytest.approx(curve.resolution(8, 1e-6), rel=1e-3)


CURVE = LossCurve(a=0.5, b=0.4, c=2.0, ratios=(1, 2, 4, 8), residual=0.0)


def made_up(optimizer: str, *, factor: float, ratios: tuple[float, ...] = (1, 2, 4, 8)) -> list[Result]:
    """An optimizer that needs `factor` times fewer tokens."""
    return [Result(optimizer, 1e8, ratio, CURVE.loss(factor * ratio)) for ratio in ratios]


def test_a_known_factor_is_found():
    (size,) = speed_ups([*made_up("muon", factor=1.5), *made_up("adamw", factor=1), *made_up("lion", factor=0.5)])
    assert (size.curve.a, size.curve.b, size.curve.c) == pytest.approx((0.5, 0.4, 2.0), rel=1e-6)
    assert [row.optimizer for row in size.rows[::4]] == ["adamw", "muon", "lion"]
    assert factors(size, "muon") == pytest.approx([1.5] * 4, rel=1e-6)
    assert factors(size, "lion") == pytest.approx([0.5] * 4, rel=1e-6)
    # 12 times the data at 8x, and half of it at 1x, is more and less than the baseline had.
    marks = {
        name: [row.extrapolated for row in size.rows if row.optimizer == name] for name in ("adamw", "muon", "lion")
    }
    assert marks == {"adamw": [False] * 4, "muon": [False] * 3 + [True], "lion": [True] + [False] * 3}
    assert size.rows[0].effective_ratio == pytest.approx(1)


def test_the_curve_does_not_depend_on_order_or_unit():
    ratios = [100.0, 400.0, 200.0, 800.0]
    curve = fit_curve(ratios, [CURVE.loss(ratio / 100) for ratio in ratios])
    assert (curve.b, curve.c) == pytest.approx((0.4, 2.0), rel=1e-6)
    assert curve.data_for(CURVE.loss(3)) == pytest.approx(300, rel=1e-6)
    assert curve.ratios == (100, 200, 400, 800)


def test_a_loss_below_the_floor_is_never_reached():
    (size,) = speed_ups([*made_up("adamw", factor=1), Result("soap", 1e8, 8, 1.99)])
    row = size.rows[-1]
    assert (row.factor, row.extrapolated) == (math.inf, True)
    assert "never" in table(size)
    (reached,) = speed_ups([*made_up("adamw", factor=1), Result("soap", 1e8, 8, 2.01)])
    assert "never" not in table(reached)


def test_the_best_run_of_a_cell_counts():
    """Also when its budget was rounded to other batches; a budget that differs in earnest is a cell of its own."""
    results = [*made_up("adamw", factor=1), *made_up("muon", factor=1.5)]
    worse = [replace(result, loss=result.loss + 0.1, ratio=result.ratio * 1.01) for result in results]
    assert factors(speed_ups([*worse, *results])[0], "muon") == pytest.approx([1.5] * 4, rel=1e-6)
    other = [replace(result, loss=result.loss + 0.1, ratio=result.ratio * 1.2) for result in results]
    assert len(factors(speed_ups([*other, *results])[0], "muon")) == 8


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (made_up("adamw", factor=1, ratios=(1, 2)), "at 100M parameters it has runs on 2 numbers of tokens, but its"),
        (made_up("muon", factor=1), "--baseline adamw: at 100M parameters it has runs on 0 numbers"),
        (
            [Result("adamw", 1e8, ratio, 3.0) for ratio in (1, 2, 4)],
            "a loss that does not fall with data (3.0000 to 3.0000)",
        ),
    ],
)
def test_a_baseline_that_allows_no_curve_is_refused(results: list[Result], message: str):
    with pytest.raises(UserError) as caught:
        speed_ups(results)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_three_points_are_enough():
    curve = fit_curve([1, 2, 4], [CURVE.loss(ratio) for ratio in (1, 2, 4)])
    assert curve.loss(8) == pytest.approx(CURVE.loss(8), rel=1e-6)


def write_run(folder: Path, kind: str, steps: int, loss: float | None, *, base=DENSE, done: int | None = None) -> Path:
    """A run directory of `steps` steps, `done` of which are done and validated last with this loss."""
    config = make_config(base, {"optim.kind": kind, "budget.steps": steps, "run.directory": str(folder)})
    done = steps if done is None else done
    tokens = done * config.batch.tokens_per_step
    rows = [
        {"kind": "train", "step": done, "tokens": tokens, "loss": 9.0},
        {"kind": "valid", "step": done // 2, "tokens": tokens // 2, "valid_loss": 1.0},
        {"kind": "valid", "step": done, "tokens": tokens, "valid_loss": loss},
    ]
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_runs(folder: Path) -> list[Path]:
    """AdamW at 1, 2 and 4 times 100 steps, and Muon, twice as fast, at 1 and 2 times."""
    adamw = [write_run(folder / f"adamw-{n}", "adamw", 100 * n, CURVE.loss(n)) for n in (1, 2, 4)]
    muon = [write_run(folder / f"muon-{n}", "muon", 100 * n, CURVE.loss(2 * n)) for n in (1, 2)]
    return [*adamw, *muon]


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = list(map(str, write_runs(tmp_path / "runs")))
    out = tmp_path / "out"
    assert cli.main(["speedup", *runs, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    size = count_parameters(make_config(DENSE).model).non_embedding
    ratios = [f"{n * 100 * 256 / (20 * size):.3g}x" for n in (1, 2, 4)]
    assert lines[1:4] == [["speed-up", *ratios], ["adamw", "1.00", "1.00", "1.00"], ["muon", "2.00", "2.00", "-"]]
    assert f"an error of {THRESHOLD:g} in a loss" in text
    assert text.splitlines()[-1] == f"picture: {out / 'speedup.png'}"
    assert (out / "speedup.png").read_bytes().startswith(b"\x89PNG")

    assert cli.main(["speedup", *runs, "--out", str(out), "--json", "--baseline", "adamw"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [row["speed_up"] for row in found["rows"] if row["optimizer"] == "muon"] == pytest.approx([2, 2], rel=1e-5)
    assert found["model_size"] == size


def test_the_command_shows_the_published_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["speedup", "--published", "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [size["model_size"] for size in found] == list(SIZES.values())
    assert sum(len(size["rows"]) for size in found) == 150


def test_what_cannot_be_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    runs = write_runs(tmp_path)
    bad = {
        "unfinished": write_run(tmp_path / "unfinished", "muon", 400, 2.0, done=399),
        "no validation": write_run(tmp_path / "unseen", "muon", 400, 2.0),
    }
    metrics = bad["no validation"] / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    messages = {
        "unfinished: not finished, at step 399 of 400": [*runs, bad["unfinished"]],
        "unseen: no validation at its end": [*runs, bad["no validation"]],
        "needs 3": runs[1:],
        "give run directories, or --published": [],
        "no such run directory": [tmp_path / "absent"],
    }
    for message, given in messages.items():
        assert cli.main(["speedup", *map(str, given), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

    diverged = write_run(tmp_path / "diverged", "muon", 400, None)
    with caplog.at_level(logging.WARNING):
        assert len(read_results([*runs, diverged])) == len(runs)
    assert f"{diverged}: diverged, left out" in caplog.text


def test_experts_count_as_far_as_they_are_active(tmp_path: Path):
    (result,) = read_results([write_run(tmp_path / "moe", "adamw", 100, 3.0, base=MOE)])
    counts = count_parameters(make_config(MOE).model)
    assert result.model_size == counts.active_non_embedding < counts.non_embedding
    assert result.ratio == pytest.approx(100 * 256 / (20 * counts.active_non_embedding))
