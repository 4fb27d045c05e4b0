"""The arms of the study of decentralized training: which runs are compared, and the configuration of each.

All have one model, one optimizer with one learning rate, and the same tokens in the same order. Sites differ from
the central run, and from each other, in when and how they synchronise alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pretrain.config.rules import check
from pretrain.config.schema import Config
from pretrain.errors import ConfigError

CENTRAL: Final = "central"
INTERVALS = (10, 50)
"""Steps between rounds; SPES uses 50 to 100 of its hundred thousand steps (arXiv 2602.11543)."""
METHODS = ("diloco", "average", "spes", "merge")
SITES, MANY_SITES = 2, 4
FOUR, LOST = "four", "four-lost"

MERGE_COEFFICIENT = 0.1
"""At the first step. Where the authors' code sets one, it is 0.01 to 0.1."""
MERGE_SHARE = 0.5
"""Of the steps, within which experts are merged, after every round. The paper merges in the first part of a run,
too: a fifth, of fifty times as many rounds."""

LOST_SHARE, AWAY_SHARE = 0.25, 0.25
"""Of the rounds: how many the site that is lost takes part in before it is killed, and how many pass without it
before it is started again."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    """Names its run directories."""
    label: str
    """Names it in tables and pictures."""
    decentral: Mapping[str, Any] | None = None
    """Keys of its `[decentral]`; None for the central run."""
    loses_a_site: bool = False

    @property
    def sites(self) -> int:
        return self.decentral["sites"] if self.decentral else 1

    @property
    def interval(self) -> int:
        """Steps between rounds; 1 for the central run, which exchanges gradients at every step."""
        return self.decentral["sync_every_steps"] if self.decentral else 1


def _of_two(method: str, interval: int) -> Arm:
    words = {"diloco": "DiLoCo", "average": "full replicas, mean", "spes": "SPES", "merge": "SPES with merging"}
    kind = "diloco" if method in ("diloco", "average") else "spes"
    keys: dict[str, Any] = {"kind": kind, "sites": SITES, "transport": "fixed"}
    if method == "average":
        keys["outer"] = "average"
    if method == "merge":
        # until_step is a share of the steps, which the configuration knows.
        keys["merge"] = {"coefficient": MERGE_COEFFICIENT, "every_steps": interval}
    return Arm(f"{method}-{interval}", f"{words[method]}, H {interval}", keys | {"sync_every_steps": interval})


def _of_four(name: str, label: str, *, loses_a_site: bool) -> Arm:
    """With fewer than three sites, nobody may go on without the other."""
    keys = {"kind": "spes", "sites": MANY_SITES, "sync_every_steps": INTERVALS[0], "transport": "torchft"}
    return Arm(name, label, keys, loses_a_site)


ARMS = (
    Arm(CENTRAL, "central"),
    *(_of_two(method, interval) for interval in INTERVALS for method in METHODS),
    _of_four(FOUR, f"SPES, four sites, H {INTERVALS[0]}", loses_a_site=False),
    _of_four(LOST, f"the same, one site lost for a while, H {INTERVALS[0]}", loses_a_site=True),
)


def arm_named(name: str) -> Arm:
    """The arm of this name."""
    return next(arm for arm in ARMS if arm.name == name)


def arm_config(base: Config, arm: Arm, *, seed: int, directory: Path) -> Config:
    """The run of an arm with this seed; of several sites, as site 0 has it. `base` is the central run's. Raises
    ConfigError."""
    values = base.model_dump(mode="json", exclude_none=True)
    steps = base.total_steps
    changes: dict[str, dict[str, Any]] = {
        "run": {"directory": str(directory), "seed": seed},
        # Every process does all of its part of a step at once.
        "batch": {"micro_batch_size": base.batch.global_batch_size // arm.sites},
        # A site that comes back goes on from its last checkpoint; all others need the last one alone.
        "checkpoint": {"every_steps": arm.interval if arm.loses_a_site else 0, "keep": 1},
    }
    if arm.decentral is not None:
        changes["decentral"] = {**arm.decentral}
        if "merge" in arm.decentral:
            until = max(round(MERGE_SHARE * steps), arm.interval + 1)
            changes["decentral"]["merge"] = {**arm.decentral["merge"], "until_step": until}
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    config = Config.model_validate(values)
    problems = [*check(config, 1), *_interval_rules(config, arm)]
    if problems:
        raise ConfigError([f"{arm.name}: {problem}" for problem in problems])
    return config


def _interval_rules(config: Config, arm: Arm) -> list[str]:
    """Validation has to come right after a round, where all sites have one model."""
    every, steps = config.eval.every_steps, config.total_steps
    if every and every % arm.interval == 0 and steps % arm.interval == 0:
        return []
    return [
        f"eval.every_steps = {every}, budget = {steps} steps: both must be multiples of {arm.interval}, as sites have "
        "one model only right after a round; choose others"
    ]
