"""The tensors that update rules keep beside a weight, each a logical tensor of its own with named axes.

From these follow where a rank's part of a state lies, how it is saved and found again on another layout, what becomes
of it when the model grows, and how much memory it takes; none of it needs torch. A state begins at zero.

Axes of a state are those of its weight (or some of them: the rule sums over the others), `<axis>_blocks` for the blocks
that an axis is cut into, and axes of its own, which no rank splits and no growth touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pretrain.config.optim import OptimConfig, RuleName
from pretrain.model.logical import LogicalTensor

STATE_PREFIX = "optimizer."
BLOCKS = "_blocks"


@dataclass(frozen=True)
class State:
    """One state of one weight."""

    name: str
    tensor: LogicalTensor
    degree: int = 1
    """Power of the gradient that it scales with."""
    carried: bool = True
    """Whether old entries keep it when the model grows; otherwise it starts anew."""

    def is_like(self, weight: LogicalTensor) -> bool:
        """Whether it has an entry for every entry of the weight, in the same places."""
        return self.tensor.axes == weight.axes

    def has(self, axis: str) -> bool:
        """Whether an axis of the weight runs through it, whole or in blocks."""
        return axis in (own.removesuffix(BLOCKS) for own in self.tensor.axes)

    def box(self, weight: LogicalTensor, offset: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """(offset, shape) of the part that belongs to a box of the weight."""
        places = dict(zip(weight.axes, zip(offset, shape, weight.shape, strict=True), strict=True))
        starts, sizes = [], []
        for axis, size in zip(self.tensor.axes, self.tensor.shape, strict=True):
            start, extent, whole = places.get(axis.removesuffix(BLOCKS), (0, size, size))
            block = whole // size
            assert start % block == extent % block == 0, f"{self.tensor.key}: {axis} is cut inside a block of {block}"
            starts.append(start // block)
            sizes.append(extent // block)
        return starts, sizes


def state_key(name: str | None, key: str) -> str:
    """Key of the state `name`, e.g. `exp_avg`, of the weight `key`; None means the weight itself."""
    return key if name is None else f"{STATE_PREFIX}{name}.{key}"


def split_state_key(text: str) -> tuple[str | None, str]:
    """(name of the state, key of the weight) of a `state_key`; (None, `text`) if it is the key of a weight itself."""
    if not text.startswith(STATE_PREFIX):
        return None, text
    name, key = text.removeprefix(STATE_PREFIX).split(".", 1)
    return name, key


def states_of(weight: LogicalTensor, rule: RuleName, config: OptimConfig) -> dict[str, State]:
    """The states that a rule keeps for a weight, by name."""
    return {state.name: state for state in _states(weight, rule, config)}


def state_numel(states: Mapping[str, State], weight: LogicalTensor, shape: Sequence[int]) -> int:
    """Entries of all states of a box of the weight with extent `shape`."""
    return sum(math.prod(state.box(weight, [0] * len(shape), shape)[1]) for state in states.values())


def block_axes(weight: LogicalTensor) -> tuple[str, str]:
    """The two axes of a matrix that blocks cut, in order: `hidden` and the last of the others. All other axes stack
    matrices, so that a block never spans heads, experts, or gate and up."""
    other = [axis for axis in weight.axes if axis != "hidden"][-1]
    first, second = sorted(("hidden", other), key=weight.axes.index)
    return first, second


def block_shape(weight: LogicalTensor, largest: int) -> tuple[int, int]:
    """Sides of a weight's blocks along its `block_axes`: the largest divisors up to `largest`."""
    first, second = (weight.shape[weight.axes.index(axis)] for axis in block_axes(weight))
    return largest_divisor(first, largest), largest_divisor(second, largest)


def largest_divisor(size: int, largest: int) -> int:
    """The largest divisor of `size` that is at most `largest`."""
    return next(block for block in range(min(size, largest), 0, -1) if size % block == 0)


def _states(weight: LogicalTensor, rule: RuleName, config: OptimConfig) -> Iterator[State]:
    match rule:
        case "adamw" | "nadamw" | "cautious" | "mars" | "adamh":
            yield _like(weight, "exp_avg")
            yield _like(weight, "exp_avg_sq", degree=2)
        case "adam_mini":
            yield _like(weight, "exp_avg")
            yield _of_axes(weight, "exp_avg_sq", row_axes(weight), degree=2)
        case "sophia":
            yield _like(weight, "exp_avg")
            yield _like(weight, "hessian", degree=2)
        case "lion":
            yield _like(weight, "exp_avg")
        case "muon" | "scion" | "signum" | "muonh":
            yield _like(weight, "momentum")
        case "soap":
            blocks = block_shape(weight, config.soap.block_size)
            rows, columns = ("row", blocks[0]), ("column", blocks[1])
            yield _like(weight, "exp_avg")
            yield _blocked(weight, "exp_avg_sq", blocks, rows, columns, degree=2)
            for side, (_, size) in (("left", rows), ("right", columns)):
                square = (("row", size), ("column", size))
                yield _blocked(weight, f"gram_{side}", blocks, *square, degree=2)
                yield _blocked(weight, f"basis_{side}", blocks, *square, degree=0)
        case "kron":
            blocks = block_shape(weight, config.kron.block_size)
            yield _like(weight, "exp_avg")
            for side, size in zip(("left", "right"), blocks, strict=True):
                yield _blocked(weight, f"factor_{side}", blocks, ("row", size), ("column", size), degree=0)
    if rule == "mars":
        yield _like(weight, "previous_grad")
    if rule in ("muonh", "adamh"):
        yield _radius(weight)


def row_axes(weight: LogicalTensor) -> tuple[str, ...]:
    """The axes that Adam-mini's second moment keeps: one value per output row; per entry of a norm's gain."""
    if weight.kind == "norm":
        return weight.axes
    summed = weight.fan_in or ("hidden",)  # an embedding has no input axis; its rows are the tokens'
    return tuple(axis for axis in weight.axes if axis not in summed)


def _like(weight: LogicalTensor, name: str, degree: int = 1) -> State:
    return State(name, replace(weight, key=state_key(name, weight.key)), degree)


def _of_axes(weight: LogicalTensor, name: str, axes: Sequence[str], degree: int) -> State:
    """A state with some of the weight's axes."""
    shape = tuple(weight.shape[weight.axes.index(axis)] for axis in axes)
    return State(name, _tensor(weight, name, tuple(axes), shape), degree)


def _blocked(weight: LogicalTensor, name: str, blocks: tuple[int, int], *inner: tuple[str, int], degree: int) -> State:
    """A state with axes `inner` (name, size) for each block of the weight."""
    cut = block_axes(weight)
    outer = {axis: size for axis, size in zip(weight.axes, weight.shape, strict=True) if axis not in cut}
    for axis, block in zip(cut, blocks, strict=True):
        outer[axis + BLOCKS] = weight.shape[weight.axes.index(axis)] // block
    axes, shape = zip(*outer.items(), *inner, strict=True)
    return State(name, _tensor(weight, name, axes, shape), degree)


def _radius(weight: LogicalTensor) -> State:
    """One number for each matrix inside a tensor, in the order of `matrices.split_matrices`."""
    stacked: tuple[str, ...] = tuple(
        axis for axis in ("expert", "gate_up") if axis in weight.axes and weight.kind != "router"
    )
    shape = tuple(weight.shape[weight.axes.index(axis)] for axis in stacked)
    if not stacked:
        stacked, shape = ("matrix",), (3 if "qkv_slot" in weight.axes else 1,)
    return State("radius", _tensor(weight, "radius", stacked, shape), degree=0, carried=False)


def _tensor(weight: LogicalTensor, name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> LogicalTensor:
    sharded = {axis: split for axis in axes if (split := weight.sharded.get(axis.removesuffix(BLOCKS)))}
    return replace(weight, key=state_key(name, weight.key), axes=axes, shape=shape, sharded=sharded, fan_in=())
