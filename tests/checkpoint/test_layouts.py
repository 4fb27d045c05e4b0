"""A checkpoint of any layout loads on any layout, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import read_checkpoint, verify_checkpoint, write_checkpoint
from pretrain.errors import CheckpointError
from tests.checkpoint.samples import CONFIG, LAYOUTS, STATE, bits, empty, part, same_bits, whole
from tests.helpers.distributed import run_ranks


def save_and_load_all_pairs(folder: Path) -> dict[str, list[str]]:
    """On 4 ranks; smaller layouts use the first ranks. Returns what differs per pair of layouts."""
    rank = dist.get_rank()
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 4)}
    for layout, (world, _) in LAYOUTS.items():
        if rank < world:
            tensors = part(layout, rank, bits())
            write_checkpoint(folder / layout, tensors, step=3, state=STATE, config_toml=CONFIG, group=groups[world])
    dist.barrier()
    wrong: dict[str, list[str]] = {}
    for saved in LAYOUTS:
        for loaded, (world, _) in LAYOUTS.items():
            if rank < world:
                target, expected = part(loaded, rank, empty()), part(loaded, rank, bits())
                read_checkpoint(folder / saved, target, group=groups[world])
                wrong[f"{saved} -> {loaded}"] = [
                    a.key for a, b in zip(target, expected, strict=True) if not same_bits(a.data, b.data)
                ]
    return wrong


@pytest.fixture(scope="module")
def all_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return folder, run_ranks(save_and_load_all_pairs, 4, folder)


def test_every_layout_loads_every_layout(all_pairs):
    _, results = all_pairs
    assert len(results[0]) == len(LAYOUTS) ** 2
    for wrong in results:
        assert all(keys == [] for keys in wrong.values()), wrong


def test_the_comparison_sees_one_wrong_bit(all_pairs):
    folder, _ = all_pairs
    target, expected = empty(), bits()
    read_checkpoint(folder / "grid", whole(target))
    assert all(same_bits(target[key], expected[key]) for key in expected)
    for key in expected:
        expected[key].reshape(-1).view(torch.uint8)[0] ^= 1
        assert not same_bits(target[key], expected[key])


def test_each_box_is_written_once_by_the_rank_that_owns_it(all_pairs):
    folder, _ = all_pairs
    for layout, (world, cuts) in LAYOUTS.items():
        assert verify_checkpoint(folder / layout) == []
        index = json.loads((folder / layout / "index.json").read_text())["tensors"]
        files = {box["file"] for tensor in index.values() for box in tensor["boxes"]}
        assert files == {path.name for path in (folder / layout).glob("*.safetensors")}
        assert len(index["norm.weight"]["boxes"]) == 1
        if cuts:
            boxes = index["experts.fc1.weight"]["boxes"]
            assert {box["file"][:11] for box in boxes} == {f"shard_{rank:05d}" for rank in range(world)}


def fail_on_one_rank(folder: Path) -> list[str]:
    """Errors that only rank 1 meets, as every rank sees them."""
    rank = dist.get_rank()
    messages = []

    def attempt(action):
        try:
            action()
        except (CheckpointError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    def save(layout_bits):
        write_checkpoint(
            folder / "step_00000003", part("rows", rank, layout_bits), step=3, state=STATE, config_toml=CONFIG
        )

    def load(tensors):
        read_checkpoint(folder / "step_00000003", tensors)

    save(bits())
    # Rank 1 cannot write its file.
    from pretrain.checkpoint import write

    original = write.save_file

    def broken(content, path):
        raise OSError(28, "No space left on device")

    if rank == 1:
        write.save_file = broken
    attempt(lambda: save(bits(1)))
    write.save_file = original
    # Rank 1 has a tensor of another shape; of an unknown key; a bug.
    target = part("rows", rank, empty())
    if rank == 1:
        attempt(lambda: load([*target[1:], *whole({"embedding.weight": torch.zeros(9, 6)})]))
        attempt(lambda: load([*target, *whole({"lm_head.weight": torch.zeros(3)})]))
        attempt(lambda: load(None))
    else:
        for _ in range(3):
            attempt(lambda: load(target))
    # Rank 0 does not ask for what rank 1 asks for: fine; nobody asks, or for rank 0's part of it: an error.
    load([t for t in target if rank == 1 or t.key not in ("norm.weight", "optimizer.count")])
    attempt(lambda: load(target[:1]))
    attempt(lambda: load(target if rank == 1 else target[1:]))
    # The first save is still there, and the ranks still agree with each other.
    load(target)
    assert all(same_bits(a.data, b.data) for a, b in zip(target, part("rows", rank, bits()), strict=True))
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    return messages


def test_failure_on_one_rank_raises_the_same_error_on_all(tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, tmp_path)
    assert first == second
    space, shape, unknown, bug, unread, part_unread = first
    assert space.startswith("CheckpointError: rank 1: ")
    assert "no space left: need" in space
    assert "another architecture" in shape
    assert "[8, 6] in the checkpoint, [9, 6] in the model" in shape
    assert "lm_head.weight is not in the checkpoint" in unknown
    assert bug.startswith("RuntimeError: rank 1: TypeError")
    assert "it also holds experts.fc1.weight; norm.weight;" in unread
    assert "it also holds entries 0 to 3 of embedding.weight." in part_unread
