"""Every update rule by its name."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config.optim import OptimConfig, RuleName
from pretrain.optim.adam import AdamMini, AdamW, Cautious, Lion, Mars, NAdamW, Signum
from pretrain.optim.hyperball import Hyperball
from pretrain.optim.kron import Kron
from pretrain.optim.muon import Muon, Scion
from pretrain.optim.routing import rules_of
from pretrain.optim.rules import Rule
from pretrain.optim.soap import Soap
from pretrain.optim.sophia import Sophia
from pretrain.optim.tensor_parallel import TensorParallel


def make_rules(config: OptimConfig, groups: ProcessGroupCollection) -> dict[RuleName, Rule]:
    """The rules of an optimizer."""
    return {name: _make(name, config, groups) for name in rules_of(config.kind)}


def _make(name: RuleName, config: OptimConfig, groups: ProcessGroupCollection) -> Rule:
    parallel = TensorParallel(groups)
    makers: dict[RuleName, Callable[[], Rule]] = {
        "adamw": lambda: AdamW(config),
        "nadamw": lambda: NAdamW(config),
        "mars": lambda: Mars(config),
        "cautious": lambda: Cautious(config, parallel),
        "adam_mini": lambda: AdamMini(config, parallel),
        "lion": lambda: Lion(config),
        "sophia": lambda: Sophia(config, parallel),
        "signum": lambda: Signum(config),
        "muon": lambda: Muon(config.muon, groups),
        "scion": lambda: Scion(config.scion, groups),
        "soap": lambda: Soap(config),
        "kron": lambda: Kron(config),
        "muonh": lambda: Hyperball(Muon(config.muon, groups), parallel),
        "adamh": lambda: Hyperball(AdamW(config), parallel),
    }
    return makers[name]()
