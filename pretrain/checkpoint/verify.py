"""Reading the manifest and the index of a checkpoint with every check that does not need the model."""

from __future__ import annotations

import hashlib
import json
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.boxes import tiling_problem
from pretrain.checkpoint.format import (
    CONFIG,
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    MAX_TEXT_BYTES,
    STATE,
    TEXT_FILES,
    Index,
    Manifest,
    StoredBox,
    manifest_digest,
)
from pretrain.checkpoint.steps import moment_of
from pretrain.errors import CheckpointError
from pretrain.optim.states import STATE_PREFIX


def verify_checkpoint(directory: Path, *, deep: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each; an empty list when it is sound.

    Files are never unpickled, and none outside the folder is opened. Without `deep`, the shards' contents are not
    hashed: their presence, size and headers and all text files still are checked.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    findings = _folder_findings(directory, manifest)
    # What is missing or has another size need not be opened as well.
    sound = [name for name in manifest.files if not any(finding.startswith(f"{name}: ") for finding in findings)]
    findings += hash_findings(directory, manifest, [name for name in sound if deep or name in TEXT_FILES])
    if not findings:
        findings += _content_findings(directory, manifest)
    return findings


def read_manifest(directory: Path) -> Manifest:
    """The manifest, its own hash and all its fields checked. Raises CheckpointError."""
    path = directory / MANIFEST
    try:
        if path.lstat().st_size > MAX_TEXT_BYTES or not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{MANIFEST}: not a file of at most {MAX_TEXT_BYTES} bytes")
        fields = _json_object(MANIFEST, path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST}: missing, so {directory} is no checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: {error.strerror}") from error
    if fields.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST}: format is {fields.get('format')!r:.40}, not {FORMAT!r}")
    if fields.get("format_version") != FORMAT_VERSION:
        version = f"{fields.get('format_version')!r:.40}"
        raise CheckpointError(
            f"{MANIFEST}: format version {version}, this program reads {FORMAT_VERSION}: use the release that wrote it"
        )
    if fields.get("sha256") != manifest_digest(fields):
        raise CheckpointError(f"{MANIFEST}: changed (its own sha256 does not match)")
    try:
        manifest = Manifest.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST}: {_first(error)}") from error
    if missing := [name for name in TEXT_FILES if name not in manifest.files]:
        raise CheckpointError(f"{MANIFEST}: does not list {', '.join(missing)}")
    if MANIFEST in manifest.files:
        raise CheckpointError(f"{MANIFEST}: lists itself")
    return manifest


def read_index(directory: Path, manifest: Manifest) -> Index:
    """The index; every key's boxes cover it exactly once, or at most once if it is partial, which only state of the
    optimizer may be, and lie in listed files. Raises CheckpointError."""
    try:
        index = Index.model_validate_json(read_text(directory, manifest, INDEX))
    except ValidationError as error:
        raise CheckpointError(f"{INDEX}: {_first(error)}") from error
    for key, tensor in index.tensors.items():
        problem = tiling_problem(tensor.shape, [stored.box for stored in tensor.boxes], partial=tensor.partial)
        if tensor.partial and not key.startswith(STATE_PREFIX):
            problem = "a weight must not be partial"
        if tensor.dtype not in DTYPES:
            problem = f"unknown dtype {tensor.dtype!r:.40}"
        for stored in tensor.boxes:
            if stored.file not in manifest.files or stored.file in TEXT_FILES:
                problem = f"{stored.file} is no shard of the manifest"
        if problem:
            raise CheckpointError(f"{INDEX}: {key}: {problem}")
    return index


def read_text(directory: Path, manifest: Manifest, name: str) -> bytes:
    """Contents of one of the text files, checked against the manifest. Raises CheckpointError."""
    findings = _file_findings(directory, manifest, name) or hash_findings(directory, manifest, [name])
    if not findings and manifest.files[name].bytes > MAX_TEXT_BYTES:
        findings = [f"{name}: more than {MAX_TEXT_BYTES} bytes"]
    if findings:
        raise CheckpointError(findings[0])
    return (directory / name).read_bytes()


def read_json(directory: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """A text file that holds one JSON object, checked against the manifest. Raises CheckpointError."""
    return _json_object(name, read_text(directory, manifest, name))


def hash_findings(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Which of the named files do not have the SHA-256 of the manifest. Reads them in full."""
    findings = []
    for name in names:
        try:
            with (directory / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            findings.append(f"{name}: {error.strerror}")
            continue
        if digest != manifest.files[name].sha256:
            findings.append(f"{name}: changed (sha256 differs from the manifest's)")
    return findings


def _folder_findings(directory: Path, manifest: Manifest) -> list[str]:
    """Missing, truncated and unknown files, and a folder named after another step."""
    findings = [finding for name in manifest.files for finding in _file_findings(directory, manifest, name)]
    present = {path.name for path in directory.iterdir()}
    findings += [f"{name}: not in the manifest" for name in sorted(present - set(manifest.files) - {MANIFEST})]
    moment = moment_of(directory)
    if moment and moment.step != manifest.step:
        findings.append(f"{MANIFEST}: step {manifest.step}, but the folder is {directory.name}")
    return findings


def _file_findings(directory: Path, manifest: Manifest, name: str) -> list[str]:
    try:
        status = (directory / name).lstat()
    except OSError as error:
        return [f"{name}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"]
    if not stat.S_ISREG(status.st_mode):
        return [f"{name}: not a regular file"]
    size = manifest.files[name].bytes
    return [f"{name}: {status.st_size} bytes, the manifest says {size}"] if status.st_size != size else []


def _content_findings(directory: Path, manifest: Manifest) -> list[str]:
    """Text files that do not parse, and shards that do not hold what the index says."""
    findings = []
    try:
        read_json(directory, manifest, STATE)
        tomllib.loads(read_text(directory, manifest, CONFIG).decode())
        index = read_index(directory, manifest)
    except CheckpointError as error:
        return [str(error)]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return [f"{CONFIG}: {error}"]
    expected: dict[str, dict[str, tuple[str, StoredBox]]] = {name: {} for name in manifest.files}
    for tensor in index.tensors.values():
        for stored in tensor.boxes:
            if stored.name in expected[stored.file]:
                findings.append(f"{INDEX}: {stored.name} of {stored.file} is used twice")
            expected[stored.file][stored.name] = (tensor.dtype, stored)
    for name in sorted(set(manifest.files) - set(TEXT_FILES)):
        findings += _shard_findings(directory / name, expected[name])
    return findings


def _shard_findings(path: Path, expected: dict[str, tuple[str, StoredBox]]) -> list[str]:
    try:
        # safetensors itself checks that the header is sane and that its tensors fill the file exactly.
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            findings = [f"{path.name}: {name} is not in the index" for name in sorted(present - set(expected))]
            for name, (dtype, stored) in expected.items():
                if name not in present:
                    findings.append(f"{path.name}: {name} is missing")
                    continue
                part = file.get_slice(name)
                found = (part.get_dtype(), list(part.get_shape()))
                if found != (dtype, list(stored.shape)):
                    findings.append(f"{path.name}: {name} is {found}, the index says {(dtype, list(stored.shape))}")
            return findings
    except (SafetensorError, OSError) as error:
        return [f"{path.name}: {error}"]


def _json_object(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON ({error})" if data else f"{name}: empty") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: not a JSON object")
    return value


def _first(error: ValidationError) -> str:
    """The first problem of a schema check, in one line."""
    problem = error.errors()[0]
    # A location holds names out of the file; escaped, they cannot break the line.
    where = ".".join(str(part)[:80] for part in problem["loc"]).encode("unicode_escape").decode()
    return f"{where}: {problem['msg']}"
