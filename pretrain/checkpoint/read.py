"""Reading a checkpoint: into tensors of any layout, of which each rank reads the slices that fall into its boxes, or
piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.boxes import Box, lies_in, uncovered
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

    def missing(self, key: str, box: Box) -> list[Box]:
        """The parts of a box of tensor `key` that the checkpoint does not have; none unless the tensor is partial."""
        stored = self.index.tensors[key]
        parts = {part.box for part in stored.boxes} if stored.partial else {box}
        return [] if box in parts else uncovered(box, parts)

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A copy of the part of tensor `key` of this shape that starts at `offset`; the checkpoint must have all of
        it."""
        if key not in self.index.tensors:
            raise CheckpointError(f"{self.directory}: {key} is not in the checkpoint")
        stored, box = self.index.tensors[key], Box(tuple(offset), tuple(shape))
        assert lies_in(box, stored.shape), (key, box, stored.shape)
        data = torch.empty(box.shape, dtype=DTYPES[stored.dtype])
        self.fill([(key, box, data)])
        return data

    def fill(self, parts: Iterable[tuple[str, Box, torch.Tensor]], *, but_for: Collection[str] = ()) -> None:
        """Copy into each tensor the given box of the given key, file by file, one slice in memory at a time.

        The tensors may be on any device and of another element type, to which values are cast. Of keys in `but_for`,
        what the checkpoint does not have stays as it is; it has to have all of the others.
        """
        reads: dict[str, list[tuple[StoredBox, str, Box, torch.Tensor]]] = {}
        for key, box, data in parts:
            stored_as = self.index.tensors[key]
            if key not in but_for and (gaps := self.missing(key, box)):
                raise CheckpointError(f"{self.directory}: {_gap(key, gaps)}")
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
    but_for: Collection[str] = (),
    convert: bool = False,
    group: dist.ProcessGroup | None = None,
) -> list[tuple[str, Box]]:
    """Fill the data of all given tensors, replicas included, in place.

    Collective over `group` (see `Ranks`). The checkpoint must hold every given key with the same global shape and
    dtype (`convert`: cast other dtypes), and all it holds must be wanted by some rank, except keys that start with a
    prefix in `leave_out`. Of keys in `but_for` (by default none), each may have entries that the other does not: those
    of the checkpoint alone are left out, those of the tensors alone stay as they are and are returned, box by box.
    Raises the same CheckpointError on all ranks, before anything is changed; only a read error of a shard can leave
    tensors half filled.

    Does not hash the shards: `Checkpoints.latest_valid` and `verify_checkpoint` do.
    """
    ranks = Ranks(group)
    with ranks.together():
        reader = CheckpointReader(directory)
        _check_fit(directory, reader.index, tensors, convert=convert)
        gaps = [(tensor.key, gap) for tensor in tensors for gap in reader.missing(tensor.key, _box(tensor))]
        _check_complete(directory, gaps, but_for)
    wanted = ranks.gather(_boxes_by_key(tensors))
    with ranks.together():
        if ranks.rank == 0:
            _check_all_wanted(directory, reader.index, wanted, leave_out, but_for)
    with ranks.together(), reader:
        reader.fill(((tensor.key, _box(tensor), tensor.data) for tensor in tensors), but_for=but_for)
    return gaps


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


def _check_complete(directory: Path, gaps: Sequence[tuple[str, Box]], but_for: Collection[str]) -> None:
    """No entry is missing from the checkpoint, but for keys that may miss some."""
    problems = [_gap(key, [gap]) for key, gap in gaps if key not in but_for]
    if problems:
        raise CheckpointError(
            f"{directory}: the checkpoint is of a site that trains other experts: {_few(problems)}. Use the "
            f"[decentral] section of its {CONFIG}, or another run.directory"
        )


def _check_all_wanted(
    directory: Path,
    index: Index,
    wanted: Sequence[Mapping[str, Sequence[Sequence[Sequence[int]]]]],
    leave_out: Sequence[str],
    but_for: Collection[str],
) -> None:
    """Nothing in the checkpoint is passed over in silence, and no prefix of `leave_out` is a misspelling.

    wanted: of each rank, (offset, shape) of its boxes by key.
    """
    for prefix in leave_out:
        if not any(key.startswith(prefix) for key in index.tensors):
            raise CheckpointError(f"{directory}: no key starts with {prefix!r}, which was to be left out")
    boxes: dict[str, set[Box]] = {}
    for key, (offset, shape) in ((key, box) for rank in wanted for key, of_key in rank.items() for box in of_key):
        boxes.setdefault(key, set()).add(Box(tuple(offset), tuple(shape)))
    tensors = {key: tensor for key, tensor in index.tensors.items() if not key.startswith(tuple(leave_out))}
    unread = [key for key in tensors if key not in boxes]
    if unread:
        raise CheckpointError(
            f"{directory}: the checkpoint is of another architecture or optimizer: it also holds {_few(unread)}. Use "
            f"the [model] and [optim] sections of its {CONFIG}, or another run.directory"
        )
    left = {
        key: parts
        for key, tensor in tensors.items()
        if key not in but_for
        and (parts := [part for stored in tensor.boxes for part in _unwanted(stored.box, boxes[key])])
    }
    if left:
        raise CheckpointError(
            f"{directory}: the checkpoint is of a run that trains more experts: it also holds "
            f"{_few([f'{_where(parts)} of {key}' for key, parts in left.items()])}. Use the [decentral] section of its "
            f"{CONFIG}, or another run.directory"
        )


def _unwanted(box: Box, wanted: Collection[Box]) -> list[Box]:
    """The parts of a stored box that no rank wants."""
    return [] if box in wanted else uncovered(box, wanted)


def _boxes_by_key(tensors: Sequence[ShardedTensor]) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """(offset, shape) of all boxes of every key."""
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for tensor in tensors:
        box = _box(tensor)
        found.setdefault(tensor.key, []).append((box.offset, box.shape))
    return found


def _gap(key: str, gaps: Sequence[Box]) -> str:
    return f"{key} has no {_where(gaps)}"


def _where(boxes: Sequence[Box]) -> str:
    """Some boxes in words: their places along the first axis, which is that of experts where parts are missing."""
    places = sorted({(box.offset[0], box.stop[0] - 1) for box in boxes})
    return "entries " + ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in places)


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
