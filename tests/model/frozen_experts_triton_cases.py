"""The Triton backend with frozen experts, run by test_frozen_experts.py in a process of its own that interprets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretrain.config.schema import ParallelConfig
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.layouts import CPU, single_process
from tests.model.test_frozen_experts import TRAINED, check_gradients, layer_of, results


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


def test_triton(mesh: Mesh) -> None:
    found = [results(layer_of(mesh, trained, backend="triton")) for trained in (TRAINED, None)]
    check_gradients(*found)


def test_asking_the_first_expert_is_noticed(mesh: Mesh) -> None:
    layer = layer_of(mesh, TRAINED, backend="triton")
    layer.trainable.fill_(bool(layer.trainable[0]))
    with pytest.raises(AssertionError, match="linear_fc1 1"):
        check_gradients(results(layer), results(layer_of(mesh, None, backend="triton")))
