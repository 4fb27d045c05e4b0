"""The Triton backend with frozen experts, run by test_frozen_experts.py in a process of its own that interprets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pretrain.config.schema import ParallelConfig
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.layouts import CPU, single_process
from tests.model.test_frozen_experts import TRAINED, check_gradients, layer_of, results


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_triton(precision: str, main_grad: bool, mesh: Mesh) -> None:
    """In bf16, too: sums in `main_grad` are not rounded on the way, of these parameters as little as of one for all."""
    layers = [layer_of(mesh, trained, precision=precision, backend="triton") for trained in (TRAINED, None)]
    check_gradients(*(results(layer, precision=precision, main_grad=main_grad) for layer in layers))


def test_rounding_on_the_way_is_noticed(mesh: Mesh) -> None:
    options = {"precision": "bf16", "backend": "triton"}
    added = results(layer_of(mesh, None, **options), precision="bf16", main_grad=True)
    returned = results(layer_of(mesh, None, **options), precision="bf16")
    assert not torch.equal(added["linear_fc1 1"] - 2, returned["linear_fc1 1"].float())


def test_experts_without_rows_are_left_as_they_are(mesh: Mesh) -> None:
    found = results(layer_of(mesh, TRAINED, backend="triton"), main_grad=True)
    # One of those that train has no rows.
    assert bool((found["linear_fc2 3"] == 2.0).all())
    assert not bool((found["linear_fc2 4"] == 2.0).any())


def test_asking_the_first_expert_is_noticed(mesh: Mesh) -> None:
    layer = layer_of(mesh, TRAINED, backend="triton")
    layer.trainable.fill_(bool(layer.trainable[0]))
    with pytest.raises(AssertionError, match="linear_fc1 1"):
        check_gradients(results(layer), results(layer_of(mesh, None, backend="triton")))
