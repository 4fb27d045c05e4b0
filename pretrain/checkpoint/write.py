"""Writing a checkpoint: every rank its own boxes, then the index and the manifest, then the rename.

Nothing under the checkpoint's name changes before the last step, so a failure anywhere leaves what was there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from safetensors import SafetensorError
from safetensors.torch import save_file

import pretrain
from pretrain.checkpoint.boxes import Box, tiling_problem
from pretrain.checkpoint.format import (
    CONFIG,
    DTYPE_NAMES,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    STATE,
    FileEntry,
    manifest_digest,
    to_json,
)
from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.steps import PARTIAL, put_in_place
from pretrain.errors import CheckpointError
from pretrain.optim.states import STATE_PREFIX

# A rank starts another file at this size: it bounds the host memory that tensors pass through on their way from a GPU
# or out of `data_of`, and lets several readers hash a rank's tensors at once.
MAX_FILE_BYTES = 1 << 30

Files = dict[str, dict[str, ShardedTensor]]
"""File name -> name of the tensor in it -> tensor."""


def write_checkpoint(
    directory: Path,
    tensors: Sequence[ShardedTensor],
    *,
    step: int,
    state: Mapping[str, object],
    config_toml: str,
    partial_keys: Collection[str] = (),
    data_of: Callable[[ShardedTensor], torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint of all ranks' `tensors` to `directory`; it is durable and valid when this returns.

    Collective over `group` (see `Ranks`). Together, the ranks' main replicas (replica_id all zero) must cover each
    key exactly once; of `partial_keys`, which are keys of the optimizer, entries may be missing: the index then says
    so. They and `state`, JSON values only, are rank 0's. A checkpoint that `directory` holds already is
    replaced, whole.

    With `data_of`, the data of `tensors` says only shape and type, and may be on the meta device: what is written is
    what `data_of` gives for each main replica, asked for when its file's turn comes and dropped when that is written.
    So a rank holds one file's tensors at a time: MAX_FILE_BYTES, or a single tensor that is larger. It is called once
    per tensor, in the order given, on ranks by themselves: it must not be collective.

    Raises the same CheckpointError on all ranks when one of them cannot write; nothing is
    left behind then, and what was in `directory` before still is.
    """
    ranks = Ranks(group)
    partial = directory.with_name(directory.name + PARTIAL)
    with ranks.together():
        files = _plan_files(tensors, ranks.rank)
    boxes = ranks.gather(_describe(files))
    texts: dict[str, bytes] = {}
    with ranks.together():
        if ranks.rank == 0:
            texts = {INDEX: _index(boxes, partial_keys), STATE: to_json(dict(state)), CONFIG: config_toml.encode()}
    need = ranks.broadcast(_tensor_bytes(boxes) + sum(map(len, texts.values())))
    try:
        with ranks.together(), _disk_errors(partial, need=need):
            if ranks.rank == 0:
                _prepare(partial, need=need)
        with ranks.together(), _disk_errors(partial, need=need):
            written = {name: _write_shard(partial / name, content, data_of) for name, content in files.items()}
        entries = ranks.gather({name: entry.model_dump() for name, entry in written.items()})
        with ranks.together(), _disk_errors(partial, need=need):
            if ranks.rank == 0:
                _finish(partial, directory, texts, entries, step=step)
    except Exception:
        # Every rank comes here, and none is writing any more.
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _plan_files(tensors: Sequence[ShardedTensor], rank: int) -> Files:
    """This rank's main replicas, dealt to files of about MAX_FILE_BYTES in the given order."""
    files: Files = {}
    used = MAX_FILE_BYTES
    for tensor in tensors:
        if not is_main_replica(tensor.replica_id):
            continue
        if used + tensor.data.nbytes > MAX_FILE_BYTES:
            content: dict[str, ShardedTensor] = {}
            files[f"shard_{rank:05d}_{len(files):03d}.safetensors"] = content
            used = 0
        # The offset makes the name unique over all ranks, and a shard readable without the index.
        name = f"{tensor.key}@{','.join(map(str, tensor.global_offset))}"
        if any(name in other for other in files.values()):
            raise ValueError(f"{name} is given twice")
        content[name] = tensor
        used += tensor.data.nbytes
    return files


def _describe(files: Files) -> list[dict[str, Any]]:
    """What rank 0 needs to know about this rank's boxes."""
    return [
        {
            "key": tensor.key,
            "dtype": DTYPE_NAMES[tensor.dtype],
            "global_shape": list(tensor.global_shape),
            "nbytes": tensor.data.nbytes,
            "box": {
                "file": file,
                "name": name,
                "offset": list(tensor.global_offset),
                "shape": list(tensor.local_shape),
            },
        }
        for file, content in files.items()
        for name, tensor in content.items()
    ]


def _tensor_bytes(boxes: Sequence[list[dict[str, Any]]]) -> int:
    return sum(box["nbytes"] for rank in boxes for box in rank)


def _index(boxes: Sequence[list[dict[str, Any]]], partial_keys: Collection[str]) -> bytes:
    """index.json of all ranks' boxes. Raises ValueError unless they cover each key exactly once, `partial_keys` at most
    once."""
    tensors: dict[str, dict[str, Any]] = {}
    for box in (box for rank in boxes for box in rank):
        head = {"dtype": box["dtype"], "shape": box["global_shape"]}
        tensor = tensors.setdefault(box["key"], {**head, "boxes": []})
        if {name: tensor[name] for name in head} != head:
            raise ValueError(f"ranks disagree on {box['key']}: {head} and {tensor['dtype']}, {tensor['shape']}")
        tensor["boxes"].append(box["box"])
    for key, tensor in tensors.items():
        parts = [Box(tuple(box["offset"]), tuple(box["shape"])) for box in tensor["boxes"]]
        problem = tiling_problem(tensor["shape"], parts)
        if problem and key in partial_keys:
            assert key.startswith(STATE_PREFIX), f"{key}: a weight must not be partial"
            tensor["partial"] = True
            problem = tiling_problem(tensor["shape"], parts, partial=True)
        if problem:
            raise ValueError(f"{key}: {problem}")
    return to_json({"tensors": tensors})


def _prepare(partial: Path, *, need: int) -> None:
    """An empty folder to write to, on a disk that has room."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if shutil.disk_usage(partial).free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_shard(
    path: Path, content: dict[str, ShardedTensor], data_of: Callable[[ShardedTensor], torch.Tensor] | None
) -> FileEntry:
    on_host: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in content.items():
        given = data_of(tensor) if data_of else tensor.data
        if (given.shape, given.dtype) != (tensor.data.shape, tensor.data.dtype):
            expected = f"{tensor.data.dtype} {list(tensor.data.shape)}"
            raise ValueError(f"{name}: expected {expected}, was given {given.dtype} {list(given.shape)}")
        # Copies only what is on a GPU or not contiguous; safetensors writes the rest from where it is. It refuses
        # memory that it has seen, which two keys of one tensor share (in fp32, a weight and its master).
        data = given.detach().cpu().contiguous()
        on_host[name] = data.clone() if data.data_ptr() in addresses else data
        addresses.add(data.data_ptr())
    save_file(on_host, path)
    # safetensors makes files that only their owner reads; the folder's mode follows the user's umask.
    path.chmod(path.parent.stat().st_mode & 0o666)
    return _seal(path)


def _finish(
    partial: Path, directory: Path, texts: Mapping[str, bytes], entries: Sequence[dict[str, Any]], *, step: int
) -> None:
    """Index, state, configuration, manifest, rename. On rank 0, when all shards are written."""
    files = {name: entry for rank in entries for name, entry in rank.items()}
    for name, entry in files.items():
        path = partial / name
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path}: written by another rank, but rank 0 does not see it: run.directory must be on a file "
                "system that all nodes share"
            )
    for name, text in texts.items():
        files[name] = _write_text(partial / name, text).model_dump()
    fields: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": len(entries),
        "versions": {
            "meristem": pretrain.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
            "safetensors": version("safetensors"),
        },
        "files": files,
    }
    _write_text(partial / MANIFEST, to_json({**fields, "sha256": manifest_digest(fields)}))
    put_in_place(partial, directory)


def _write_text(path: Path, text: bytes) -> FileEntry:
    path.write_bytes(text)
    return _seal(path)


def _seal(path: Path) -> FileEntry:
    """Bring a written file to the disk, and hash what reads back."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


@contextmanager
def _disk_errors(directory: Path, *, need: int) -> Iterator[None]:
    """Errors of the file system as a CheckpointError with a remedy. `need`: bytes that the body writes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the errno only inside its message.
        in_text = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{directory}: no space left: need {_mib(need)}, have {_mib(_room(directory))}; free some space, or "
                "lower checkpoint.keep"
            ) from error
        reason = error if code is None else os.strerror(code)
        raise CheckpointError(f"{directory}: cannot write the checkpoint: {reason}") from error


def _room(directory: Path) -> int:
    """Bytes this save can use: what is free, and what its finished files take."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free + sum(path.stat().st_size for path in directory.glob("shard_*"))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
