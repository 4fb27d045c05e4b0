"""The arms of the study of growth: which runs are compared, and the configuration of each.

Every arm follows from one configuration, that of the small model. Arms that grow share the small model's run up to
their growth, its data and its peak learning rate; arms from scratch have the size that an arm grows to and a peak
learning rate of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pretrain.config.rules import check
from pretrain.config.schema import Config, ModelConfig
from pretrain.config.stages import stages
from pretrain.errors import ConfigError
from pretrain.plan import make_plan

Family = Literal["small", "width", "depth", "experts"]
Table = Mapping[str, Any]

SMALL: Final = "small"
EIGHTHS = 8
"""The small run keeps a checkpoint at every eighth of its steps: growth happens at one of them."""
EVALUATIONS = 16
"""Validations of a run."""
WARMUP_SHARE = 0.03
"""Of the steps (arXiv 2602.02472, section 5)."""
REWARM_SHARE, REWARM_RATIO = 0.004, 1.3
"""250 of 63,578 steps, to 1.3 times the rate at the growth (arXiv 2602.02472)."""
SWEEP = (0.5, 1.0, 2.0)
"""Peak learning rates that the sweep tries for every size, as multiples of the small model's configured one."""
SWEEP_SHARE = 0.5
"""Of the steps: the length of a run of the sweep."""
SWEEP_SEED = 0
"""None of the study's own."""

Rates = Mapping[Family, float]
"""Peak learning rate of each final size from scratch, and, as "small", of the small model and all that grow from it."""


@dataclass(frozen=True)
class Arm:
    """One way to train: from scratch, or grown on the way."""

    name: str
    """Names its run directories."""
    label: str
    """Names it in tables and pictures."""
    family: Family
    growth: Table | None = None
    """Keys of its `[[growth]]` but the step; None for an arm from scratch."""
    eighth: int = 4
    """Eighths of the steps before the growth."""
    size_of: str | None = None
    """An arm from scratch: the arm whose final model it has; None for the small one."""
    same_flops: bool = False
    """An arm from scratch: whether its schedule is shortened to the FLOPs of the arm `size_of`."""

    @property
    def grows(self) -> bool:
        return self.growth is not None


def _width(init: str, state: str, **keys: Any) -> Table:
    wider = {"factor": 2, "init": init}
    return {"hidden": wider, "expert_ffn": wider, "optimizer_state": state, **keys}


def _depth(method: str) -> Table:
    return {"depth": {"method": method, "factor": 2}, "optimizer_state": "asymmetric"}


def _experts(noise: float, state: str) -> Table:
    return {"experts": {"factor": 2, "top_k": "double", "noise": noise}, "optimizer_state": state}


ARMS = (
    Arm(SMALL, "small model", "small"),
    Arm("width-scratch", "from scratch", "width", size_of="width-full"),
    Arm("width-scratch-short", "from scratch, FLOPs of the grown", "width", size_of="width-full", same_flops=True),
    Arm("width-full", "copy-copy, asymmetric, re-warm", "width", _width("copy", "asymmetric", rewarm="new")),
    Arm("width-asymmetric", "copy-copy, asymmetric", "width", _width("copy", "asymmetric")),
    Arm("width-copied", "copy-copy, state copied", "width", _width("copy", "copy")),
    Arm("width-dropped", "copy-copy, state dropped", "width", _width("copy", "reset")),
    Arm("width-rewarm-all", "copy-copy, asymmetric, re-warm all", "width", _width("copy", "asymmetric", rewarm="all")),
    Arm("width-zero-copy", "zero-copy, asymmetric", "width", _width("zero-copy", "asymmetric")),
    Arm("width-random", "random, asymmetric", "width", _width("random", "asymmetric")),
    Arm("depth-scratch", "from scratch", "depth", size_of="depth-interpose-late"),
    Arm(
        "depth-scratch-short",
        "from scratch, FLOPs of the late",
        "depth",
        size_of="depth-interpose-late",
        same_flops=True,
    ),
    Arm("depth-interpose-early", "interpose at 1/8", "depth", _depth("interpose"), eighth=1),
    Arm("depth-stack-early", "stack at 1/8", "depth", _depth("stack"), eighth=1),
    Arm("depth-interpose-late", "interpose at 6/8", "depth", _depth("interpose"), eighth=6),
    Arm("depth-stack-late", "stack at 6/8", "depth", _depth("stack"), eighth=6),
    Arm("experts-scratch", "from scratch", "experts", size_of="experts-noise"),
    Arm("experts-noise", "copies with 1 % noise, asymmetric", "experts", _experts(0.01, "asymmetric")),
    Arm("experts-plain", "copies without noise, asymmetric", "experts", _experts(0.0, "asymmetric")),
    Arm("experts-exact", "copies without noise, exact state", "experts", _experts(0.0, "exact")),
)


def arm_named(name: str) -> Arm:
    """The arm of this name."""
    return next(arm for arm in ARMS if arm.name == name)


def growth_step(base: Config, arm: Arm) -> int:
    """Steps of the small model's run before an arm grows."""
    return base.total_steps * arm.eighth // EIGHTHS


def from_scratch(family: Family) -> Arm:
    """The arm from scratch at the small size, or at the final size of a family."""
    return arm_named(SMALL if family == SMALL else f"{family}-scratch")


def sweep_configs(base: Config, folder: Path) -> dict[Family, list[Config]]:
    """The runs of the sweep of the peak learning rate, by size, rates ascending."""
    found: dict[Family, list[Config]] = {}
    for family in get_args(Family):
        rates = [factor * base.optim.lr for factor in SWEEP]
        found[family] = [_sweep_config(base, family, lr, folder / f"sweep-{family}-{lr:g}") for lr in rates]
    return found


def _sweep_config(base: Config, family: Family, lr: float, directory: Path) -> Config:
    rates = dict.fromkeys(get_args(Family), lr)
    arm = from_scratch(family)
    return arm_config(base, arm, rates=rates, seed=SWEEP_SEED, directory=directory, share=SWEEP_SHARE)


def arm_config(base: Config, arm: Arm, *, rates: Rates, seed: int, directory: Path, share: float = 1.0) -> Config:
    """The run of an arm with this seed. `base` is the small model's; `share`: of its steps that an arm from scratch
    has. Raises ConfigError."""
    problems = list(_step_rules(base))
    if problems:
        raise ConfigError(problems)
    model, steps, lr = base.model, base.total_steps * share, rates[SMALL]
    if arm.size_of:
        grown = arm_config(base, arm_named(arm.size_of), rates=rates, seed=seed, directory=directory)
        model, lr = stages(grown)[-1].config.model, rates[arm.family]
        if arm.same_flops:
            plan = make_plan(grown, 1)
            steps *= plan.total_flops / plan.scratch_flops
    return _run(base, arm, model=model, steps=round(steps), lr=lr, seed=seed, directory=directory)


def _run(base: Config, arm: Arm, *, model: ModelConfig, steps: int, lr: float, seed: int, directory: Path) -> Config:
    every = base.total_steps // EIGHTHS if arm.name == SMALL else 0
    values = base.model_dump(mode="json", exclude_none=True)
    changes: dict[str, dict[str, Any]] = {
        "run": {"directory": str(directory), "seed": seed},
        "model": model.model_dump(mode="json"),
        "budget": {"steps": steps},
        "optim": {"lr": lr},
        "schedule": {"warmup_steps": round(WARMUP_SHARE * steps)},
        # One checkpoint: the last. The small run keeps those that others grow from.
        "checkpoint": {"every_steps": every, "keep_every_steps": every, "keep": 1},
        "eval": {"every_steps": base.total_steps // EVALUATIONS},
    }
    for section, keys in changes.items():
        values[section] |= keys
    if arm.growth is not None:
        values["growth"] = [_growth(base, arm, arm.growth)]
    config = Config.model_validate(values)
    problems = check(config, 1)
    if problems:
        raise ConfigError([f"{arm.name}: {problem}" for problem in problems])
    return config


def _growth(base: Config, arm: Arm, growth: Table) -> Table:
    table = {"at_step": growth_step(base, arm), **growth}
    if "rewarm" in table:
        steps = max(1, round(REWARM_SHARE * base.total_steps))
        table["rewarm"] = {"steps": steps, "ratio": REWARM_RATIO, "entries": table["rewarm"]}
    return table


def _step_rules(base: Config) -> Iterator[str]:
    if base.total_steps % EVALUATIONS or base.total_steps < 2 * EVALUATIONS:
        yield (
            f"budget = {base.total_steps} steps: must be a multiple of {EVALUATIONS} and at least {2 * EVALUATIONS}, "
            "as arms grow and are measured at shares of it; choose another"
        )
