"""Loading a checkpoint into tensors of any layout: each rank reads the slices that fall into its boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.boxes import Box, lies_in
from pretrain.checkpoint.format import CONFIG, DTYPE_NAMES, STATE, Index, StoredBox
from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.verify import read_index, read_json, read_manifest, read_text
from pretrain.errors import CheckpointError


def read_checkpoint(
    directory: Path,
    tensors: Sequence[ShardedTensor],
    *,
    leave_out: Sequence[str] = (),
    convert: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill the data of all given tensors, replicas included, in place.

    Collective over `group` (see `Ranks`). The checkpoint must hold every given key with the same global shape and
    dtype (`convert`: cast other dtypes), and every key it holds must be wanted by some rank, except those
    that start with a prefix in `leave_out`. Raises the same CheckpointError on all ranks, before anything
    is changed; only a read error of a shard can leave tensors half filled.

    Does not hash the shards: `Checkpoints.latest_valid` and `verify_checkpoint` do.
    """
    ranks = Ranks(group)
    with ranks.together():
        with _named(directory):
            index = read_index(directory, read_manifest(directory))
        _check_fit(directory, index, tensors, convert=convert)
    wanted = ranks.gather(sorted({tensor.key for tensor in tensors}))
    with ranks.together():
        if ranks.rank == 0:
            _check_all_wanted(directory, index, {key for keys in wanted for key in keys}, leave_out)
    with ranks.together(), _named(directory):
        _fill(directory, index, tensors)


def read_state(directory: Path) -> dict[str, Any]:
    """The run state that was given to the save. Raises CheckpointError."""
    with _named(directory):
        return read_json(directory, read_manifest(directory), STATE)


def read_config(directory: Path) -> str:
    """The resolved configuration that was given to the save, as TOML. Raises CheckpointError."""
    with _named(directory):
        return read_text(directory, read_manifest(directory), CONFIG).decode()


def _check_fit(directory: Path, index: Index, tensors: Sequence[ShardedTensor], *, convert: bool) -> None:
    """Every tensor is in the index, with the same global shape and dtype."""
    problems = []
    for tensor in tensors:
        stored = index.tensors.get(tensor.key)
        if stored is None:
            problems.append(f"{tensor.key} is not in the checkpoint")
        elif stored.shape != tuple(tensor.global_shape):
            sizes = f"{list(stored.shape)} in the checkpoint, {list(tensor.global_shape)} in the model"
            problems.append(f"{tensor.key} is {sizes}")
        else:
            assert lies_in(_box(tensor), stored.shape), tensor
    if problems:
        raise CheckpointError(
            f"{directory}: the checkpoint is of another architecture or optimizer: {_few(problems)}. Use the [model] "
            f"and [optim] sections of its {CONFIG}, or another run.directory"
        )
    casts = [
        f"{tensor.key} is {stored.dtype} in the checkpoint, {DTYPE_NAMES[tensor.dtype]} in the model"
        for tensor in tensors
        if (stored := index.tensors[tensor.key]).dtype != DTYPE_NAMES[tensor.dtype]
    ]
    if casts and not convert:
        raise CheckpointError(
            f"{directory}: the checkpoint is of another precision: {_few(casts)}. Set run.precision as in its {CONFIG}"
        )


def _check_all_wanted(directory: Path, index: Index, wanted: set[str], leave_out: Sequence[str]) -> None:
    """Nothing in the checkpoint is passed over in silence, and no prefix of `leave_out` is a misspelling."""
    for prefix in leave_out:
        if not any(key.startswith(prefix) for key in index.tensors):
            raise CheckpointError(f"{directory}: no key starts with {prefix!r}, which was to be left out")
    unread = [key for key in index.tensors if key not in wanted and not key.startswith(tuple(leave_out))]
    if unread:
        raise CheckpointError(
            f"{directory}: the checkpoint is of another architecture or optimizer: it also holds {_few(unread)}. Use "
            f"the [model] and [optim] sections of its {CONFIG}, or another run.directory"
        )


def _fill(directory: Path, index: Index, tensors: Iterable[ShardedTensor]) -> None:
    """Copy every stored box's part of every tensor, file by file, one slice in memory at a time."""
    reads: dict[str, list[tuple[StoredBox, Box, ShardedTensor]]] = {}
    for tensor in tensors:
        for stored in index.tensors[tensor.key].boxes:
            if common := stored.box.intersect(_box(tensor)):
                reads.setdefault(stored.file, []).append((stored, common, tensor))
    for name, parts in reads.items():
        try:
            with safe_open(directory / name, framework="pt") as file, torch.no_grad():
                for stored, common, tensor in parts:
                    source = file.get_slice(stored.name)
                    found = (source.get_dtype(), tuple(source.get_shape()))
                    if found != (index.tensors[tensor.key].dtype, stored.shape):
                        raise CheckpointError(f"{name}: {stored.name} is not what the index says")
                    tensor.data[common.slices_in(_box(tensor))].copy_(source[common.slices_in(stored.box)])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name}: {error}") from error


def _box(tensor: ShardedTensor) -> Box:
    return Box(tuple(tensor.global_offset), tuple(tensor.local_shape))


def _few(items: Sequence[str]) -> str:
    """The first few of a list, and how many there are."""
    shown = "; ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown}; and {len(items) - 3} more"


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Say which checkpoint an error of one of its files is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
