"""Which update rule a weight gets, and whether it decays."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pretrain.config.schema import OptimConfig
from pretrain.model.logical import LogicalTensor

RuleName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Route:
    """How one logical tensor is updated."""

    rule: RuleName
    lr: float
    """Peak learning rate."""
    weight_decay: float


def route(logical: LogicalTensor, config: OptimConfig) -> Route:
    """The rule, peak learning rate and weight decay of a trainable tensor.

    Muon takes hidden matrices, and the router's if asked to; decay spares embeddings and norm gains unless the
    configuration says otherwise. An untied output layer is a matrix that decays, under AdamW.
    """
    assert logical.trainable, logical.key
    decays = {"embedding": config.decay_embeddings, "norm": config.decay_norms}.get(logical.kind, True)
    weight_decay = config.weight_decay if decays else 0.0
    is_muon = logical.kind == "matrix" or (logical.kind == "router" and config.muon.router)
    if config.kind == "muon" and is_muon:
        return Route("muon", config.muon.lr or config.lr, weight_decay)
    return Route("adamw", config.lr, weight_decay)


def describe_routes(tensors: Iterable[LogicalTensor], config: OptimConfig) -> str:
    """A table of rule, peak learning rate, decay, tensors, parameters and names, with the layers folded into `*`."""
    rows: dict[tuple[str, str, str, str], list[LogicalTensor]] = {}
    for logical in tensors:
        if logical.trainable:
            chosen = route(logical, config)
            pattern = re.sub(r"\.\d+\.", ".*.", logical.key)
            key = (chosen.rule, f"{chosen.lr:g}", f"{chosen.weight_decay:g}", pattern)
            rows.setdefault(key, []).append(logical)
    lines = [f"{'rule':<6} {'lr':>8} {'decay':>6} {'tensors':>8} {'parameters':>15}  name"]
    for (rule, lr, decay, pattern), members in rows.items():
        numel = sum(member.numel for member in members)
        lines.append(f"{rule:<6} {lr:>8} {decay:>6} {len(members):>8} {numel:>15,}  {pattern}")
    return "\n".join(lines)
