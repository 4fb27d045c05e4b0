"""The files of a dataset PREFIX: Megatron's PREFIX.bin and PREFIX.idx, and our sidecar PREFIX.json.

    .bin    the token ids of all sequences, one after another, little endian
    .idx    9 bytes magic, u64 version, u8 dtype code, u64 sequences, u64 document bounds; then per sequence its length
            (i32) and its byte offset into .bin (i64); then the bounds of documents as sequence numbers (i64)
    .json   what the dataset was made of and with which tokenizer, counts, sizes and SHA-256 (see `Sidecar`)

A dataset made by Megatron's own tools has no sidecar and needs none.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from pydantic import Field, ValidationError

from pretrain.config.base import Count, Fraction, PositiveInt, Section
from pretrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_REMEDY = "copy or prepare the dataset again"
_BLOCK = 1 << 20  # sequences checked in one go; bounds memory, as every rank opens every dataset


def bin_path(prefix: Path) -> Path:
    """The token ids of a dataset."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Where each document lies in the ids."""
    return prefix.with_name(prefix.name + ".idx")


def sidecar_path(prefix: Path) -> Path:
    """What we know of a dataset that Megatron's format has no place for."""
    return prefix.with_name(prefix.name + ".json")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileRecord(Section):
    """Size and hash of a file."""

    bytes: Count
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(bytes=path.stat().st_size, sha256=sha256_of(path))


class TokenizerRecord(Section):
    """The tokenizer a dataset was made with."""

    file: str
    """Name of the `tokenizer.json`, in the folder of the dataset."""
    sha256: str
    vocab_size: PositiveInt
    """Token ids are below this."""
    eod_token: str
    eod_id: Count
    """The token that ends every document."""


class SourceRecord(Section):
    """What a dataset was made of."""

    inputs: tuple[str, ...]
    files: Count
    """Files read for all splits together."""
    skipped: tuple[str, ...] = ()
    """Files, and lines of JSONL, that were left out because they are not UTF-8."""
    python: str | None = None
    """Python version, when its standard library is an input."""
    split: Literal["train", "valid"]
    valid_fraction: Fraction
    split_rule: str


class Sidecar(Section):
    """Contents of PREFIX.json."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerRecord
    documents: Count
    tokens: Count
    """Token ids in .bin, end-of-document tokens included."""
    text_bytes: Count
    """UTF-8 bytes of the text."""
    bin: FileRecord
    idx: FileRecord
    source: SourceRecord = Field(repr=False)


def read_sidecar(prefix: Path) -> Sidecar | None:
    """The sidecar of a dataset, or None where there is none. Raises DataError when it cannot be understood."""
    path = sidecar_path(prefix)
    if not path.exists():
        return None
    try:
        return Sidecar.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key or 'contents'}: {first['msg']}; {_REMEDY}") from error


@dataclass(frozen=True)
class Index:
    """What a sound .idx says."""

    dtype: np.dtype[Any]
    """Of the token ids in .bin."""
    sequences: int
    documents: int
    tokens: int


def check_files(prefix: Path) -> Index:
    """Read PREFIX.idx, check its structure and that PREFIX.bin fits it, without reading PREFIX.bin.

    Raises DataError at the first thing wrong. Stricter than the format in one point: sequences must lie in .bin
    without gaps in the order of the index, as Megatron's builder writes them, so that a position in the token stream
    is a position in the file.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a dataset PREFIX is PREFIX.bin and PREFIX.idx; check the path")
    dtype, sequences, bounds = _read_header(idx_path(prefix))
    lengths, pointers, documents = _map_arrays(idx_path(prefix), sequences, bounds)
    tokens = _check_arrays(idx_path(prefix), lengths, pointers, documents, dtype.itemsize)
    size, expected = bin_path(prefix).stat().st_size, tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"{bin_path(prefix)}: {size} bytes; the index lists {tokens} tokens of {dtype.itemsize} bytes, {expected} "
            f"bytes; {_REMEDY}"
        )
    return Index(dtype=dtype, sequences=sequences, documents=bounds - 1, tokens=tokens)


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Dtype of the token ids, number of sequences, number of document bounds."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"{path}: {len(head)} bytes; an index has a header of {_HEADER.size} bytes; {_REMEDY}")
    magic, version, code, sequences, bounds = _HEADER.unpack(head)
    if magic != MAGIC or version != 1:
        raise DataError(
            f"{path}: starts with {magic!r}, version {version}; a Megatron index starts with {MAGIC!r}, version 1; "
            f"check that this is an index, or {_REMEDY}"
        )
    if code not in [dtype.value for dtype in DType] or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        raise DataError(f"{path}: dtype code {code}; token ids have an integer dtype, codes 1 to 5 and 8; {_REMEDY}")
    if sequences == 0 or bounds == 0:
        raise DataError(
            f"{path}: {sequences} sequences, {bounds} document bounds; a dataset has at least one; {_REMEDY}"
        )
    size = path.stat().st_size
    expected = _HEADER.size + sequences * (4 + 8) + bounds * 8
    if size == expected + sequences:
        raise DataError(f"{path}: lists a mode per sequence; multimodal datasets are not read; use a text dataset")
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes; its header announces {sequences} sequences and {bounds} document bounds, "
            f"{expected} bytes; {_REMEDY}"
        )
    return np.dtype(DType.dtype_from_code(code)), sequences, bounds


def _map_arrays(path: Path, sequences: int, bounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths [sequences], byte offsets [sequences] and document bounds [bounds], mapped."""
    start = _HEADER.size
    lengths = np.memmap(path, np.int32, "r", offset=start, shape=(sequences,))
    start += lengths.nbytes
    pointers = np.memmap(path, np.int64, "r", offset=start, shape=(sequences,))
    start += pointers.nbytes
    return lengths, pointers, np.memmap(path, np.int64, "r", offset=start, shape=(bounds,))


def _check_arrays(path: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, itemsize: int) -> int:
    """Check that the three arrays fit together; returns the number of tokens."""
    position = 0  # in .bin, where the next sequence has to start
    for first in range(0, len(lengths), _BLOCK):
        sizes = lengths[first : first + _BLOCK].astype(np.int64) * itemsize
        found = pointers[first : first + _BLOCK]
        ends = position + np.cumsum(sizes)
        wrong = np.flatnonzero((sizes < 0) | (found != ends - sizes))
        if wrong.size:
            sequence = int(wrong[0])
            raise DataError(
                f"{path}: sequence {first + sequence} has length {int(lengths[first + sequence])} and starts at byte "
                f"{int(found[sequence])}; lengths are >= 0 and sequences lie one after another, which puts it at "
                f"{int((ends - sizes)[sequence])}; {_REMEDY}"
            )
        position = int(ends[-1])
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise DataError(
            f"{path}: document bounds run from {int(documents[0])} to {int(documents[-1])}; they rise from 0 to the "
            f"number of sequences, {len(lengths)}; {_REMEDY}"
        )
    return position // itemsize
