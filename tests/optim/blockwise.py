"""What SOAP's and Kron's tests share: slots without an optimizer around them, and models that grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.config.optim import OptimConfig
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim.ages import Block
from pretrain.optim.blocks import BlockRule
from pretrain.optim.routing import route
from pretrain.optim.rules import Slot
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import states_of
from tests.helpers.growth import TINY, Model, grow, mesh_of_one, new_model
from tests.optim.build import MOE, Layout, full_value, make_groups, make_shard, part_of

EXPERTS = "decoder.layers.1.mlp.experts.linear_fc1.weight"
"""Of both tests.optim.build.MOE and tests.helpers.growth.TINY."""


def matrices() -> list[LogicalTensor]:
    return [tensor for tensor in logical_tensors(MOE) if tensor.kind == "matrix"]


def matrix(suffix: str) -> LogicalTensor:
    return next(tensor for tensor in matrices() if tensor.key.endswith(suffix))


def slot_of(shard: Shard, config: OptimConfig) -> Slot:
    """A slot with its states at zero."""
    chosen = route(shard.logical, config)
    state = {}
    for name, kept in states_of(shard.logical, chosen.rule, config).items():
        shape = kept.box(shard.logical, shard.offset, shard.shape)[1]
        state[name] = torch.zeros_like(shard.tensor) if kept.is_like(shard.logical) else torch.zeros(shape)
    return Slot(shard, chosen, shard.tensor, state, (Block(0, tuple(slice(0, n) for n in shard.shape)),))


def step_of(rule: BlockRule, slots: Sequence[Slot], step: int) -> list[torch.Tensor]:
    """Directions of random gradients that depend on tensor and step only."""
    grads = []
    for slot in slots:
        box = part_of(slot.shard, full_value(slot.shard.logical, f"grad {step}"))
        grads.append(box.reshape(slot.shard.tensor.shape))
    return [direction for _, direction in rule.directions(slots, grads, step=step)]


def layout_differences(make_rule: Any, config: OptimConfig, layouts: Sequence[Layout], steps: int = 6) -> float:
    """Largest relative difference of directions and states between whole tensors and the parts of `layouts`' ranks."""
    worst = 0.0
    for logical in matrices():
        whole_rule, whole = make_rule(), slot_of(make_shard(logical, Layout()), config)
        parts = [(make_rule(), slot_of(make_shard(logical, layout), config)) for layout in layouts]
        for step in range(1, steps + 1):
            (full,) = step_of(whole_rule, [whole], step)
            for rule, slot in parts:
                (found,) = step_of(rule, [slot], step)
                worst = max(worst, _difference(found, part_of(slot.shard, full)))
        for _, slot in parts:
            for name, kept in states_of(logical, whole.route.rule, config).items():
                offset, shape = kept.box(logical, slot.shard.offset, slot.shard.shape)
                where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                expected = whole.state[name].view(kept.tensor.shape)[where]
                worst = max(worst, _difference(slot.state[name].view(shape), expected))
    return worst


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def resumed_difference(config: OptimConfig, *, forget: str = "") -> float:
    """Largest difference of weights after six steps in one go, and with another optimizer that takes over after three.

    forget: how the names of the states begin that do not come along.
    """
    model = [tensor for tensor in matrices() if "layers.1" in tensor.key]

    def build() -> tuple[list[Shard], ShardedOptimizer]:
        shards = [make_shard(tensor, Layout()) for tensor in model]
        return shards, ShardedOptimizer(shards, config, make_groups(Layout()))

    def run(shards: list[Shard], optimizer: ShardedOptimizer, steps: range) -> None:
        for step in steps:
            for shard in shards:
                shard.tensor.grad = full_value(shard.logical, f"grad {step}").view(shard.tensor.shape)
            optimizer.step(1.0)

    whole, first, second = build(), build(), build()
    run(*whole, range(6))
    run(*first, range(3))
    saved = {tensor.key: tensor.data for tensor in first[1].named_state()}
    for tensor in second[1].named_state():
        if not forget or f".{forget}" not in tensor.key:
            tensor.data.copy_(saved[tensor.key])
    second[1].load_state_dict(first[1].state_dict())
    for new, old in zip(second[0], first[0], strict=True):
        new.tensor.data.copy_(old.tensor.data)
    run(*second, range(3, 6))
    pairs = zip(second[0], whole[0], strict=True)
    return max(float((new.tensor - old.tensor).abs().max()) for new, old in pairs)


def check_experts_grew(source: Any, model: Any, names: Sequence[str], policy: str) -> None:
    """Of the states `names` of experts that doubled, what is old and what is new is as the policy says."""
    for name in names:
        old, new = (m.tensors[f"optimizer.{name}.{EXPERTS}"] for m in (source, model))
        assert old.flatten(1).any(1).all()
        first, second = new.chunk(2)
        assert torch.equal(first, torch.zeros_like(old) if policy == "reset" else old)
        assert torch.equal(second, old if policy == "copy" else torch.zeros_like(old))


def check_width_grew(source: Any, model: Any, names: Sequence[str], key: str) -> None:
    """Of the states `names` of a fused attention weight whose input doubled, old blocks are kept, new ones zero."""
    for name in names:
        # [groups, slots, head_dim blocks, hidden blocks, row, column]; the copies lie behind the old channels.
        old, new = (m.tensors[f"optimizer.{name}.{key}"] for m in (source, model))
        kept, fresh = new.chunk(2, dim=3)
        assert torch.equal(kept, old)
        assert old.any()
        assert not fresh.any()


@contextmanager
def growing(changes_of: Callable[[int], dict[str, Any]]) -> Iterator[Callable[..., tuple[Model, Model]]]:
    """(source, grown) by block size and keys of the growth, for the time of a `with` block; sources are built once, by
    the changes of configuration for a block size, and stay as they are."""
    sources: dict[int, Model] = {}
    with mesh_of_one() as mesh:

        def of(block_size: int, **keys: object) -> tuple[Model, Model]:
            if block_size not in sources:
                sources[block_size] = new_model(mesh, TINY, changes_of(block_size), steps=3)
            return sources[block_size], grow(sources[block_size], **keys)

        yield of
