"""Checkpoints that no process holds whole: written file by file, read box by box."""

from __future__ import annotations

import os
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain.checkpoint.read as read_module
import pretrain.checkpoint.write as write_module
from pretrain.checkpoint import CheckpointReader, read_checkpoint, verify_checkpoint, write_checkpoint
from pretrain.checkpoint.boxes import Box
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, SHAPES, STATE, bits, empty, part, same_bits, sharded, whole
from tests.checkpoint.test_boxes import random_box

FILE_BYTES = 256


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(write_module, "MAX_FILE_BYTES", FILE_BYTES)


def save(directory: Path, tensors, **options) -> Path:
    write_checkpoint(directory, tensors, step=3, state=STATE, config_toml=CONFIG, **options)
    return directory


def many_boxes(directory: Path) -> Path:
    """A checkpoint of `bits()` whose tensors are cut unevenly into boxes of many files."""
    return save(directory, [tensor for rank in range(4) for tensor in part("uneven", rank, bits())])


# Writing ------------------------------------------------------------------------------------------------------


class Source:
    """Gives tensors of 64 bytes when asked, and counts the bytes that somebody still holds."""

    def __init__(self, number: int) -> None:
        self.keys = [f"layers.{i}.weight" for i in range(number)]
        self.asked: list[str] = []
        self.live = self.peak = 0

    def tensors(self, device: str) -> list:
        return whole({key: torch.full((16,), i, dtype=torch.float32, device=device) for i, key in enumerate(self.keys)})

    def __call__(self, tensor) -> torch.Tensor:
        self.asked.append(tensor.key)
        # The array lives exactly as long as the tensor's memory, also when only a view of the tensor is left.
        array = np.full(16, self.keys.index(tensor.key), dtype=np.float32)
        self.live += array.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(array, self._freed, array.nbytes)
        return torch.from_numpy(array)

    def _freed(self, size: int) -> None:
        self.live -= size


def test_one_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    source = Source(20)
    replica = sharded("layers.0.weight", torch.empty(16, device="meta"), shape=(16,), offset=(0,), replica=1)
    given = save(tmp_path / "given", [*source.tensors("meta"), replica], data_of=source)
    assert source.asked == source.keys
    assert (source.live, source.peak) == (0, FILE_BYTES)
    held = save(tmp_path / "held", source.tensors("cpu"))
    shards = sorted(path.name for path in held.glob("*.safetensors"))
    assert len(shards) == 20 * 64 // FILE_BYTES
    for name in (*shards, "index.json"):
        assert (given / name).read_bytes() == (held / name).read_bytes()
    assert verify_checkpoint(given) == []
    # Negative control: a writer that does not drop what it wrote is seen.
    kept, original = [], write_module.save_file
    monkeypatch.setattr(
        write_module, "save_file", lambda content, path: (kept.append(content), original(content, path))
    )
    source = Source(20)
    save(tmp_path / "given", source.tensors("meta"), data_of=source)
    assert source.peak == 20 * 64


def test_what_is_given_has_to_be_what_was_announced(tmp_path):
    tensors = Source(3).tensors("meta")
    for wrong in (torch.zeros(15), torch.zeros(16, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"layers\.0\.weight@0: expected torch\.float32 \[16\], was given"):
            save(tmp_path / "c", tensors, data_of=lambda tensor, wrong=wrong: wrong)
    with pytest.raises(RuntimeError, match="meta"):
        save(tmp_path / "c", tensors)
    assert list(tmp_path.iterdir()) == []


# Reading ------------------------------------------------------------------------------------------------------


def test_any_box_of_any_tensor(tmp_path):
    rng = random.Random(0)
    with CheckpointReader(many_boxes(tmp_path / "c")) as reader:
        assert reader.tensors() == {key: (dtype, shape) for key, (shape, dtype) in SHAPES.items()}
        shifted = 0
        for key, tensor in bits().items():
            for _ in range(20):
                box = random_box(rng, tuple(tensor.shape))
                found = reader.read(key, box.offset, box.shape)
                assert same_bits(found, tensor[box.slices_in(Box((0,) * tensor.dim(), tuple(tensor.shape)))])
                corner = tensor[tuple(slice(n) for n in box.shape)]
                shifted += not same_bits(found, corner)
    # Negative control: most boxes are not what lies elsewhere in the tensor.
    assert shifted > 50


def mapped(directory: Path) -> set[str]:
    """Files of a folder that this process has open or mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[-1] for line in lines]
    paths += [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return {path for path in paths if path.startswith(str(directory))}


def test_few_files_are_open_at_a_time_and_none_afterwards(tmp_path, monkeypatch):
    checkpoint = many_boxes(tmp_path / "c")
    assert len(list(checkpoint.glob("*.safetensors"))) > 5

    def read_all(reader) -> int:
        peak = 0
        for key, (shape, _) in SHAPES.items():
            for index in range(shape[0] if shape else 1):
                reader.read(key, (index, *[0] * (len(shape) - 1))[: len(shape)], (1, *shape[1:])[: len(shape)])
                peak = max(peak, len(mapped(checkpoint)))
        return peak

    with CheckpointReader(checkpoint) as reader:
        assert read_all(reader) > 5
    assert mapped(checkpoint) == set()
    monkeypatch.setattr(read_module, "MAX_OPEN_FILES", 2)
    with CheckpointReader(checkpoint) as reader:
        assert read_all(reader) == 2
    assert mapped(checkpoint) == set()
    target = empty()
    read_checkpoint(checkpoint, whole(target))
    assert mapped(checkpoint) == set()
    assert all(same_bits(target[key], tensor) for key, tensor in bits().items())


def test_errors_name_the_checkpoint_and_the_file(tmp_path):
    checkpoint = many_boxes(tmp_path / "step_00000003")
    reader = CheckpointReader(checkpoint)
    with pytest.raises(CheckpointError, match=r"step_00000003: lm_head\.weight is not in the checkpoint"):
        reader.read("lm_head.weight", (0,), (1,))
    with pytest.raises(AssertionError, match=r"norm\.weight"):
        reader.read("norm.weight", (5,), (2,))
    shard = reader.index.tensors["norm.weight"].boxes[0].file
    content = (checkpoint / shard).read_bytes()
    (checkpoint / shard).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"step_00000003: {shard}: .*incomplete"):
        reader.read("norm.weight", (0,), (6,))
    (checkpoint / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"step_00000003: {shard}: No such file"):
        reader.read("norm.weight", (0,), (6,))
    (checkpoint / shard).write_bytes(content)
    assert same_bits(reader.read("norm.weight", (0,), (6,)), bits()["norm.weight"])
    (checkpoint / "index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_00000003: index\.json: "):
        CheckpointReader(checkpoint)
