"""Verification: every kind of damage gives one line that names the file, and a sound dataset gives none."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.dataset import TokenWindows
from pretrain.data.verify import verify
from pretrain.errors import DataError
from tests.data.conftest import write_dataset


@pytest.fixture
def dataset(tmp_path: Path, prepared: Path) -> Path:
    """A copy of the prepared training split, to be damaged."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data" / "train"


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def sequences(prefix: Path) -> int:
    return struct.unpack_from("<Q", Path(f"{prefix}.idx").read_bytes(), 18)[0]


def resize(path: Path, change: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)


def edit_sidecar(prefix: Path, key: str, value: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


# name: damage, what the finding says, whether opening for training refuses it, too
DAMAGE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "no idx": (lambda p: Path(f"{p}.idx").unlink(), r"train\.idx: no such file", True),
    "no bin": (lambda p: Path(f"{p}.bin").unlink(), r"train\.bin: no such file", True),
    "empty idx": (lambda p: Path(f"{p}.idx").write_bytes(b""), r"train\.idx: 0 bytes; an index has a header", True),
    "header cut": (lambda p: resize(Path(f"{p}.idx"), 20 - Path(f"{p}.idx").stat().st_size), "20 bytes", True),
    "idx cut": (lambda p: resize(Path(f"{p}.idx"), -8), r"train\.idx: .* its header announces", True),
    "idx longer": (lambda p: resize(Path(f"{p}.idx"), 8), r"train\.idx: .* its header announces", True),
    "modes": (lambda p: resize(Path(f"{p}.idx"), sequences(p)), "multimodal", True),
    "magic": (lambda p: patch(Path(f"{p}.idx"), 0, b"PK"), r"train\.idx: starts with b'PKIDIDX", True),
    "version": (lambda p: patch(Path(f"{p}.idx"), 9, b"\2"), "version 2", True),
    "dtype code": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x63"), "dtype code 99", True),
    "float tokens": (lambda p: patch(Path(f"{p}.idx"), 17, b"\7"), "dtype code 7", True),
    "other dtype": (lambda p: patch(Path(f"{p}.idx"), 17, b"\4"), "sequences lie one after another", True),
    "huge count": (lambda p: patch(Path(f"{p}.idx"), 18, b"\xff" * 8), "announces 18446744073709551615", True),
    "no sequences": (
        lambda p: Path(f"{p}.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8)),
        "0 sequences",
        True,
    ),
    "length": (lambda p: patch(Path(f"{p}.idx"), 34, b"\1\0"), "sequence 1 has length .* starts at byte", True),
    "negative length": (lambda p: patch(Path(f"{p}.idx"), 34, b"\xff" * 4), "sequence 0 has length -1", True),
    "last length": (
        lambda p: patch(Path(f"{p}.idx"), 34 + 4 * (sequences(p) - 1), b"\1\0"),
        r"train\.bin: \d+ bytes; the index lists",
        True,
    ),
    "pointer": (lambda p: patch(Path(f"{p}.idx"), 34 + 4 * sequences(p) + 16, b"\1"), "sequence 2 has length", True),
    "first bound": (lambda p: patch(Path(f"{p}.idx"), 34 + 12 * sequences(p), b"\1"), "bounds run from 1", True),
    "last bound": (lambda p: patch(Path(f"{p}.idx"), 34 + 20 * sequences(p), b"\1"), "bounds run from 0 to 1;", True),
    "bound order": (lambda p: patch(Path(f"{p}.idx"), 34 + 12 * sequences(p) + 8, b"\x09"), "document bounds", True),
    "bin short": (lambda p: resize(Path(f"{p}.bin"), -2), r"train\.bin: \d+ bytes; the index lists", True),
    "bin long": (lambda p: resize(Path(f"{p}.bin"), 2), r"train\.bin: \d+ bytes; the index lists", True),
    "bin empty": (lambda p: Path(f"{p}.bin").write_bytes(b""), r"train\.bin: 0 bytes; the index lists", True),
    "token": (lambda p: patch(Path(f"{p}.bin"), 200, b"\x41\x01"), r"train\.bin: token 321 at position 100", False),
    "changed token": (lambda p: patch(Path(f"{p}.bin"), 200, b"\xff\0"), r"train\.bin: sha256", False),
    "sidecar cut": (lambda p: resize(Path(f"{p}.json"), -10), r"train\.json: contents: Invalid JSON", True),
    "sidecar key": (lambda p: edit_sidecar(p, "colour", 1), r"train\.json: colour: Extra inputs", True),
    "sidecar version": (lambda p: edit_sidecar(p, "format_version", 2), r"train\.json: format_version: .* 1;", True),
    "documents": (lambda p: edit_sidecar(p, "documents", 5), r"train\.json: (documents = 5|5 documents)", True),
    "tokens": (lambda p: edit_sidecar(p, "tokens", 5), r"train\.json: (tokens = 5|\d+ documents, 5 tokens)", True),
    "no tokenizer": (lambda p: p.with_name("tokenizer.json").unlink(), r"tokenizer\.json: no such file", False),
    "tokenizer changed": (
        lambda p: resize(p.with_name("tokenizer.json"), 1),
        r"tokenizer\.json: ",
        False,
    ),
}


def test_sound_datasets_have_no_errors(dataset: Path, tmp_path: Path) -> None:
    assert verify(dataset) == []
    assert verify(dataset.with_name("valid"), tokenizer=dataset.with_name("tokenizer.json")) == []
    foreign = write_dataset(tmp_path / "foreign", [[1, 2], [3]])
    findings = verify(foreign)
    assert [finding.level for finding in findings] == ["note"]
    assert "foreign.json: none" in str(findings[0])


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(dataset: Path, name: str) -> None:
    damage, message, refused = DAMAGE[name]
    damage(dataset)
    findings = verify(dataset)
    assert all(finding.level == "error" for finding in findings)
    assert all("\n" not in finding.text and finding.text.count(";") >= 1 for finding in findings)
    texts = "\n".join(finding.text for finding in findings)
    with pytest.raises(DataError, match=message):
        raise DataError(texts)
    if refused:
        with pytest.raises(DataError, match=message):
            TokenWindows(dataset, sequence_length=8, vocab_size=320)
    else:
        assert TokenWindows(dataset, sequence_length=8, vocab_size=320)[0].shape == (9,)


@pytest.mark.parametrize(
    "name", [name for name, (_, says, refused) in DAMAGE.items() if refused and "json" not in says]
)
def test_damage_without_a_sidecar_is_found(dataset: Path, name: str) -> None:
    """Without hashes to compare, the structure alone has to show it."""
    damage, message, _ = DAMAGE[name]
    damage(dataset)
    Path(f"{dataset}.json").unlink()
    errors = [finding.text for finding in verify(dataset) if finding.level == "error"]
    assert len(errors) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(errors[0])


def test_foreign_tokens_are_checked_against_a_given_tokenizer(tmp_path: Path, prepared: Path) -> None:
    tokenizer = prepared / "tokenizer.json"
    good = write_dataset(tmp_path / "good", [[1, 319, 3]])
    assert [finding.level for finding in verify(good, tokenizer=tokenizer)] == ["note"]
    bad = write_dataset(tmp_path / "bad", [[1, 319], [3, 320]])
    assert "token 320 at position 3; ids are >= 0 and below the size of the vocabulary, 320" in str(
        verify(bad, tokenizer=tokenizer)[1]
    )
    negative = write_dataset(tmp_path / "negative", [[1, -5]], np.int32)
    assert "token -5 at position 1" in str(verify(negative)[1])


def test_another_tokenizer_is_found(dataset: Path, prepared: Path) -> None:
    other = dataset.with_name("other.json")
    other.write_text((prepared / "tokenizer.json").read_text() + "\n")
    (finding,) = verify(dataset, tokenizer=other)
    assert "other.json: sha256" in finding.text
    assert "the dataset was made with" in finding.text


def test_tokens_are_checked_without_the_tokenizer_file(dataset: Path) -> None:
    dataset.with_name("tokenizer.json").unlink()
    patch(Path(f"{dataset}.bin"), 200, b"\x41\x01")
    texts = [finding.text for finding in verify(dataset)]
    assert any("token 321 at position 100" in text and "vocabulary, 320" in text for text in texts)
