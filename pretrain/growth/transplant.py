"""Weights, selection biases and optimizer state of a grown model, from those of the old one.

The same steps serve a running job, whose ranks hold the old tensors, and a checkpoint, which lies on a disk: say which
boxes of the old tensors a new box needs, put the pieces that come into their places, then fill in what is no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.optim import OptimConfig
from pretrain.config.stages import BUFFER_BYTES
from pretrain.growth.maps import Extent, GrowthPoint, TensorMap
from pretrain.growth.pull import Traffic, Wanted, pull
from pretrain.growth.values import Figures, Part, apply_fills, measure, needs_figures
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.routing import route
from pretrain.optim.states import State, split_state_key, states_of


@dataclass(frozen=True)
class Copying:
    """What of an old tensor goes into a new one."""

    old_only: bool = False
    """Old entries alone, the others stay as they are (zero)."""
    factor: float | None = None
    """On every entry; None: the factors of the weights."""


@dataclass(frozen=True)
class Target:
    """A box of a tensor of the grown model, to be filled in place."""

    tensor_map: TensorMap
    """Of the weight, or of the state."""
    state: State | None
    """The optimizer state it is; None for the weight itself."""
    offset: Extent
    box: torch.Tensor
    """Zero where nothing is copied."""


def state_map(growth: GrowthPoint, weights: TensorMap, name: str, optim: OptimConfig) -> tuple[State, TensorMap | None]:
    """A state of a weight of the grown model, and where it comes from; None: from nowhere, it starts at zero.

    A copied layer may have another rule than its source, where `optim.routes` names layers.
    """
    rules = [route(weight, optim).rule for weight in (weights.target, weights.source)]
    new = states_of(weights.target, rules[0], optim)[name]
    if rules[0] != rules[1] or not new.carried:
        return new, None
    old = states_of(weights.source, rules[1], optim)[name]
    return new, growth.state_map(weights, old.tensor, new.tensor)


def state_copying(growth: GrowthPoint, state: State, tensor_map: TensorMap) -> Copying | None:
    """What becomes of an optimizer state at a growth, None for nothing: it starts at zero.

    exact: a token that met an expert with weight w now meets each of its g copies with w/g, so gradients of experts
    and of router rows are 1/g of what they were, and what was made from them is scaled likewise.
    """
    match growth.config.optimizer_state:
        case "reset":
            return None
        case "asymmetric":
            return Copying(old_only=True, factor=1.0)
        case "copy":
            return Copying(factor=1.0)
        case "exact":
            experts = growth.config.experts
            assert experts is not None
            gradient = 1 / experts.factor if "expert" in tensor_map.target.axes else 1.0
            return Copying(factor=gradient**state.degree)


def targets_of(growth: GrowthPoint, tensors: Sequence[ShardedTensor], optim: OptimConfig) -> list[Target]:
    """The boxes of the grown model that `tensors` are, located by their keys: of weights, or of optimizer states.

    States that come from nowhere are left out.
    """
    logical = {tensor.key: tensor for tensor in logical_tensors(growth.after)}
    found = []
    for tensor in tensors:
        name, key = split_state_key(tensor.key)
        assert tensor.data is not None
        found.append(target_of(growth, logical[key], name, tuple(tensor.global_offset), tensor.data, optim))
    return [target for target in found if target is not None]


def target_of(
    growth: GrowthPoint, weight: LogicalTensor, name: str | None, offset: Extent, box: torch.Tensor, optim: OptimConfig
) -> Target | None:
    """A box of a weight, or of its state `name`; None if that state starts at zero."""
    weights = growth.tensor_map(weight)
    if name is None:
        return Target(weights, None, offset, box)
    state, tensor_map = state_map(growth, weights, name, optim)
    return None if tensor_map is None else Target(tensor_map, state, offset, box)


def requests(growth: GrowthPoint, target: Target) -> Iterator[Wanted]:
    """The boxes of the old tensor that a target needs, each with the way to put it in place."""
    copying = Copying() if target.state is None else state_copying(growth, target.state, target.tensor_map)
    if copying is None:
        return
    for offset, shape in target.tensor_map.wanted(target.offset, target.box.shape, old_only=copying.old_only):
        yield Wanted(target.tensor_map.source.key, offset, shape, partial(_place, target, copying))


def _place(target: Target, copying: Copying, offset: Extent, piece: torch.Tensor) -> None:
    target.tensor_map.place(target.box, target.offset, piece, offset, old_only=copying.old_only, factor=copying.factor)


def fill_new(growth: GrowthPoint, targets: Sequence[Target], *, figures: Mapping[str, Figures], seed: int) -> None:
    """Give the entries of weights that are no copies their values, once the copies are in place."""
    for target in targets:
        if target.state is None:
            apply_fills(growth, target.tensor_map, target.box, target.offset, figures=figures, seed=seed)


def measured_tensors(growth: GrowthPoint) -> list[LogicalTensor]:
    """The old tensors whose figures the new entries depend on, the same on every rank."""
    maps = (growth.tensor_map(tensor) for tensor in logical_tensors(growth.after))
    return list({tensor_map.source.key: tensor_map.source for tensor_map in maps if needs_figures(tensor_map)}.values())


@torch.no_grad()
def transplant(
    growth: GrowthPoint,
    old: Sequence[ShardedTensor],
    new: Sequence[ShardedTensor],
    *,
    optim: OptimConfig,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    buffer_bytes: int = BUFFER_BYTES,
) -> Traffic:
    """Fill this rank's boxes `new` of the grown model from the boxes `old` that all ranks hold. Collective.

    Both list fp32 weights and selection biases under their keys, optimizer states under `state_key`; the two layouts
    have nothing to do with each other. `new` starts at zero.
    """
    targets = targets_of(growth, new, optim)
    figures = measure(
        measured_tensors(growth),
        partial(_main_parts, growth, old),
        add=_all_reduce(dist.ReduceOp.SUM),
        largest=_all_reduce(dist.ReduceOp.MAX),
        device=device,
    )
    wanted = [request for target in targets for request in requests(growth, target)]
    traffic = pull(wanted, old, device=device, ranks=ranks, buffer_bytes=buffer_bytes)
    fill_new(growth, targets, figures=figures, seed=seed)
    return traffic


def _main_parts(growth: GrowthPoint, tensors: Sequence[ShardedTensor]) -> Iterator[Part]:
    """The weights among `tensors` that no other rank counts."""
    for tensor in tensors:
        if tensor.key in growth.old_tensors and is_main_replica(tensor.replica_id):
            assert tensor.data is not None
            yield Part(growth.old_tensors[tensor.key], tuple(tensor.global_offset), tensor.data)


def _all_reduce(operation: dist.ReduceOp.RedOpType) -> Callable[[torch.Tensor], torch.Tensor]:
    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized() and tensor.numel():
            dist.all_reduce(tensor, op=operation)
        return tensor

    return reduce
