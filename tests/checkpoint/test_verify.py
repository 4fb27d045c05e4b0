"""Every kind of damage is found and named; none of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from pretrain.checkpoint import read_checkpoint, verify_checkpoint
from pretrain.checkpoint.format import manifest_digest
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import empty, whole, write_sample

SHARD = "shard_00000_000.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    return write_sample(tmp_path / "step_00000003")


def edit_manifest(checkpoint, change, *, seal=True):
    """Apply `change` to the manifest's fields; with `seal`, an attacker who also renews its hash."""
    path = checkpoint / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    if seal:
        fields["sha256"] = manifest_digest(fields)
    path.write_text(json.dumps(fields))


def edit_index(checkpoint, change):
    """Apply `change` to the index's tensors and make the manifest agree with it."""
    path = checkpoint / "index.json"
    index = json.loads(path.read_text())
    change(index["tensors"])
    path.write_text(json.dumps(index))
    register(checkpoint, "index.json")


def register(checkpoint, name):
    data = (checkpoint / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(checkpoint, lambda fields: fields["files"].update({name: entry}))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_editing_helpers_do_no_damage(checkpoint):
    """Negative control of this file: an edit that changes nothing leaves a sound checkpoint."""
    edit_manifest(checkpoint, lambda fields: None)
    edit_index(checkpoint, lambda tensors: None)
    assert verify_checkpoint(checkpoint) == []
    read_checkpoint(checkpoint, whole(empty()))


FILE_DAMAGE = {
    "truncated shard": (lambda c: os.truncate(c / SHARD, 100), f"{SHARD}: 100 bytes, the manifest says"),
    "empty shard": (lambda c: os.truncate(c / SHARD, 0), f"{SHARD}: 0 bytes"),
    "flipped bit in a tensor": (lambda c: flip(c / SHARD, -1), f"{SHARD}: changed"),
    "flipped bit in a header": (lambda c: flip(c / SHARD, 20), f"{SHARD}: changed"),
    "flipped bit in the index": (lambda c: flip(c / "index.json", 30), "index.json: changed"),
    "flipped bit in the state": (lambda c: flip(c / "state.json", 5), "state.json: changed"),
    "flipped bit in the config": (lambda c: flip(c / "config.toml", 5), "config.toml: changed"),
    "missing shard": (lambda c: (c / SHARD).unlink(), f"{SHARD}: missing"),
    "missing index": (lambda c: (c / "index.json").unlink(), "index.json: missing"),
    "missing manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: missing"),
    "empty manifest": (lambda c: os.truncate(c / "manifest.json", 0), "manifest.json: empty"),
    "half a manifest": (lambda c: os.truncate(c / "manifest.json", 300), "manifest.json: not JSON"),
    "manifest is a list": (lambda c: (c / "manifest.json").write_text("[1]"), "manifest.json: not a JSON object"),
    "manifest is binary": (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: not JSON"),
    "nested without end": (lambda c: (c / "manifest.json").write_text("[" * 100_000), "manifest.json: not JSON"),
    "extra file": (lambda c: (c / "shard_00001_000.safetensors").write_text(""), "shard_00001_000.safetensors: not in"),
    "extra folder": (lambda c: (c / "more").mkdir(), "more: not in the manifest"),
    "folder of another step": (lambda c: c.rename(c.with_name("step_00000004")), "missing, so"),
}


@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_damaged_files(checkpoint, name):
    damage, expected = FILE_DAMAGE[name]
    assert verify_checkpoint(checkpoint) == []
    damage(checkpoint)
    findings = verify_checkpoint(checkpoint)
    assert len(findings) == 1
    assert findings[0].startswith(expected) or expected in findings[0]
    # All but the values of tensors is checked without reading the shards in full.
    assert (verify_checkpoint(checkpoint, deep=False) == []) == (name == "flipped bit in a tensor")


def test_folder_renamed_to_another_step(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("step_00000004"))
    assert verify_checkpoint(renamed) == ["manifest.json: step 3, but the folder is step_00000004"]
    renamed = renamed.rename(renamed.with_name("step_00000004_grown"))
    assert verify_checkpoint(renamed) == ["manifest.json: step 3, but the folder is step_00000004_grown"]
    renamed = renamed.rename(renamed.with_name("step_00000003_grown"))
    assert verify_checkpoint(renamed) == []
    # Under a name of the user's own it is as good as before.
    assert verify_checkpoint(renamed.rename(checkpoint.with_name("best"))) == []


def test_symbolic_link_instead_of_a_file(checkpoint, tmp_path):
    outside = tmp_path / "outside"
    shutil.copy(checkpoint / SHARD, outside)
    (checkpoint / SHARD).unlink()
    (checkpoint / SHARD).symlink_to(outside)
    assert verify_checkpoint(checkpoint) == [f"{SHARD}: not a regular file"]


def test_several_findings_at_once(checkpoint):
    flip(checkpoint / SHARD, -1)
    (checkpoint / "state.json").unlink()
    (checkpoint / "notes").write_text("")
    assert len(verify_checkpoint(checkpoint)) == 3


MANIFEST_DAMAGE = {
    "wrong hash": (lambda m: m["files"][SHARD].update(sha256="0" * 64), f"{SHARD}: changed"),
    "no hash": (lambda m: m["files"][SHARD].update(sha256=""), "sha256: String should match"),
    "newer format": (lambda m: m.update(format_version=2), "format version 2, this program reads 1"),
    "foreign format": (lambda m: m.update(format="torch_dist"), "format is 'torch_dist'"),
    "unknown field": (lambda m: m.update(hook="os.system"), "hook: Extra inputs"),
    "missing field": (lambda m: m.pop("world_size"), "world_size: Field required"),
    "index not listed": (lambda m: m["files"].pop("index.json"), "does not list index.json"),
    "lists itself": (lambda m: m["files"].update({"manifest.json": m["files"][SHARD]}), "lists itself"),
    "parent folder": (lambda m: m["files"].update({"../evil": m["files"][SHARD]}), "String should match"),
    "absolute path": (lambda m: m["files"].update({"/etc/passwd": m["files"][SHARD]}), "String should match"),
    "dots": (lambda m: m["files"].update({"..": m["files"][SHARD]}), "String should match"),
    "newline": (lambda m: m["files"].update({"a\n": m["files"][SHARD]}), "String should match"),
    "null byte": (lambda m: m["files"].update({"a\0": m["files"][SHARD]}), "String should match"),
    "huge size": (lambda m: m["files"][SHARD].update(bytes=1 << 59), f"the manifest says {1 << 59}"),
    "absurd size": (lambda m: m["files"][SHARD].update(bytes=1 << 80), "bytes: "),
    "negative size": (lambda m: m["files"][SHARD].update(bytes=-1), "bytes: "),
    "size is a string": (lambda m: m["files"][SHARD].update(bytes="10"), "bytes: "),
}


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_bad_manifests(checkpoint, name):
    change, expected = MANIFEST_DAMAGE[name]
    edit_manifest(checkpoint, change)
    findings = verify_checkpoint(checkpoint)
    assert len(findings) == 1
    assert expected in findings[0]
    assert "\n" not in findings[0]


def test_an_edited_manifest_without_its_hash_is_found(checkpoint):
    edit_manifest(checkpoint, lambda fields: fields.update(step=4), seal=False)
    assert verify_checkpoint(checkpoint) == ["manifest.json: changed (its own sha256 does not match)"]


def box(tensors, key="embedding.weight"):
    return tensors[key]["boxes"][0]


INDEX_DAMAGE = {
    "gap": (lambda t: box(t).update(shape=[7, 6]), "embedding.weight: boxes cover 42 of 48 entries (gap)"),
    "no boxes": (lambda t: t["embedding.weight"].update(boxes=[]), "boxes cover 0 of 48 entries (gap)"),
    "overlap": (lambda t: t["embedding.weight"]["boxes"].append(box(t)), "boxes at [0, 0] and [0, 0] overlap"),
    "outside": (lambda t: box(t).update(offset=[1, 0]), "is no part of shape"),
    "other rank": (lambda t: box(t).update(offset=[0]), "is no part of shape"),
    "huge shape": (lambda t: t["embedding.weight"].update(shape=[1 << 59, 6]), "(gap)"),
    "absurd shape": (lambda t: t["embedding.weight"].update(shape=[1 << 70, 6]), "shape.0: Input should be less"),
    "negative": (lambda t: box(t).update(offset=[-1, 0]), "offset.0: Input should be greater"),
    "traversal": (lambda t: box(t).update(file="../../shard"), "file: String should match"),
    "unlisted file": (lambda t: box(t).update(file="other.safetensors"), "is no shard of the manifest"),
    "no shard": (lambda t: box(t).update(file="state.json"), "state.json is no shard"),
    "unknown dtype": (lambda t: t["embedding.weight"].update(dtype="object"), "unknown dtype 'object'"),
    "unknown field": (lambda t: t["embedding.weight"].update(cls="x"), "cls: Extra inputs"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_bad_indices(checkpoint, name):
    """Found by verification, and by loading alone."""
    change, expected = INDEX_DAMAGE[name]
    edit_index(checkpoint, change)
    findings = verify_checkpoint(checkpoint)
    assert len(findings) == 1
    assert expected in findings[0]
    with pytest.raises(CheckpointError, match=r"step_00000003: index\.json: "):
        read_checkpoint(checkpoint, whole(empty()))


def test_index_and_shard_disagree(checkpoint):
    """The index is consistent in itself, but the shard holds something else."""
    edits = {
        "another shape": lambda t: (t["embedding.weight"].update(shape=[6, 8]), box(t).update(shape=[6, 8])),
        "another dtype": lambda t: t["embedding.weight"].update(dtype="F16"),
        "another tensor": lambda t: box(t).update(name="norm.weight@0"),
        "absent tensor": lambda t: box(t).update(name="nothing"),
        "not indexed": lambda t: t.pop("embedding.weight"),
    }
    expected = {
        "another shape": [f"{SHARD}: embedding.weight@0,0 is ('BF16', [8, 6]), the index says ('BF16', [6, 8])"],
        "another dtype": [f"{SHARD}: embedding.weight@0,0 is ('BF16', [8, 6]), the index says ('F16', [8, 6])"],
        "another tensor": [
            f"index.json: norm.weight@0 of {SHARD} is used twice",
            f"{SHARD}: embedding.weight@0,0 is not in the index",
        ],
        "absent tensor": [
            f"{SHARD}: embedding.weight@0,0 is not in the index",
            f"{SHARD}: nothing is missing",
        ],
        "not indexed": [f"{SHARD}: embedding.weight@0,0 is not in the index"],
    }
    original = (checkpoint / "index.json").read_bytes()
    for name, change in edits.items():
        edit_index(checkpoint, change)
        assert verify_checkpoint(checkpoint) == expected[name]
        (checkpoint / "index.json").write_bytes(original)
        register(checkpoint, "index.json")
    assert verify_checkpoint(checkpoint) == []


def test_texts_that_do_not_parse(checkpoint):
    for name, text, expected in (
        ("state.json", "[]", "state.json: not a JSON object"),
        ("state.json", "{", "state.json: not JSON"),
        ("config.toml", "a = ", "config.toml: "),
    ):
        original = (checkpoint / name).read_bytes()
        (checkpoint / name).write_text(text)
        register(checkpoint, name)
        findings = verify_checkpoint(checkpoint)
        assert len(findings) == 1
        assert findings[0].startswith(expected)
        (checkpoint / name).write_bytes(original)
        register(checkpoint, name)
    assert verify_checkpoint(checkpoint) == []


def test_shard_header_that_declares_more_than_there_is(checkpoint):
    path = checkpoint / SHARD
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    register(checkpoint, SHARD)
    findings = verify_checkpoint(checkpoint)
    assert len(findings) == 1
    assert "header too large" in findings[0]
    with pytest.raises(CheckpointError, match="header too large"):
        read_checkpoint(checkpoint, whole(empty()))
