"""Saving and loading in one process: what is kept, what is refused, and what never happens."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain.checkpoint.write as write_module
from pretrain.checkpoint import read_checkpoint, read_config, read_state, verify_checkpoint, write_checkpoint
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, STATE, bits, empty, same_bits, sharded, whole, write_sample

README = Path(write_module.__file__).with_name("README.md")


@pytest.fixture
def checkpoint(tmp_path):
    return write_sample(tmp_path / "step_00000003")


def load(checkpoint, tensors=None, **options):
    tensors = empty() if tensors is None else tensors
    read_checkpoint(checkpoint, whole(tensors), **options)
    return tensors


def save(directory, tensors, **changes):
    write_checkpoint(directory, tensors, **{"step": 3, "state": STATE, "config_toml": CONFIG, **changes})


def assert_loaded(tensors, seed=0):
    expected = bits(seed)
    assert set(tensors) == set(expected)
    assert all(same_bits(tensors[key], expected[key]) for key in expected)


def test_everything_comes_back(checkpoint):
    assert verify_checkpoint(checkpoint) == []
    assert_loaded(load(checkpoint))
    assert read_state(checkpoint) == STATE
    assert read_config(checkpoint) == CONFIG
    assert not checkpoint.with_name("step_00000003.partial").exists()


def test_manifest_says_who_wrote_it(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("meristem-checkpoint", 1)
    assert (manifest["step"], manifest["world_size"]) == (3, 1)
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}


def test_same_inputs_give_the_same_bytes(tmp_path, checkpoint):
    again = write_sample(tmp_path / "again")
    for path in checkpoint.iterdir():
        if path.name != "manifest.json":  # which holds the time
            assert path.read_bytes() == (again / path.name).read_bytes()


def test_many_files_per_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "MAX_FILE_BYTES", 100)
    checkpoint = write_sample(tmp_path / "step_00000003")
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    # Five of the tensors have 24 bytes or more and no two neighbours fit together.
    assert len(sizes) >= 5
    assert verify_checkpoint(checkpoint) == []
    assert_loaded(load(checkpoint))


def test_strided_and_leaf_tensors(tmp_path):
    """What is saved need not be contiguous, and what is loaded to may be a parameter or a view."""
    wide = torch.arange(24.0).reshape(4, 6)
    save(tmp_path / "c", [sharded("a", wide.t(), shape=(6, 4), offset=(0, 0))])
    storage = torch.zeros(10, 8)
    view = storage[1:7, 2:6]
    load(tmp_path / "c", {"a": view})
    assert torch.equal(view, wide.t())
    assert storage.sum() == wide.sum()
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    load(tmp_path / "c", {"a": parameter})
    assert torch.equal(parameter, wide.t())


def test_tensors_that_share_memory(tmp_path):
    """Parameters are views of one buffer in megatron-core, and one tensor may go under two keys."""
    buffer = torch.arange(12.0)
    views = {"a": buffer[:6], "b": buffer[6:].reshape(2, 3), "again": buffer[:6]}
    save(tmp_path / "c", whole(views))
    loaded = load(tmp_path / "c", {key: torch.zeros_like(view) for key, view in views.items()})
    assert all(torch.equal(loaded[key], view) for key, view in views.items())


def test_files_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        checkpoint = write_sample(tmp_path / "c")
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.iterdir()} == {0o640}


def test_a_checkpoint_of_the_same_step_is_replaced_whole(checkpoint):
    (checkpoint / "stray").write_text("from before")
    write_sample(checkpoint, seed=1)
    assert verify_checkpoint(checkpoint) == []
    assert_loaded(load(checkpoint), seed=1)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_stale_partial_is_no_obstacle(tmp_path):
    partial = tmp_path / "step_00000003.partial"
    partial.mkdir()
    (partial / "shard_00000_000.safetensors").write_text("half")
    assert_loaded(load(write_sample(tmp_path / "step_00000003")))
    assert not partial.exists()


# Another model ------------------------------------------------------------------------------------------------


def assert_untouched(tensors):
    assert all(same_bits(a, b) for a, b in zip(tensors.values(), empty().values(), strict=False))


def test_another_shape(checkpoint):
    tensors = {**empty(), "embedding.weight": torch.zeros(16, 6, dtype=torch.bfloat16)}
    expected = r"another architecture.*embedding\.weight is \[8, 6\] in the checkpoint, \[16, 6\] in the model"
    with pytest.raises(CheckpointError, match=expected) as error:
        load(checkpoint, tensors)
    assert "[model]" in str(error.value)
    assert "\n" not in str(error.value)
    tensors.pop("embedding.weight")
    assert all((tensor == 77).all() for tensor in tensors.values())


def test_missing_key(checkpoint):
    tensors = {**empty(), "layers.4.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"another architecture.*layers\.4\.weight is not in the checkpoint"):
        load(checkpoint, tensors)
    assert_untouched(tensors)


def test_many_problems_name_the_first_few(checkpoint):
    with pytest.raises(CheckpointError, match="and 7 more"):
        load(checkpoint, {f"layers.{i}.weight": torch.zeros(3) for i in range(10)})


def test_unwanted_key(checkpoint):
    tensors = empty()
    del tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"also holds norm\.weight"):
        load(checkpoint, tensors)
    assert all((tensor == 77).all() for tensor in tensors.values())


def test_optimizer_is_left_out_only_when_asked(checkpoint):
    weights = {key: tensor for key, tensor in empty().items() if not key.startswith("optimizer.")}
    with pytest.raises(CheckpointError, match="also holds optimizer"):
        load(checkpoint, weights)
    load(checkpoint, weights, leave_out=["optimizer."])
    assert weights
    assert all(same_bits(tensor, bits()[key]) for key, tensor in weights.items())
    with pytest.raises(CheckpointError, match=r"no key starts with 'optimiser\.'"):
        load(checkpoint, leave_out=["optimiser."])


def test_precision_is_converted_only_when_asked(checkpoint):
    tensors = {key: tensor.to(torch.float32) for key, tensor in empty().items()}
    with pytest.raises(CheckpointError, match=r"precision.*embedding\.weight is BF16 in the checkpoint, F32"):
        load(checkpoint, tensors)
    load(checkpoint, tensors, convert=True)
    for key, tensor in bits().items():
        assert torch.equal(tensors[key].nan_to_num(), tensor.to(torch.float32).nan_to_num())


# Bugs of the caller ---------------------------------------------------------------------------------------------


def test_gap_overlap_and_disagreement_are_found_at_save(tmp_path):
    a = torch.zeros(2)
    cases = {
        "gap": [sharded("a", a, shape=(4,), offset=(0,))],
        "overlap": [sharded("a", a, shape=(4,), offset=(i,)) for i in (0, 1, 2)],
        "given twice": [sharded("a", a, shape=(4,), offset=(0,))] * 2,
        "no part of": [sharded("a", a, shape=(4,), offset=(3,))],
        "disagree": [sharded("a", a, shape=(4,), offset=(0,)), sharded("a", a.double(), shape=(4,), offset=(2,))],
    }
    for reason, tensors in cases.items():
        with pytest.raises(RuntimeError, match=reason):
            save(tmp_path / "c", tensors)
        assert list(tmp_path.iterdir()) == []
    save(tmp_path / "c", [sharded("a", a, shape=(4,), offset=(i,)) for i in (0, 2)])
    assert verify_checkpoint(tmp_path / "c") == []


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"tensor": torch.zeros(1)}, {"path": Path("x")}])
def test_state_is_json(tmp_path, state):
    with pytest.raises(RuntimeError, match="JSON"):
        save(tmp_path / "c", whole(bits()), state=state)
    assert list(tmp_path.iterdir()) == []


# Security and interchange ---------------------------------------------------------------------------------------


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was called")

    for module in (pickle, torch):
        for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler", "save"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(AssertionError, match="pickle was called"):
        torch.load(tmp_path / "any")
    checkpoint = write_sample(tmp_path / "step_00000003")
    assert verify_checkpoint(checkpoint) == []
    assert_loaded(load(checkpoint))


def test_a_pickle_in_place_of_a_shard_is_refused(checkpoint):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(checkpoint / "executed"),))

    evil = pickle.dumps(Evil())
    for name in ("shard_00000_000.safetensors", "index.json", "state.json", "manifest.json"):
        (checkpoint / name).write_bytes(evil)
        assert verify_checkpoint(checkpoint) != []
        with pytest.raises(CheckpointError):
            load(checkpoint)
    assert not (checkpoint / "executed").exists()
    pickle.loads(evil)
    assert (checkpoint / "executed").exists()


def test_the_reader_in_the_readme(tmp_path, monkeypatch):
    """A dozen lines without this package read every tensor, and its hash check finds a flipped bit."""
    monkeypatch.setattr(write_module, "MAX_FILE_BYTES", 100)
    checkpoint = write_sample(tmp_path / "step_00000003")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    assert all("pretrain" not in block for block in blocks)
    assert len([line for line in blocks[0].splitlines() if line]) <= 12
    names: dict = {}
    for block in blocks:
        exec(block, names)
    for key, tensor in bits().items():
        assert same_bits(names["read_tensor"](checkpoint, key), tensor)
    assert names["is_intact"](checkpoint)
    path = checkpoint / "shard_00000_000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not names["is_intact"](checkpoint)
