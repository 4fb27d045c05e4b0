"""The arms of the study of growth: every one loads and plans, and differs from the others as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.load import dump_config, load_config
from pretrain.config.stages import stages
from pretrain.errors import ConfigError
from pretrain.plan import make_plan
from pretrain.studies.arms import ARMS, SMALL, SWEEP, arm_config, arm_named, from_scratch, sweep_configs
from pretrain.studies.claims import CLAIMS
from pretrain.studies.command import CONFIG_FILE, QUICK_STEPS, seed_configs
from tests.studies.synthetic import RATES

ROOT = Path(__file__).parents[2]
BASE = load_config(ROOT / CONFIG_FILE)
CONFIGS = seed_configs(BASE, 2, Path("out"), rates=RATES)


@pytest.mark.parametrize("steps", [BASE.total_steps, QUICK_STEPS])
def test_every_arm_loads_plans_and_survives_a_round_trip(steps: int, tmp_path: Path) -> None:
    base = load_config(ROOT / CONFIG_FILE, [f"budget.steps={steps}"])
    for name, config in seed_configs(base, 3, Path("out"), rates=RATES).items():
        plan = make_plan(config, 1)
        assert len(plan.stages) == 1 + arm_named(name).grows
        (tmp_path / "config.toml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.toml", world_size=1) == config
        assert config.run.directory == Path(f"out/{name}-seed3")
        assert config.run.seed == 3


def test_arms_that_grow_have_the_small_ones_run_before_it() -> None:
    small = CONFIGS[SMALL]
    for arm in ARMS:
        config = CONFIGS[arm.name]
        same = {"model", "data", "batch", "budget", "optim", "schedule", "eval"}
        if arm.grows:
            assert config.model_dump(include=same) == small.model_dump(include=same)
            assert config.growth[0].at_step % small.checkpoint.keep_every_steps == 0
        elif arm.name != SMALL:
            assert config.optim.lr == RATES[arm.family]
            assert config.model != small.model
            assert not config.growth


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.size_of], ids=lambda arm: arm.name)
def test_arms_from_scratch_have_the_final_size(arm) -> None:
    config, grown = CONFIGS[arm.name], CONFIGS[arm.size_of]
    assert config.model == stages(grown)[-1].config.model
    flops, wanted = make_plan(config, 1).total_flops, make_plan(grown, 1)
    if arm.same_flops:
        # To within half a step.
        assert flops == pytest.approx(wanted.total_flops, rel=0.51 / config.total_steps)
        assert config.total_steps < BASE.total_steps
    else:
        assert flops == wanted.scratch_flops
    assert config.schedule.warmup_steps == round(0.03 * config.total_steps)


def test_growth_is_when_and_what_the_names_say() -> None:
    total = BASE.total_steps
    steps = {arm.name: CONFIGS[arm.name].growth[0].at_step for arm in ARMS if arm.grows}
    assert {steps[name] for name in steps if name.endswith("-early")} == {total // 8}
    assert {steps[name] for name in steps if name.endswith("-late")} == {total * 3 // 4}
    assert {steps[name] for name in steps if not name.startswith("depth")} == {total // 2}
    full, dropped = CONFIGS["width-full"].growth[0], CONFIGS["width-dropped"].growth[0]
    assert (full.optimizer_state, full.rewarm.ratio, full.rewarm.entries) == ("asymmetric", 1.3, "new")
    assert (dropped.optimizer_state, dropped.rewarm) == ("reset", None)
    assert CONFIGS["experts-noise"].growth[0].experts.noise == 0.01
    assert CONFIGS["experts-exact"].growth[0].experts.noise == 0


def test_claims_are_about_arms_there_are() -> None:
    names = {arm.name for arm in ARMS}
    assert len(names) == len(ARMS)
    assert {name for claim in CLAIMS for name in (claim.first, claim.second)} <= names


def test_the_sweep_has_every_size_at_every_rate() -> None:
    found = sweep_configs(BASE, Path("out"))
    assert len({config.run.directory for of_size in found.values() for config in of_size}) == 4 * len(SWEEP)
    for family, of_size in found.items():
        assert [config.optim.lr / BASE.optim.lr for config in of_size] == pytest.approx(SWEEP)
        for config in of_size:
            assert config.model == CONFIGS[from_scratch(family).name].model
            assert config.total_steps == BASE.total_steps // 2
            assert config.run.seed not in (1, 2, 3)
            assert not config.growth


def test_steps_that_have_no_eighths_are_refused() -> None:
    base = load_config(ROOT / CONFIG_FILE, ["budget.steps=100"])
    with pytest.raises(ConfigError, match="budget = 100 steps: must be a multiple of 16"):
        arm_config(base, arm_named(SMALL), rates=RATES, seed=1, directory=Path("out"))
