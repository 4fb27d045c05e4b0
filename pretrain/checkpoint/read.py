"""Reading a checkpoint: into tensors of any layout, of which each rank reads the slices that fall into its boxes, or
piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.boxes import Box, lies_in
from pretrain.checkpoint.format import CONFIG, DTYPE_NAMES, DTYPES, STATE, Index, StoredBox
from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.verify import read_index, read_json, read_manifest, read_text
from pretrain.errors import CheckpointError

# Shards that a reader keeps open, so that each box does not parse a header again. Each is a mapping of the whole file.
MAX_OPEN_FILES = 64


class CheckpointReader:
    """Reads any box of any tensor of a checkpoint, in one process. A context manager: leaving it closes the files.

    Opening checks manifest and index. The shards are not hashed: `verify_checkpoint` does. Every method raises
    CheckpointError with the name of the checkpoint and of the file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with _named(directory):
            self.index = read_index(directory, read_manifest(directory))
        # The one used last is at the end.
        self._open: dict[str, safe_open] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._open:
            self._close_oldest()

    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key -> element type and shape of every logical tensor."""
        return {key: (DTYPES[tensor.dtype], tensor.shape) for key, tensor in self.index.tensors.items()}

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A copy of the part of tensor `key` of this shape that starts at `offset`."""
        if key not in self.index.tensors:
            raise CheckpointError(f"{self.directory}: {key} is not in the checkpoint")
        stored, box = self.index.tensors[key], Box(tuple(offset), tuple(shape))
        assert lies_in(box, stored.shape), (key, box, stored.shape)
        data = torch.empty(box.shape, dtype=DTYPES[stored.dtype])
        self.fill([(key, box, data)])
        return data

    def fill(self, parts: Iterable[tuple[str, Box, torch.Tensor]]) -> None:
        """Copy into each tensor the given box of the given key, file by file, one slice in memory at a time.

        The tensors may be on any device and of another element type, to which values are cast.
        """
        reads: dict[str, list[tuple[StoredBox, str, Box, torch.Tensor]]] = {}
        for key, box, data in parts:
            stored_as = self.index.tensors[key]
            for stored in stored_as.boxes:
                if stored.box.intersect(box):
                    reads.setdefault(stored.file, []).append((stored, stored_as.dtype, box, data))
        with _named(self.directory):
            for name, wanted in reads.items():
                try:
                    for stored, dtype, box, data in wanted:
                        _copy_common_part(self._shard(name), stored, dtype, box, data)
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{name}: {error}") from error

    def _shard(self, name: str) -> safe_open:
        file = self._open.pop(name, None) or safe_open(self.directory / name, framework="pt")
        self._open[name] = file
        if len(self._open) > MAX_OPEN_FILES:
            self._close_oldest()
        return file

    def _close_oldest(self) -> None:
        # safetensors knows no other way to close a file.
        self._open.pop(next(iter(self._open))).__exit__(None, None, None)


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
        reader = CheckpointReader(directory)
        _check_fit(directory, reader.index, tensors, convert=convert)
    wanted = ranks.gather(sorted({tensor.key for tensor in tensors}))
    with ranks.together():
        if ranks.rank == 0:
            _check_all_wanted(directory, reader.index, {key for keys in wanted for key in keys}, leave_out)
    with ranks.together(), reader:
        reader.fill((tensor.key, _box(tensor), tensor.data) for tensor in tensors)


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


def _copy_common_part(file: safe_open, stored: StoredBox, dtype: str, box: Box, data: torch.Tensor) -> None:
    """Copy what a stored box and `box` have in common from the file to `data`, which holds `box`."""
    common = stored.box.intersect(box)
    assert common
    source = file.get_slice(stored.name)
    if (source.get_dtype(), tuple(source.get_shape())) != (dtype, stored.shape):
        raise CheckpointError(f"{stored.file}: {stored.name} is not what the index says")
    with torch.no_grad():
        data[common.slices_in(box)].copy_(source[common.slices_in(stored.box)])


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
