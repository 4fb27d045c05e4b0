"""Finding the matrices of a logical tensor."""

from __future__ import annotations

import pytest
import torch

from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.matrices import join_matrices, split_matrices
from tests.optim.build import MOE, full_value

G, Q, C, D, E, F = 4, 2, 6, 32, 4, 24


def logical(suffix: str) -> LogicalTensor:
    return next(t for t in logical_tensors(MOE) if t.key.endswith(suffix))


@pytest.mark.parametrize(
    ("suffix", "shapes"),
    [
        ("linear_qkv.weight", [(1, G * Q * C, D), (2, G * C, D)]),
        ("linear_proj.weight", [(1, D, G * Q * C)]),
        ("0.mlp.linear_fc1.weight", [(2, 48, D)]),
        ("0.mlp.linear_fc2.weight", [(1, D, 48)]),
        ("experts.linear_fc1.weight", [(E * 2, F, D)]),
        ("experts.linear_fc2.weight", [(E, D, F)]),
        ("shared_experts.linear_fc1.weight", [(2, 16, D)]),
        ("router.weight", [(1, E, D)]),
    ],
)
def test_shapes_and_round_trip(suffix, shapes):
    tensor = logical(suffix)
    box = full_value(tensor, "box")
    batches = split_matrices(tensor, box)
    assert [tuple(batch.shape) for batch in batches] == shapes
    assert torch.equal(join_matrices(tensor, batches, box), box)
    assert not torch.equal(join_matrices(tensor, [batch.flip(-1) for batch in batches], box), box)


def test_qkv_is_queries_keys_values_of_the_stored_matrix():
    tensor = logical("linear_qkv.weight")
    box = full_value(tensor, "box")
    stored = box.view(G * (Q + 2) * C, D)  # as megatron-core has it: group by group queries, key, value
    rows = torch.arange(len(stored)).view(G, (Q + 2) * C)
    queries, keys_values = split_matrices(tensor, box)
    assert torch.equal(queries[0], stored[rows[:, : Q * C].flatten()])
    assert torch.equal(keys_values[0], stored[rows[:, Q * C : (Q + 1) * C].flatten()])
    assert torch.equal(keys_values[1], stored[rows[:, (Q + 1) * C :].flatten()])


def test_experts_gate_and_up_are_apart():
    tensor = logical("experts.linear_fc1.weight")
    box = full_value(tensor, "box")
    (batch,) = split_matrices(tensor, box)
    for expert in range(E):
        for half in range(2):
            assert torch.equal(batch[2 * expert + half], box[expert, half])


def test_every_hidden_matrix_of_a_model_splits():
    kinds = {t.kind for t in logical_tensors(MOE)}
    assert {"matrix", "router"} <= kinds
    for tensor in logical_tensors(MOE):
        if tensor.kind in ("matrix", "router"):
            batches = split_matrices(tensor, torch.empty(tensor.shape, device="meta"))
            assert sum(batch.numel() for batch in batches) == tensor.numel


def test_axes_that_are_no_matrix_are_refused():
    tensor = LogicalTensor("odd", ("ffn", "hidden", "head_dim"), (2, 3, 4), "matrix", {})
    with pytest.raises(AssertionError, match="hidden"):
        split_matrices(tensor, torch.zeros(2, 3, 4))
