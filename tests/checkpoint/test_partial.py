"""State of experts that only some sites have: said in the index, never read where it is not, never passed over."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import CheckpointReader, Checkpoints, read_checkpoint, verify_checkpoint, write_checkpoint
from pretrain.checkpoint.boxes import Box, uncovered
from pretrain.config.schema import CheckpointConfig
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, STATE, bits, empty, same_bits, sharded, whole
from tests.checkpoint.test_boxes import count, random_box, split
from tests.checkpoint.test_roundtrip import README
from tests.checkpoint.test_verify import edit_index

WEIGHT = "experts.fc1.weight"
KEY = f"optimizer.exp_avg.{WEIGHT}"
OWN = (1, 3)
"""Experts, of 4, whose state the checkpoint has."""


def parts(tensors: dict[str, torch.Tensor], own: tuple[int, ...] = OWN) -> list:
    """`tensors`, of one of them the rows `own` alone."""
    rest = whole({key: tensor for key, tensor in tensors.items() if key != KEY})
    shape = tensors[KEY].shape
    return rest + [sharded(KEY, tensors[KEY][e : e + 1], shape=shape, offset=(e, 0, 0, 0)) for e in own]


def save(directory: Path, tensors: list, partial_keys: tuple[str, ...] = (KEY,)) -> Path:
    write_checkpoint(directory, tensors, step=3, state=STATE, config_toml=CONFIG, partial_keys=partial_keys)
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "step_00000003", parts(bits()))


def stored(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "index.json").read_text())["tensors"]


@pytest.mark.parametrize("seed", range(40))
def test_what_boxes_leave_uncovered_agrees_with_counting(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
    everything = Box((0,) * len(shape), shape)
    boxes = [box for box in split(rng, everything, depth=4) if rng.random() < 0.6]
    wanted = random_box(rng, shape)
    left = uncovered(wanted, boxes)
    inside = count(shape, [wanted])
    assert np.array_equal(count(shape, left), inside * (count(shape, boxes) == 0))


def test_the_index_says_so_and_the_rest_is_as_ever(checkpoint: Path, tmp_path: Path) -> None:
    assert verify_checkpoint(checkpoint) == []
    assert {key for key, tensor in stored(checkpoint).items() if "partial" in tensor} == {KEY}
    assert stored(checkpoint)[KEY]["partial"] is True
    # What is whole is not called partial because it might have been.
    everything = save(tmp_path / "c", parts(bits(), (0, 1, 2, 3)))
    assert not any("partial" in tensor for tensor in stored(everything).values())
    target = empty()
    read_checkpoint(everything, whole(target))
    assert all(same_bits(target[key], tensor) for key, tensor in bits().items())


def test_missing_entries_have_to_be_announced(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"experts\.fc1\.weight: boxes cover 120 of 240 entries \(gap\)"):
        save(tmp_path / "c", parts(bits()), partial_keys=())
    with pytest.raises(RuntimeError, match="overlap"):
        save(tmp_path / "c", [*parts(bits()), sharded(KEY, bits()[KEY], shape=(4, 2, 6, 5), offset=(0, 0, 0, 0))])
    tensors = bits()
    weights = [t for t in whole(tensors) if t.key != WEIGHT]
    weights += [sharded(WEIGHT, tensors[WEIGHT][:1], shape=(4, 2, 6, 5), offset=(0, 0, 0, 0))]
    with pytest.raises(RuntimeError, match="a weight must not be partial"):
        save(tmp_path / "c", weights, partial_keys=(WEIGHT,))
    assert list(tmp_path.iterdir()) == []


def test_a_partial_weight_is_damage(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda tensors: tensors[WEIGHT].update(partial=True))
    assert verify_checkpoint(checkpoint) == [f"index.json: {WEIGHT}: a weight must not be partial"]


def test_a_gap_that_is_not_announced_is_damage(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda tensors: tensors[KEY].pop("partial"))
    assert verify_checkpoint(checkpoint) == [f"index.json: {KEY}: boxes cover 120 of 240 entries (gap)"]


def test_own_experts_load_bit_for_bit(checkpoint: Path) -> None:
    target = empty()
    assert read_checkpoint(checkpoint, parts(target)) == []
    for key, tensor in bits().items():
        own = list(OWN) if key == KEY else slice(None)
        assert same_bits(target[key][own] if tensor.dim() else target[key], tensor[own] if tensor.dim() else tensor)
    # Negative control: the rest is as it was.
    assert same_bits(target[KEY][[0, 2]], empty()[KEY][[0, 2]])


@pytest.mark.parametrize(
    ("own", "missing"),
    [((0, 1, 3), "has no entries 0."), ((0, 1, 2, 3), "has no entries 0; optimizer"), ((1, 2, 3), "has no entries 2.")],
)
def test_experts_that_are_not_there_are_an_error(own: tuple[int, ...], missing: str, checkpoint: Path) -> None:
    target = empty()
    with pytest.raises(CheckpointError, match=r"of a site that trains other experts: optimizer\.exp_avg\.") as error:
        read_checkpoint(checkpoint, parts(target, own))
    assert missing in str(error.value)
    assert "\n" not in str(error.value)
    # Nothing was changed.
    assert all(same_bits(target[key], tensor) for key, tensor in empty().items())


def test_experts_that_nobody_takes_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"it also holds entries 3 of optimizer\.exp_avg\.{WEIGHT}"):
        read_checkpoint(checkpoint, parts(empty(), (1,)))
    # Also of a checkpoint that has them all.
    with pytest.raises(CheckpointError, match=rf"it also holds entries 0, 2 of optimizer\.exp_avg\.{WEIGHT}"):
        read_checkpoint(save(tmp_path / "c", whole(bits())), parts(empty()))


def test_a_caller_that_asks_for_it_gets_what_is_there(checkpoint: Path) -> None:
    target = empty()
    fresh = read_checkpoint(checkpoint, parts(target, (0, 1)), but_for=(KEY,))
    assert fresh == [(KEY, Box((0, 0, 0, 0), (1, 2, 6, 5)))]
    assert same_bits(target[KEY][1], bits()[KEY][1])
    assert all(same_bits(target[KEY][e], empty()[KEY][e]) for e in (0, 2, 3))
    # A box of which it has a part, and keys that it has to have all the same.
    target = empty()
    whole_box = whole({KEY: target[KEY]})
    others = [tensor for tensor in parts(target) if tensor.key != KEY]
    assert [box.offset[0] for _, box in read_checkpoint(checkpoint, [*others, *whole_box], but_for=(KEY,))] == [0, 2]
    assert same_bits(target[KEY][[1, 3]], bits()[KEY][[1, 3]])
    with pytest.raises(CheckpointError, match="trains other experts"):
        read_checkpoint(checkpoint, parts(target, (0, 1)), but_for=(WEIGHT,))


def test_pieces_are_read_where_they_are_and_nowhere_else(checkpoint: Path) -> None:
    with CheckpointReader(checkpoint) as reader:
        assert same_bits(reader.read(KEY, (3, 1, 0, 0), (1, 1, 6, 5)), bits()[KEY][3:4, 1:])
        for offset, shape in (((2, 0, 0, 0), (1, 2, 6, 5)), ((1, 0, 0, 0), (2, 2, 6, 5))):
            with pytest.raises(CheckpointError, match=rf"step_00000003: optimizer\.exp_avg\.{WEIGHT} has no entries 2"):
                reader.read(KEY, offset, shape)


def test_the_reader_of_the_readme_refuses(checkpoint: Path) -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["is_intact"](checkpoint)
    assert same_bits(names["read_tensor"](checkpoint, WEIGHT), bits()[WEIGHT])
    with pytest.raises(AssertionError, match="parts of it only"):
        names["read_tensor"](checkpoint, KEY)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_saves_them(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=asynchronous))
    checkpoints.save(3, parts(bits()), state=STATE, config_toml=CONFIG, partial_keys=[KEY])
    newest = checkpoints.latest_valid()
    assert newest
    assert stored(newest)[KEY]["partial"] is True
