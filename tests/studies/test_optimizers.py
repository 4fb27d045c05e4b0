"""The study of optimizers with made-up losses: what it trains, that nothing is trained twice, and that every verdict,
table and picture follows from the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.config.load import load_config
from pretrain.model.counts import count_parameters
from pretrain.signals import DONE, REQUEUE
from pretrain.studies.optimizers import command, protocol
from pretrain.studies.optimizers.cases import (
    FIRST,
    FULL,
    HALF,
    LARGER,
    LONGEST,
    MOE,
    MUON_ROUTER,
    SCALED,
    SMALL_DECAY,
    START,
    UNDERTUNED,
    Case,
    Study,
)
from pretrain.studies.optimizers.claims import CLAIMS, judge, mean_speed_ups
from pretrain.studies.optimizers.pictures import draw_flip, draw_losses
from pretrain.studies.optimizers.report import markdown, summary, to_json
from pretrain.studies.optimizers.sensitive import one_offs, sensitive_rates
from pretrain.tuning.ledger import open_ledger
from pretrain.tuning.sweep import Budget
from tests.helpers.runs import make_corpus
from tests.studies.optimizer_runs import HALVED, LEAD, Trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "studies"
SEEDS = 3
WARMUP = "schedule.warmup_steps"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's files with a small corpus."""
    folder = tmp_path_factory.mktemp("optimizers")
    corpus = make_corpus(folder)
    for path in CONFIGS.glob("optimizers*.toml"):
        (folder / path.name).write_text(path.read_text().replace("runs/demo-data", str(corpus)))
    return folder / "optimizers.toml"


@pytest.fixture(scope="module")
def done(file: Path) -> tuple[Path, Study]:
    """A whole study: its folder, and what it found, read again from its ledger."""
    out, trainer = file.parent / "out", Trainer()
    assert command.optimizer_study(seeds=SEEDS, out=out, jobs=4, file=file, train=trainer) == DONE
    assert len({*trainer.trained}) == len(trainer.trained) == len(ledger(out))
    again = Trainer()
    study = conduct(file, out, again)
    assert again.trained == []
    assert markdown(study) == (out / "README.md").read_text()
    return out, study


def conduct(file: Path, out: Path, trainer: Trainer, *, seeds: int = SEEDS) -> Study:
    """The study without its report."""
    sweep = protocol.load_study(file, out, quick=False)
    words = ["pretrain", "study", "optimizers", "--seeds", str(seeds)]
    with open_ledger(out, writing=True) as rows, ThreadPoolExecutor(4) as pool:
        lab = protocol.Lab(rows, pool, Budget(), trainer, 4)
        return command.conduct(sweep, lab, seeds=range(1, seeds + 1), quick=False, command=words)


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


def moved(study: Study, cases: list[Case], change: Callable[[int], float]) -> Study:
    """The study with the losses of some cases changed, by seed."""
    losses = {
        case: {seed: loss + (change(seed) if case in cases else 0) for seed, loss in by_seed.items()}
        for case, by_seed in study.losses.items()
    }
    return dataclasses.replace(study, losses=losses)


def test_what_is_trained(done: tuple[Path, Study]) -> None:
    out, study = done
    rows = ledger(out)
    # Nothing that is compared was chosen with its own seeds.
    assert {row["cell"] for row in rows if row["seed"] == 0} == {FIRST, MOE}
    tuning = [row for row in rows if row["seed"] == 0]
    assert len(tuning) == sum(len(one.losses) for one in study.descents.values()) + 3 * len(study.moe)
    assert all([*by_seed] == [1, 2, 3] for by_seed in study.losses.values())
    assert {case for case in study.losses if case.variant in (FULL, HALF)} == {
        *(Case(name, cell, variant) for name in SCALED for cell in cells(study) for variant in (FULL, HALF)),
        *(Case(name) for name in ("nadamw", "lion")),
        *(Case(name, MOE) for name in ("adamw", "muon", MUON_ROUTER)),
    }
    # The search found the made-up optimum of Lion, away from where it began.
    assert dict(study.settings[Case("lion", FIRST, START)])["optim.lr"] == 4e-3
    assert dict(study.settings[Case("lion")])["optim.lr"] == 2e-3
    assert dict(study.settings[Case("adamw", FIRST, UNDERTUNED)])["optim.lr"] == 6e-4
    # Warm-up is a share of the steps; half the rate is of that optimizer's own key.
    assert [dict(study.settings[Case("soap", cell)])[WARMUP] for cell in (FIRST, LONGEST, LARGER)] == [32, 128, 72]
    rate = "optim.muon.lr"
    assert dict(study.settings[Case("muon", LONGEST, HALF)])[rate] == dict(study.settings[Case("muon")])[rate] / 2


def cells(study: Study) -> list[str]:
    return [cell.name for cell in study.sweep.cells]


def test_the_mixture_of_experts_is_as_large_as_the_first_cell(file: Path) -> None:
    sweep = protocol.load_study(file, file.parent, quick=False)
    (first,) = (cell for cell in sweep.cells if cell.name == FIRST)
    for arm, routes in ((MUON_ROUTER, {"*.router.weight": "muon"}), ("muon", {}), ("adamw", {})):
        moe = protocol.moe_sweep(sweep, arm, quick=False)
        config = moe.run_config(arm, MOE, tuple(moe.written.optimizer[arm].start.items()))
        assert config.optim.routes == routes
        assert config.optim.kind == arm.partition("-")[0]
        assert config.total_steps * config.batch.tokens_per_step == first.tokens
        # A router of 32 x 8 in each of 2 layers comes on top.
        assert count_parameters(config.model).active_non_embedding == first.model_size + 2 * 32 * 8


def test_goes_on_after_a_stop(file: Path, done: tuple[Path, Study], capsys: pytest.CaptureFixture[str]) -> None:
    out, first = file.parent / "stopped", Trainer(stop_after=30)
    assert command.optimizer_study(seeds=SEEDS, out=out, jobs=4, file=file, train=first) == REQUEUE
    assert "give the command again" in capsys.readouterr().out
    assert not (out / "README.md").exists()
    second = Trainer()
    assert command.optimizer_study(seeds=SEEDS, out=out, jobs=4, file=file, train=second) == DONE
    assert not {*first.trained} & {*second.trained}
    assert to_json(done[1])["cases"] == json.loads((out / "results.json").read_text())["cases"]


def test_thresholds_are_the_noise_that_is_left_between_runs_of_one_seed(done: tuple[Path, Study], file: Path) -> None:
    _, study = done
    starts = [[*by_seed.values()] for case, by_seed in study.losses.items() if case.variant == START]
    pairs = [np.var(np.subtract(one, other), ddof=1) for one, other in itertools.combinations(starts, 2)]
    assert study.sweep.written.threshold == pytest.approx(np.sqrt(np.mean(pairs)))
    assert study.sweep.written.margin == 2 * study.sweep.written.threshold
    # What a seed does to all of them alike, 0.1 here, does not count; of one seed nothing is known.
    assert study.sweep.written.threshold < 0.05
    sweep = protocol.load_study(file, file.parent, quick=False)
    one_seed = {case: {1: by_seed[1]} for case, by_seed in study.losses.items()}
    assert protocol.with_thresholds(sweep, one_seed).written.threshold == sweep.written.threshold


BOTH = (FULL, HALF)
# Claim -> what turns it: cases, and nats on their losses.
TURNS: Mapping[str, tuple[list[Case], float]] = {
    "every matrix rule beats every scalar rule": ([Case("soap")], 1.0),
    "AdamW with a rate that was not tuned is a weak baseline": ([Case("adamw", FIRST, UNDERTUNED)], -1.0),
    "Muon is ahead of SOAP at a low data ratio": ([Case("soap")], -0.1),
    "SOAP catches up with Muon as data grows": ([Case("soap", LONGEST, one) for one in BOTH], 1.0),
    "the speed-up over AdamW shrinks with data": ([Case("muon", LONGEST, one) for one in BOTH], -0.2),
    "the best learning rate falls with data": ([Case(name, LONGEST, HALF) for name in SCALED], 1.0),
    "the best learning rate falls with size": ([Case(name, LARGER, HALF) for name in SCALED], 1.0),
    "Lion wants a large weight decay": ([Case("lion", FIRST, SMALL_DECAY)], -1.0),
    "ranks flip while the learning rate falls": ([Case("muon", LONGEST)], 1.0),
    "Muon beats AdamW on a mixture of experts": ([Case("muon", MOE)], 1.0),
    "whether AdamW or Muon updates the routers makes no difference": ([Case(MUON_ROUTER, MOE)], 1.0),
}


def test_verdicts_turn_with_the_numbers(done: tuple[Path, Study]) -> None:
    _, study = done
    assert [one.claim.text for one in judge(study)] == [*TURNS]
    assert all(one.verdict == "reproduced" for one in judge(study))
    assert f"**Reproduced** ({len(CLAIMS)} of {len(CLAIMS)})" in summary(study)
    for text, (cases, change) in TURNS.items():
        turned = moved(study, cases, lambda _, change=change: change)
        (verdict,) = (one.verdict for one in judge(turned) if one.claim.text == text)
        assert verdict == "not reproduced", text
        (line,) = (line for line in markdown(turned).splitlines() if line.startswith(f"| {text} |"))
        assert line.endswith("| **not reproduced** |")
        (line,) = (line for line in summary(turned).splitlines() if "**Not reproduced**" in line)
        assert text in line


def test_noise_and_single_seeds_resolve_nothing(done: tuple[Path, Study]) -> None:
    _, study = done
    for text, (cases, _) in TURNS.items():
        # Added to what turns a claim, and as much of it as turns it in one seed: no interval leaves out zero.
        noisy = moved(study, cases, lambda seed: (seed - 2) * 5.0)
        if "speed-up" in text:  # Losses below the floor of AdamW's curve have no speed-up at all.
            noisy = moved(study, cases, lambda seed: (0, 0.05, -0.2)[seed - 1])
        (verdict,) = (one.verdict for one in judge(noisy) if one.claim.text == text)
        assert verdict == "not resolved", text
    single = {case: {1: by_seed[1]} for case, by_seed in study.losses.items()}
    alone = dataclasses.replace(study, losses=single)
    assert all(one.verdict == "not resolved" for one in judge(alone))
    assert "nothing can be resolved" in summary(alone)
    assert to_json(alone)["claims"][0]["found"][0]["interval"] == [None, None]


def test_speed_ups_are_those_of_the_made_up_law(done: tuple[Path, Study]) -> None:
    """AdamW's losses follow 3 + 0.8 D^-0.5 but for what half a factor of the rate costs; a lead is worth the tokens
    that take AdamW as far."""
    _, study = done
    size = mean_speed_ups(study)
    assert size.curve.loss(1.0) == pytest.approx(np.mean([*study.losses[Case("adamw")].values()]))
    rows = {(row.optimizer, row.ratio): row for row in size.rows}
    assert rows["muon", 1.0].factor == pytest.approx(size.curve.data_for(rows["muon", 1.0].loss))
    assert rows["muon", 1.0].factor > rows["muon", 4.0].factor > 1 > rows["lion", 1.0].factor
    ahead = rows["adamw", 4.0].loss - rows["muon", 4.0].loss
    assert ahead == pytest.approx(LEAD["muon"] * HALVED["muon"] ** 2, abs=0.005)
    # Without a fall of AdamW's losses there is no curve, and the report says so.
    flat = moved(study, [Case("adamw", LONGEST, one) for one in BOTH], lambda _: 1.0)
    assert "a loss that does not fall with data" in markdown(flat)


def test_sensitivity(done: tuple[Path, Study]) -> None:
    _, study = done
    found = {(one.optimizer, one.key): one for one in one_offs(study)}
    # The made-up loss knows rates and decay; and nothing of momentum.
    assert {key for (name, key), one in found.items() if name == "lion" and one.matters} == {
        "optim.lr",
        "optim.weight_decay",
    }
    lion = found["lion", "optim.lr"]
    assert lion.best == 2e-3
    assert lion.changes == pytest.approx({1e-3: 0.02, 4e-3: 0.02, 8e-3: 0.08})
    # One rate serves all cells once everything within a nat counts as optimal.
    assert all(one.sensitive for one in sensitive_rates(study).values())
    lax = study.sweep.written.model_copy(update={"margin": 1.0})
    relaxed = dataclasses.replace(study, sweep=dataclasses.replace(study.sweep, written=lax))
    assert not any(one.sensitive for one in sensitive_rates(relaxed).values())
    assert not any(one.matters for one in one_offs(relaxed))


def test_tables_and_failed_runs(done: tuple[Path, Study]) -> None:
    _, study = done
    best = study.best("muon", LONGEST)
    values = [*study.losses[best].values()]
    assert f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f} |" in markdown(study)
    # The best rates lie inside their grids; a grid that ends there makes one suspect.
    assert "**yes**" not in markdown(study)
    muon = study.sweep.written.optimizer["muon"]
    grid = {**muon.grid, "optim.muon.lr": [16e-3, 32e-3, 64e-3]}
    optimizers = study.sweep.written.optimizer | {"muon": muon.model_copy(update={"grid": grid})}
    written = study.sweep.written.model_copy(update={"optimizer": optimizers})
    short = dataclasses.replace(study, sweep=dataclasses.replace(study.sweep, written=written))
    assert markdown(short).count("**yes**") == 1
    # The lower rate is the better one there, until it fails.
    assert best.variant == HALF
    failing = moved(study, [best], lambda seed: math.inf if seed == 2 else 0.0)
    assert failing.best("muon", LONGEST).variant == FULL
    assert "(1 failed)" in markdown(failing)
    (case,) = (one for one in to_json(failing)["cases"] if Case(one["optimizer"], one["cell"], one["variant"]) == best)
    assert case["losses"]["2"] is None
    assert "failed" in markdown(moved(study, [best], lambda _: math.inf))


def test_pictures_show_the_numbers(done: tuple[Path, Study]) -> None:
    out, study = done
    assert {path.name for path in out.glob("*.png")} == {"losses.png", "rank_flip.png", "speedup.png"}
    panels = draw_losses(study).axes
    assert [ax.get_title(loc="left") for ax in panels] == [*cells(study), MOE]
    assert [*panels[0].lines[0].get_xdata()] == [*study.losses[Case("adamw")].values()]
    _, right = draw_flip(study).axes
    (mean,) = (line for line in right.lines if line.get_label() == "muon less adamw")
    at_end = [
        study.losses[Case("muon", LONGEST)][seed] - study.losses[study.best("adamw", LONGEST)][seed]
        for seed in (1, 2, 3)
    ]
    assert mean.get_ydata()[-1] == pytest.approx(np.mean(at_end))
    assert mean.get_ydata()[0] > 0 > mean.get_ydata()[-1]


def test_quick_is_the_same_study_with_few_steps(file: Path) -> None:
    sweep = protocol.load_study(file, file.parent, quick=True)
    ratios = [round(cell.ratio * protocol.QUICK_SHRINK, 2) for cell in sweep.cells]
    assert ratios == [1, 2, 4, 1]
    for name, optimizer in sweep.written.optimizer.items():
        assert sorted(map(len, optimizer.grid.values()))[-2:] == [1, 2]
        for cell in sweep.cells:
            assert sweep.allows(name, cell.name, tuple(optimizer.start.items()))


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(command, "optimizer_study", lambda **options: given.update(options) or 0)
    assert main(["study", "optimizers", "--seeds", "2", "--jobs", "1", "--quick"]) == 0
    assert given == {"seeds": 2, "jobs": 1, "quick": True, "out": Path("runs/study-optimizers")}


def test_the_run_of_the_first_cell_is_the_base() -> None:
    """So that the file that says how to train it trains what the study does."""
    sweep = protocol.load_study(CONFIGS / "optimizers.toml", Path("out"), quick=False)
    (first,) = (cell for cell in sweep.written.cell if cell.name == FIRST)
    base = load_config(CONFIGS / "optimizers-run.toml")
    assert first.set["budget.tokens"] == base.budget.tokens
