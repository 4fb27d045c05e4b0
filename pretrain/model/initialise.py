"""Initial weights that depend on the seed and the logical tensor alone, never on the layout.

Each logical tensor is drawn in fixed blocks along its first axis, every block from a generator of its own, keyed
by (seed, tensor key, block). A rank draws the blocks its box touches and keeps its part, so that any layout holds
the same logical weights bit for bit, and no rank draws a whole large tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from pretrain.config.schema import ModelConfig
from pretrain.model.logical import LogicalTensor
from pretrain.model.shards import Shard

# Entries per block, about; a block is at least one index of the first axis. Changing it changes initial weights.
BLOCK_ENTRIES = 1 << 20


def standard_deviation(logical: LogicalTensor, model: ModelConfig) -> float:
    """Standard deviation of a tensor's initial entries; 0 for those that start as constants.

    Projections into the residual stream are scaled by 1/sqrt(2 * num_layers), as the stream sums two branches per
    layer (GPT-2; Megatron's scaled init).
    """
    if logical.kind in ("norm", "router_bias"):
        return 0.0
    return model.init_std / math.sqrt(2 * model.num_layers) if logical.writes_stream else model.init_std


def draw_normal(
    seed: int, key: str, shape: tuple[int, ...], offset: tuple[int, ...], extent: tuple[int, ...]
) -> torch.Tensor:
    """The box [offset, offset + extent) of the standard normal tensor that (seed, key, shape) stands for, in fp32."""
    row = math.prod(shape[1:])
    rows_per_block = max(1, BLOCK_ENTRIES // row)
    out = torch.empty(extent, dtype=torch.float32)
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], extent[1:], strict=True))
    first, end = offset[0], offset[0] + extent[0]
    for block in range(first // rows_per_block, math.ceil(end / rows_per_block)):
        start = block * rows_per_block
        rows = min(rows_per_block, shape[0] - start)
        digest = hashlib.sha256(f"{seed}/{key}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.randn((rows, *shape[1:]), generator=generator)
        low, high = max(first, start), min(end, start + rows)
        out[low - first : high - first] = values[(slice(low - start, high - start), *inner)]
    return out


@torch.no_grad()
def initialise(shards: Iterable[Shard], model: ModelConfig, seed: int) -> None:
    """Fill every shard with its part of the initial logical weights."""
    for shard in shards:
        std = standard_deviation(shard.logical, model)
        if std > 0:
            values = draw_normal(seed, shard.key, shard.logical.shape, shard.offset, shard.shape)
            shard.view().copy_(values.mul_(std))
        else:
            shard.tensor.fill_(1.0 if shard.logical.kind == "norm" else 0.0)
