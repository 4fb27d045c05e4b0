"""A layout that takes the place of another one leaves nothing of it behind."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from pretrain.config.schema import ParallelConfig
from pretrain.parallel.mesh import Meshes, build_mesh, destroy_mesh, forget_mesh
from pretrain.platform import cpu_adapter
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")
TWO_BY_ONE, ONE_BY_TWO = ParallelConfig(tensor=2), ParallelConfig(expert=2)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def threads_over_layouts(end: Callable[[], None]) -> list[int]:
    """Threads of this process after each of a few layouts."""
    counts = []
    for parallel in (TWO_BY_ONE, ONE_BY_TWO, TWO_BY_ONE):
        build_mesh(parallel, CPU)
        end()
        counts.append(threads())
    return counts


def change_layouts() -> tuple[list[int], list[int], bool, bool]:
    cpu_adapter.apply()
    ended = threads_over_layouts(destroy_mesh)
    meshes = Meshes(CPU)
    first = meshes.of(TWO_BY_ONE)
    same, other = meshes.of(TWO_BY_ONE) is first, meshes.of(ONE_BY_TWO) is first
    meshes.close()
    return ended, threads_over_layouts(forget_mesh), same, other


def test_groups_of_a_former_layout_are_ended() -> None:
    for ended, forgotten, same, other in run_ranks(change_layouts, 2):
        assert ended[0] == ended[1] == ended[2]
        assert forgotten[0] < forgotten[1] < forgotten[2]  # what happens otherwise
        assert same
        assert not other
