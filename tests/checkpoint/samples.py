"""A small model's tensors, cut by hand for several layouts, and helpers that several test files use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import write_checkpoint

CONFIG = "[parallel]\ntensor = 2\nexpert = 4\nrecompute = 'none'\n"
STATE = {"step": 3, "tokens": 12288, "rng": {"seed": 1234}, "schedule": [0.5, None, True]}

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embedding.weight": ((8, 6), torch.bfloat16),
    "experts.fc1.weight": ((4, 2, 6, 5), torch.bfloat16),
    "norm.weight": ((6,), torch.float32),
    "optimizer.exp_avg.embedding.weight": ((8, 6), torch.float32),
    "optimizer.exp_avg.experts.fc1.weight": ((4, 2, 6, 5), torch.float32),
    "optimizer.count": ((), torch.int64),
}

# Layout -> per rank -> key -> sizes into which each axis is cut; a key that is not named is not cut.
EXPERTS = ("experts.fc1.weight", "optimizer.exp_avg.experts.fc1.weight")
EMBEDDING = ("embedding.weight", "optimizer.exp_avg.embedding.weight")
LAYOUTS: dict[str, tuple[int, dict[str, tuple[Sequence[int], ...]]]] = {
    "single": (1, {}),
    "rows": (2, {**dict.fromkeys(EMBEDDING, ((4, 4), (6,))), **dict.fromkeys(EXPERTS, ((2, 2), (2,), (6,), (5,)))}),
    "columns": (2, {EMBEDDING[0]: ((8,), (3, 3)), **dict.fromkeys(EXPERTS, ((4,), (2,), (3, 3), (5,)))}),
    "grid": (4, {**dict.fromkeys(EMBEDDING, ((2,) * 4, (6,))), **dict.fromkeys(EXPERTS, ((2, 2), (2,), (3, 3), (5,)))}),
    "uneven": (4, {EMBEDDING[1]: ((1, 4, 1, 2), (6,)), **dict.fromkeys(EXPERTS, ((4,), (1, 1), (1, 5), (5,)))}),
}


def bits(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every logical tensor with random bits: all kinds of NaN and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, (shape, dtype) in SHAPES.items():
        raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        result[key] = raw.view(dtype).reshape(shape)
    return result


def sharded(
    key: str, data: torch.Tensor, *, shape: Sequence[int], offset: Sequence[int], replica: int = 0
) -> ShardedTensor:
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        replica_id=(0, 0, replica),
    )


def whole(tensors: Mapping[str, torch.Tensor]) -> list[ShardedTensor]:
    """Tensors that one process holds in full."""
    return [sharded(key, data, shape=data.shape, offset=[0] * data.dim()) for key, data in tensors.items()]


def empty() -> dict[str, torch.Tensor]:
    """Where `bits` is loaded to: other bytes everywhere."""
    return {key: torch.full(shape, 77, dtype=dtype) for key, (shape, dtype) in SHAPES.items()}


def part(layout: str, rank: int, tensors: Mapping[str, torch.Tensor]) -> list[ShardedTensor]:
    """The boxes of `tensors` that this rank of a layout holds, as copies. Boxes are dealt out in turn; a tensor of
    fewer boxes than ranks is replicated."""
    world, cuts = LAYOUTS[layout]
    result = []
    for key, tensor in tensors.items():
        cut = cuts.get(key, tuple((size,) for size in tensor.shape))
        edges = [list(itertools.pairwise(itertools.accumulate(sizes, initial=0))) for sizes in cut]
        boxes = list(itertools.product(*edges))
        assert world % len(boxes) == 0
        box = boxes[rank % len(boxes)]
        data = tensor[tuple(slice(a, b) for a, b in box)].clone()
        offset = [a for a, _ in box]
        result.append(sharded(key, data, shape=tensor.shape, offset=offset, replica=rank // len(boxes)))
    return result


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def write_sample(directory: Path, *, seed: int = 0, step: int = 3) -> Path:
    """A checkpoint of `bits(seed)` by one process."""
    write_checkpoint(directory, whole(bits(seed)), step=step, state=STATE, config_toml=CONFIG)
    return directory
