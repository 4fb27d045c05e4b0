"""Cases of the router kernels, run by test_router.py in a process of its own with TRITON_INTERPRET=1.

Compared with the torch implementation, which test_router.py holds to megatron-core's bit by bit.
"""

from __future__ import annotations

import pytest
import torch

from pretrain_kernels.router import TopK, route
from tests.kernels.router_rules import RULES, inputs

# fp32 with another order of sums and another exp: a few units in the last place of numbers up to 2.5.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_torch(rule):
    logits, bias, weights = inputs(rule, tokens=70)  # two programs, the second not full
    results = []
    for backend in ("torch", "triton"):
        x = logits.clone().requires_grad_()
        tokens = route(x, rule, bias=bias, backend=backend)
        (tokens.scores * weights).sum().backward()
        results.append((tokens.experts, tokens.scores, x.grad))
    (experts, scores, grad), (our_experts, our_scores, our_grad) = results
    assert torch.equal(our_experts, experts)
    assert our_experts.dtype == torch.int64
    torch.testing.assert_close(our_scores, scores, **ROUNDING)
    torch.testing.assert_close(our_grad, grad, **ROUNDING)
    assert grad.abs().max() > 1e-2 or (rule.score, rule.top_k) == ("softmax", 1)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 3, "group_top_k": 2}], ids=["free", "grouped"])
def test_ties_go_to_the_lower_number(groups):
    rule = TopK(top_k=4, score="sigmoid", **groups)
    logits = torch.randint(-1, 2, (20, 12)) / 2 * torch.tensor([1.0, -1.0]).repeat(6)  # many ties, zeros of both signs
    for bias in (None, torch.zeros(12)):
        ours, reference = (route(logits, rule, bias=bias, backend=backend) for backend in ("triton", "torch"))
        assert torch.equal(ours.experts, reference.experts)
    first = route(torch.zeros(3, 12), rule, backend="triton").experts
    assert torch.equal(first, torch.arange(4).expand(3, 4))


def test_numbers_that_are_not_finite_give_experts_that_exist():
    rule = TopK(top_k=3)
    logits = torch.randn(4, 6)
    logits[0, 2] = torch.nan
    logits[1] = -torch.inf
    logits[2, 1:] = -torch.inf
    tokens = route(logits, rule, backend="triton")
    assert torch.equal(tokens.experts, route(logits, rule, backend="torch").experts)
    assert tokens.experts[0, 0] == 2
    assert tokens.scores[0].isnan().all()
    assert torch.equal(tokens.scores[2], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(tokens.scores[3], route(logits[3:], rule, backend="triton").scores[0])


def test_low_precision_logits_and_any_layout():
    rule = TopK(top_k=3, score="sigmoid")
    logits = torch.randn(10, 9).bfloat16()
    strided = logits.T.contiguous().T.requires_grad_()
    tokens = route(strided, rule, backend="triton")
    expected = route(logits.float(), rule, backend="triton")
    assert torch.equal(tokens.experts, expected.experts)
    assert torch.equal(tokens.scores, expected.scores)
    tokens.scores.sum().backward()  # an expanded gradient
    assert strided.grad.dtype == torch.bfloat16
    assert strided.grad.abs().max() < 1e-6, "the scores of a token sum to one whatever the logits"
    again = route(strided, rule, backend="triton")
    (again.scores * torch.arange(3)).sum().backward()
    assert strided.grad.abs().max() > 1e-2


def test_no_tokens():
    logits = torch.randn(0, 8, requires_grad=True)
    tokens = route(logits, TopK(top_k=2), backend="triton")
    tokens.scores.sum().backward()
    assert tokens.experts.shape == tokens.scores.shape == (0, 2)
    assert logits.grad.shape == (0, 8)


def test_repeatable():
    logits, bias, _ = inputs(RULES[-1], tokens=70)
    once, twice = (route(logits, RULES[-1], bias=bias, backend="triton") for _ in range(2))
    assert torch.equal(once.experts, twice.experts)
    assert torch.equal(once.scores, twice.scores)
