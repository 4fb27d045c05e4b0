"""Documents from folders of text or code, JSONL files, and the Python standard library."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.errors import DataError

STDLIB = "stdlib"
"""The input that stands for the sources of the Python standard library."""

# Not part of the library proper, installed by users, or written when this machine's Python was built.
_STDLIB_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_STDLIB_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")

SPLIT_RULE = (
    "A document is held out when the first 8 bytes of the SHA-256 of its group, as a share of 2^64, are below "
    "valid_fraction. Its group is the first component of its path below the input, without suffix; for a line of "
    "JSONL it is the text."
)


@dataclass(frozen=True)
class Document:
    """One text."""

    name: str
    """Path below its input, with the line number for JSONL."""
    group: str
    """Documents of one group are held out together."""
    text: str


@dataclass(frozen=True)
class SourceFile:
    """One file to be read."""

    path: Path
    name: str
    """Posix path below the input it was found in."""


@dataclass
class Corpus:
    """The documents of some inputs, in a fixed order, to be read any number of times."""

    inputs: tuple[str, ...]
    files: list[SourceFile]
    text_key: str
    python: str | None
    """Version of the Python whose standard library is among the inputs."""
    skipped: set[str] = field(default_factory=set)
    """Files, and lines of JSONL, found not to be UTF-8 while reading."""

    @classmethod
    def find(cls, inputs: Sequence[str], *, suffixes: Sequence[str], text_key: str) -> Corpus:
        """List the files: each input is a file, a folder (searched for `suffixes`) or `stdlib`.

        Hidden files and folders, `__pycache__` and links to folders are not followed. Raises DataError when an input
        does not exist or yields no file.
        """
        files: list[SourceFile] = []
        for name in inputs:
            found = _stdlib_files() if name == STDLIB else _input_files(Path(name), tuple(suffixes))
            if not found:
                raise DataError(
                    f"{name}: no file with suffix {', '.join(suffixes)}; every input yields at least one; name the "
                    f"suffixes or another input"
                )
            files += found
        if not files:
            raise DataError("inputs: none given; prepare reads at least one file or folder; name one, or `stdlib`")
        return cls(
            inputs=tuple(inputs),
            files=files,
            text_key=text_key,
            python=platform.python_version() if STDLIB in inputs else None,
        )

    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.path.stat().st_size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """All documents that are not empty. Texts that are not UTF-8 are left out and listed in `skipped`."""
        for file in self.files:
            if file.path.suffix == ".jsonl":
                yield from self._json_lines(file)
                continue
            try:
                text = file.path.read_bytes().decode("utf-8")  # not read_text: line ends stay as they are
            except UnicodeDecodeError:
                self.skipped.add(file.name)
                continue
            if text:
                yield Document(name=file.name, group=file.name.split("/")[0].split(".")[0], text=text)

    def _json_lines(self, file: SourceFile) -> Iterator[Document]:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file.path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: {error}; every line is one JSON object; mend the line") from error
                text = row.get(self.text_key) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise DataError(
                        f"{where}: no text under {self.text_key!r}; every line is an object with the text under the "
                        f"text key; set the text key or mend the line"
                    )
                if _has_lone_surrogates(text):
                    self.skipped.add(f"{file.name}:{number}")
                elif text:
                    yield Document(name=f"{file.name}:{number}", group=text, text=text)


def unit_hash(text: str) -> float:
    """A stable pseudo-random number in [0, 1) for a string."""
    # Names of files need not be UTF-8.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _has_lone_surrogates(text: str) -> bool:
    """Whether the text, from a JSON escape like \\ud800, has no UTF-8 form."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def held_out(document: Document, valid_fraction: float) -> bool:
    """Whether a document belongs to the validation split; see SPLIT_RULE."""
    return unit_hash(document.group) < valid_fraction


def _input_files(path: Path, suffixes: tuple[str, ...]) -> list[SourceFile]:
    if path.is_file():
        return [SourceFile(path, path.name)]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; an input is one of these or `{STDLIB}`; check the path")
    return [file for file in _walk(path) if file.name.endswith(suffixes)]


def _stdlib_files() -> list[SourceFile]:
    files = _walk(Path(sysconfig.get_path("stdlib")))
    return [file for file in files if file.name.endswith(".py") and _in_library(file.name)]


def _in_library(name: str) -> bool:
    first, *_ = parts = name.split("/")
    return _STDLIB_EXCLUDED_FOLDERS.isdisjoint(parts) and not first.startswith(_STDLIB_EXCLUDED_PREFIXES)


def _walk(root: Path) -> list[SourceFile]:
    """All files below a folder, sorted by their posix path."""
    files: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(files, key=lambda file: file.name)
