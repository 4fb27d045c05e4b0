"""Making one checkpoint out of another in pieces, so that models of any size pass through little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint.format import MANIFEST
from pretrain.checkpoint.steps import list_moments
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.errors import CheckpointError
from pretrain.model.logical import LogicalTensor
from pretrain.optim.states import state_key
from pretrain.run_directory import CHECKPOINTS

# Entries of a box that is made and written as one.
BOX_ENTRIES = 1 << 26

# Keys of a configuration that decide which tensors a checkpoint has.
SHAPING = ("model.", "optim.kind", "optim.routes", "optim.soap.block_size", "optim.kron.block_size")

Progress = Callable[[int, int], None]
"""Called with the number of entries done and of all."""


def sound_checkpoint(source: Path) -> Path:
    """The checkpoint that is meant, `source` itself or the newest of a run directory, read in full and found sound.

    Raises CheckpointError.
    """
    found = list_moments(source / CHECKPOINTS)
    path = list(found.values())[-1] if found else source
    if not (path / MANIFEST).exists() and not found:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run directory with one; check the path")
    findings = verify_checkpoint(path)
    if findings:
        raise CheckpointError(f"{path}: damaged ({'; '.join(findings[:3])}); give another checkpoint")
    return path


def check_new(out: Path) -> None:
    """CheckpointError if the run directory `out` has checkpoints."""
    if (out / CHECKPOINTS).exists():
        raise CheckpointError(f"{out}: has checkpoints already; give a new folder")


def most_precise(stored: Container[str], key: str) -> str:
    """The key under which the most precise weights of a tensor are stored: its fp32 master's, where there is one."""
    master = state_key("master", key)
    return master if master in stored else key


def cut(tensor: LogicalTensor, key: str, dtype: torch.dtype) -> Iterator[ShardedTensor]:
    """A tensor in boxes of about BOX_ENTRIES along its first axis, on the meta device."""
    yield from cut_rows(key, tensor.shape, dtype, range(tensor.shape[0]))


def cut_rows(key: str, shape: Sequence[int], dtype: torch.dtype, rows: range) -> Iterator[ShardedTensor]:
    """As `cut`, of a tensor of this shape and some consecutive indices of its first axis alone."""
    step = max(1, BOX_ENTRIES // math.prod(shape[1:]))
    for start in range(rows.start, rows.stop, step):
        box = (min(step, rows.stop - start), *shape[1:])
        offset = (start, *[0] * (len(box) - 1))
        data = torch.empty(box, dtype=dtype, device="meta")
        yield ShardedTensor(key, data, dtype, box, tuple(shape), offset, None, (0, 0, 0))


def cut_experts(
    key: str, shape: Sequence[int], dtype: torch.dtype, experts: Iterable[int] | None
) -> Iterator[ShardedTensor]:
    """As `cut_rows`, of a tensor whose first axis are experts, the rows of some of them; None: everything."""
    for rows in (range(shape[0]),) if experts is None else (range(expert, expert + 1) for expert in experts):
        yield from cut_rows(key, shape, dtype, rows)


def counted(
    data_of: Callable[[ShardedTensor], torch.Tensor], boxes: Sequence[ShardedTensor], progress: Progress
) -> Callable[[ShardedTensor], torch.Tensor]:
    """`data_of`, telling of its progress."""
    total, done = sum(math.prod(box.local_shape) for box in boxes), 0

    def with_count(box: ShardedTensor) -> torch.Tensor:
        nonlocal done
        values = data_of(box)
        done += values.numel()
        progress(done, total)
        return values

    return with_count
