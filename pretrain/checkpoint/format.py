"""What lies in a checkpoint folder: file names, the JSON schemas, and how they are encoded.

README.md beside this file is the specification for readers that do not use this package. Everything here treats
the files as untrusted input: names are plain file names, numbers are bounded, unknown fields are refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pretrain.checkpoint.boxes import Box

FORMAT = "meristem-checkpoint"
FORMAT_VERSION = 1

MANIFEST, INDEX, STATE, CONFIG = "manifest.json", "index.json", "state.json", "config.toml"
TEXT_FILES = (INDEX, STATE, CONFIG)

# No honest text file comes near this: the index of 50,000 boxes has 10 MB.
MAX_TEXT_BYTES = 1 << 30

# safetensors' names of the element types it and torch share.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Starts with a letter or digit: neither `..`, nor a hidden file, nor anything with a separator.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=255)]
# Below 2**63 with room to add two of them, because boxes are compared as int64.
Extent = Annotated[int, Field(ge=0, lt=1 << 60)]
Extents = Annotated[tuple[Extent, ...], Field(max_length=16)]


class Record(BaseModel):
    """Part of a JSON file; takes no unknown field and converts nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredBox(Record):
    """Where one box of a logical tensor lies: tensor `name` of safetensors file `file`."""

    file: FileName
    name: str
    offset: Extents
    shape: Extents

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


class StoredTensor(Record):
    """One logical tensor; its boxes cover every entry exactly once, or at most once if it is partial."""

    dtype: str
    """A key of DTYPES."""
    shape: Extents
    boxes: tuple[StoredBox, ...]
    partial: bool = False
    """Whether entries are missing: state of experts that another site trains. Weights never are partial."""


class Index(Record):
    """index.json: logical key -> where its parts lie."""

    tensors: dict[str, StoredTensor]


class FileEntry(Record):
    """What a file of the checkpoint has to be."""

    bytes: Extent
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Record):
    """manifest.json: the checkpoint's table of contents, written last."""

    format: Literal["meristem-checkpoint"]
    format_version: Literal[1]
    step: Extent
    created: str
    """UTC, ISO 8601."""
    world_size: Annotated[int, Field(ge=1)]
    """Processes that wrote it."""
    versions: dict[str, str]
    files: dict[FileName, FileEntry]
    """Every other file of the folder."""
    sha256: str
    """Of the canonical JSON of all other fields, see `manifest_digest`."""


def to_json(value: object) -> bytes:
    """Readable JSON, one top-level field per line. Raises ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(value, indent=1, allow_nan=False).encode()


def manifest_digest(fields: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields without `sha256`, as sorted JSON without spaces."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
