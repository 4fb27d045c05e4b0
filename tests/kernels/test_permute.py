"""The permute pair against megatron-core's, and against each other."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from pretrain_kernels import Order, permute, sort_by_expert, unpermute

T, K, E, D = 20, 3, 6, 8


def choices(tokens: int = T, *, unused: int | None = 4) -> torch.Tensor:
    """Different experts [T, K] for every token; nobody chooses `unused`."""
    likelihood = torch.rand(tokens, E, generator=torch.Generator().manual_seed(0))
    if unused is not None:
        likelihood[:, unused] = 0
    return likelihood.topk(K).indices


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_order(index: torch.dtype) -> None:
    experts = choices().to(index)
    order = sort_by_expert(experts, E)
    assert torch.equal(order.rows_per_expert, experts.flatten().long().bincount(minlength=E))
    assert order.rows_per_expert[4] == 0
    assert torch.equal(order.choice[order.position.flatten()], torch.arange(T * K))
    owner = experts.flatten()[order.choice]
    keys = owner.long() * T * K + order.choice
    assert (keys.diff() > 0).all()  # by expert, and by token within one
    assert {tensor.dtype for tensor in vars(order).values()} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_megatron_core(dtype: torch.dtype) -> None:
    experts, x, y = choices(), tensor(T, D, dtype=dtype), tensor(T * K, D, dtype=dtype)
    order = sort_by_expert(experts, E)
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, experts, True)
    rows, _, indices = moe_utils.permute(x, chosen, num_out_tokens=T * K)[:3]
    assert torch.equal(permute(x, order), rows)
    summed = moe_utils.unpermute(y.float(), indices, torch.Size((T, D)))
    torch.testing.assert_close(unpermute(y, order), summed.to(dtype))


def test_each_is_the_gradient_of_the_other() -> None:
    order = sort_by_expert(choices(), E)
    x, rows = (tensor(n, D, dtype=torch.float64).requires_grad_() for n in (T, T * K))
    assert torch.autograd.gradcheck(lambda x: permute(x, order), (x,))
    assert torch.autograd.gradcheck(lambda rows: unpermute(rows, order), (rows,))
    other = sort_by_expert(choices(unused=0), E)
    with pytest.raises(RuntimeError, match="Jacobian"):
        torch.autograd.gradcheck(lambda x: _mismatched(x, order, other), (x,))


def _mismatched(x: torch.Tensor, forward: Order, backward: Order) -> torch.Tensor:
    """permute with the gradient of another order."""
    return permute(x, backward) + (permute(x, forward) - permute(x, backward)).detach()


def test_expanded_gradients() -> None:
    order = sort_by_expert(choices(), E)
    x, rows = tensor(T, D).requires_grad_(), tensor(T * K, D).requires_grad_()
    permute(x, order).sum().backward()
    unpermute(rows, order).sum().backward()
    assert torch.equal(x.grad, torch.full((T, D), float(K)))
    assert torch.equal(rows.grad, torch.ones(T * K, D))


def test_sums_in_fp32_and_in_the_order_of_choices() -> None:
    experts, rows = choices(), tensor(T * K, D, dtype=torch.bfloat16)
    order = sort_by_expert(experts, E)
    picked = rows[order.position].float()
    expected = ((picked[:, 0] + picked[:, 1]) + picked[:, 2]).bfloat16()
    assert torch.equal(unpermute(rows, order), expected)
    in_bf16 = rows[order.position]
    assert not torch.equal((in_bf16[:, 0] + in_bf16[:, 1]) + in_bf16[:, 2], expected)


def test_poison_stays_with_its_token() -> None:
    order, x = sort_by_expert(choices(), E), tensor(T, D)
    x[7] = float("nan")
    rows = permute(x, order)
    assert int(rows.isnan().any(-1).sum()) == K
    assert unpermute(rows, order).isnan().any(-1).nonzero().flatten().tolist() == [7]


def test_no_tokens() -> None:
    order = sort_by_expert(choices(0), E)
    assert order.rows_per_expert.tolist() == [0] * E
    assert permute(tensor(0, D), order).shape == unpermute(tensor(0, D), order).shape == (0, D)
