"""`pretrain data verify`: read a dataset to its end and say everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain.data.files import (
    FileRecord,
    Index,
    Sidecar,
    bin_path,
    check_files,
    idx_path,
    read_sidecar,
    sha256_of,
    sidecar_path,
)
from pretrain.data.tokenizer import load_tokenizer, vocab_size_of
from pretrain.errors import DataError

_SCAN_TOKENS = 16 << 20  # tokens looked at in one go


@dataclass(frozen=True)
class Finding:
    """One thing to know about a dataset, in one line: the file, the value, the rule, the remedy."""

    level: Literal["error", "note"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def verify(prefix: Path, *, tokenizer: Path | None = None) -> list[Finding]:
    """Check the dataset PREFIX.bin, PREFIX.idx and PREFIX.json; no error among the findings means it is sound.

    Token ids are checked against the vocabulary of `tokenizer` (a `tokenizer.json`), or of the one the sidecar names.
    """
    findings: list[Finding] = []
    sidecar: Sidecar | None = None
    index: Index | None = None
    vocab_size: int | None = None
    try:
        sidecar = read_sidecar(prefix)
        if sidecar is None:
            findings.append(Finding("note", f"{sidecar_path(prefix)}: none; hashes and tokenizer cannot be checked"))
        else:
            vocab_size = sidecar.tokenizer.vocab_size
    except DataError as error:
        findings.append(_error(error))
    try:
        index = check_files(prefix)
    except DataError as error:
        findings.append(_error(error))
    try:
        vocab_size = _tokenizer_vocab_size(prefix, sidecar, tokenizer)
    except DataError as error:
        findings.append(_error(error))
    if sidecar is not None:
        findings += [Finding("error", text) for text in _compare_sidecar(prefix, sidecar, index)]
    if index is not None:
        findings += [Finding("error", text) for text in _scan_tokens(prefix, index, vocab_size)]
    return findings


def _error(error: DataError) -> Finding:
    return Finding("error", str(error))


def _tokenizer_vocab_size(prefix: Path, sidecar: Sidecar | None, tokenizer: Path | None) -> int | None:
    """Vocabulary of the dataset's tokenizer, None when it is not known. Raises DataError when it is another one."""
    if sidecar is None:
        return vocab_size_of(load_tokenizer(tokenizer)) if tokenizer else None
    path = tokenizer or prefix.with_name(sidecar.tokenizer.file)
    found = vocab_size_of(load_tokenizer(path))
    if sha256_of(path) != sidecar.tokenizer.sha256 or found != sidecar.tokenizer.vocab_size:
        raise DataError(
            f"{path}: sha256 {sha256_of(path)[:12]}..., {found} tokens; the dataset was made with "
            f"{sidecar.tokenizer.sha256[:12]}..., {sidecar.tokenizer.vocab_size} tokens; bring back that tokenizer or "
            f"prepare the dataset again"
        )
    return found


def _compare_sidecar(prefix: Path, sidecar: Sidecar, index: Index | None) -> Iterator[str]:
    """What differs between the sidecar and the files."""
    remedy = "copy or prepare the dataset again"
    for path, expected in ((bin_path(prefix), sidecar.bin), (idx_path(prefix), sidecar.idx)):
        if not path.is_file():
            continue  # check_files has said so
        found = FileRecord.of(path)
        if found.bytes != expected.bytes:
            yield f"{path}: {found.bytes} bytes; its sidecar says {expected.bytes}; {remedy}"
        elif found.sha256 != expected.sha256:
            yield f"{path}: sha256 {found.sha256[:12]}...; its sidecar says {expected.sha256[:12]}...; {remedy}"
    if index is None:
        return
    for name, count, stated in (
        ("documents", index.documents, sidecar.documents),
        ("tokens", index.tokens, sidecar.tokens),
    ):
        if count != stated:
            yield f"{sidecar_path(prefix)}: {name} = {stated}; the index lists {count}; {remedy}"


def _scan_tokens(prefix: Path, index: Index, vocab_size: int | None) -> Iterator[str]:
    """The first token id that is negative or beyond the vocabulary, if there is one."""
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    if index.tokens == 0:
        return
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    for start in range(0, index.tokens, _SCAN_TOKENS):
        block = tokens[start : start + _SCAN_TOKENS]
        wrong = np.flatnonzero((block < 0) | (block >= limit))
        if wrong.size:
            position = start + int(wrong[0])
            yield (
                f"{bin_path(prefix)}: token {int(tokens[position])} at position {position}; ids are >= 0 and below the "
                f"size of the vocabulary{'' if vocab_size is None else f', {vocab_size}'}; prepare the dataset again, "
                f"or name the tokenizer it was made with"
            )
            return
