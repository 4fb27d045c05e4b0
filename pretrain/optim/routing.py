"""Which update rule a weight gets, and whether it decays. Needs no torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pretrain.config.growth import GrowthConfig
from pretrain.config.optim import Kind, OptimConfig, RuleName
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.states import block_axes, block_shape, largest_divisor, state_key, states_of

RULES: dict[Kind, tuple[RuleName, ...]] = {
    "muon": ("muon", "adamw"),
    "scion": ("scion", "signum"),
    "kron": ("kron", "adamw"),
    "soap": ("soap", "adamw"),
    "muonh": ("muonh", "adamh", "adamw"),
    "adamh": ("adamh", "adamw"),
}
"""The rules of optimizers that have several: that of hidden matrices first, that of all the rest last."""
MATRIX_RULES = ("muon", "scion", "kron", "soap", "muonh", "adamh")
"""Rules that a vector can't have."""
NORM_KEEPING = ("muonh", "adamh")
"""Rules under which a matrix keeps its norm, that of a matrix of zeros, too."""


@dataclass(frozen=True)
class Route:
    """How one logical tensor is updated."""

    rule: RuleName
    lr: float
    """Peak learning rate."""
    weight_decay: float


def rules_of(kind: Kind) -> tuple[RuleName, ...]:
    """The update rules of an optimizer."""
    return RULES.get(kind) or (kind,)  # every other kind has one rule, of its own name


def route(logical: LogicalTensor, config: OptimConfig) -> Route:
    """The rule, peak learning rate and weight decay of a trainable tensor.

    Matrix rules take hidden matrices, and not the router's: patterns in `optim.routes` say otherwise. Decay spares
    embeddings and norm gains unless the configuration says otherwise, and what keeps its norm. An untied output layer
    is a matrix that decays.
    """
    assert logical.trainable, logical.key
    rule = _default_rule(logical, config.kind)
    for pattern, chosen in config.routes.items():
        if fnmatch.fnmatchcase(logical.key, pattern):
            rule = chosen
    decays = {"embedding": config.decay_embeddings, "norm": config.decay_norms}.get(logical.kind, True)
    decays = decays and rule not in NORM_KEEPING
    return Route(rule, _peak(rule, config), config.weight_decay if decays else 0.0)


def _default_rule(logical: LogicalTensor, kind: Kind) -> RuleName:
    rules = rules_of(kind)
    if logical.kind == "matrix":
        return rules[0]
    if logical.kind == "output" and "adamh" in rules:
        return "adamh"  # the output layer keeps its norm, too, as in arXiv 2606.16899's recipe
    return rules[-1]


def _peak(rule: RuleName, config: OptimConfig) -> float:
    own = {
        "muon": config.muon.lr,
        "scion": config.scion.lr,
        "kron": config.kron.lr,
        "soap": config.soap.lr,
        "muonh": config.hyperball.lr,
        "adamh": config.hyperball.lr,
    }
    return own.get(rule) or config.lr


def expert_state_keys(tensors: Iterable[LogicalTensor], config: OptimConfig) -> frozenset[str]:
    """Keys of the masters and states of all experts: what checkpoints hold in part, where only some of them train."""
    experts = [tensor for tensor in tensors if tensor.is_expert]
    return frozenset(
        state_key(name, tensor.key)
        for tensor in experts
        for name in ("master", *states_of(tensor, route(tensor, config).rule, config))
    )


def check_routes(config: Config) -> list[str]:
    """Problems of the optimizer with the tensors of the model, at every stage of the run."""
    problems = []
    for pattern, rule in config.optim.routes.items():
        key = f'optim.routes."{pattern}"'
        if rule not in rules_of(config.optim.kind):
            known = ", ".join(f'"{name}"' for name in rules_of(config.optim.kind))
            problems.append(f'{key} = "{rule}": optim.kind = "{config.optim.kind}" has the rules {known}; use one')
    for number, stage in enumerate(stages(config)):
        trained = [tensor for tensor in logical_tensors(stage.config.model) if tensor.trainable]
        broken = _pattern_problems(trained, config.optim)
        problems += broken
        if not broken:
            problems += _block_problems(trained, stage.config)
        if stage.growth:
            problems += _growth_problems(trained, config.optim, stage.growth, f"growth[{number - 1}]")
    return list(dict.fromkeys(problems))


def _pattern_problems(tensors: Sequence[LogicalTensor], optim: OptimConfig) -> list[str]:
    problems = []
    for pattern, rule in optim.routes.items():
        matched = [tensor for tensor in tensors if fnmatch.fnmatchcase(tensor.key, pattern)]
        vector = next((tensor.key for tensor in matched if tensor.kind == "norm"), None)
        key = f'optim.routes."{pattern}" = "{rule}"'
        if not matched:
            near = sorted({re.sub(r"\.\d+\.", ".*.", tensor.key) for tensor in tensors})
            problems.append(f"{key}: matches no tensor; names are {', '.join(near)}")
        elif vector and rule in MATRIX_RULES:
            problems.append(f"{key}: {vector} is a vector and {rule} needs matrices; narrow the pattern")
    return problems


def _growth_problems(
    tensors: Sequence[LogicalTensor], optim: OptimConfig, growth: GrowthConfig, key: str
) -> Iterator[str]:
    """What rules cannot do with what a growth makes."""
    ruled = [(tensor, route(tensor, optim).rule) for tensor in tensors]
    for tensor, rule in ruled:
        if growth.depth and growth.depth.identity and tensor.writes_stream and rule in NORM_KEEPING:
            yield (
                f"{key}.depth.identity = true: new layers begin with matrices of zeros, and {rule} keeps the norm of "
                f"{tensor.key}; leave it out, or use another optim.kind"
            )
            break
    for tensor, rule in ruled:
        if growth.optimizer_state == "exact" and tensor.kind == "router" and rule in MATRIX_RULES:
            yield (
                f'{key}.optimizer_state = "exact": {rule} mixes the rows of {tensor.key}, so that those of copies do '
                "not move as one did; leave the router out of optim.routes"
            )
            break


def _block_problems(tensors: Sequence[LogicalTensor], config: Config) -> list[str]:
    """Blocks that tensor parallelism would cut through."""
    problems = []
    sizes = {"tensor": config.parallel.tensor, "expert_tensor": config.parallel.expert_tensor}
    for tensor in tensors:
        rule = route(tensor, config.optim).rule
        if rule not in ("soap", "kron"):
            continue
        largest = (config.optim.soap if rule == "soap" else config.optim.kron).block_size
        for axis, block in zip(block_axes(tensor), block_shape(tensor, largest), strict=True):
            split = tensor.sharded.get(axis, "expert")
            part = tensor.shape[tensor.axes.index(axis)] // sizes.get(split, 1)
            if part % block:
                problems.append(
                    f"optim.{rule}.block_size = {largest}: makes blocks of {block} along {axis} (size "
                    f"{tensor.shape[tensor.axes.index(axis)]}), which parallel.{split} = {sizes[split]} would cut; use "
                    f"{largest_divisor(part, largest)}"
                )
    return problems


def describe_routes(tensors: Iterable[LogicalTensor], config: OptimConfig) -> str:
    """A table of rule, peak learning rate, decay, tensors, parameters and names, with the layers folded into `*`."""
    rows: dict[tuple[str, str, str, str], list[LogicalTensor]] = {}
    for logical in tensors:
        if logical.trainable:
            chosen = route(logical, config)
            pattern = re.sub(r"\.\d+\.", ".*.", logical.key)
            key = (chosen.rule, f"{chosen.lr:g}", f"{chosen.weight_decay:g}", pattern)
            rows.setdefault(key, []).append(logical)
    lines = [f"{'rule':<9} {'lr':>8} {'decay':>6} {'tensors':>8} {'parameters':>15}  name"]
    for (rule, lr, decay, pattern), members in rows.items():
        numel = sum(member.numel for member in members)
        lines.append(f"{rule:<9} {lr:>8} {decay:>6} {len(members):>8} {numel:>15,}  {pattern}")
    return "\n".join(lines)
