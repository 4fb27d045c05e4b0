"""The top-k router: megatron-core's is the oracle, bit by bit; the kernels in Triton's interpreter, and their code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from pretrain_kernels import Tokens, router, swiglu_experts
from pretrain_kernels.router import TopK, choose_backend, dense_map, route
from tests.kernels.router_rules import EXPERTS, RULES, inputs
from tests.kernels.triton_process import run_cases


def oracle(logits: torch.Tensor, rule: TopK, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return topk_routing_with_score_function(
        logits,
        rule.top_k,
        use_pre_softmax=rule.score == "all_softmax",
        num_groups=rule.num_groups or None,
        group_topk=rule.group_top_k or None,
        scaling_factor=rule.scaling_factor,
        score_function="sigmoid" if rule.score == "sigmoid" else "softmax",
        expert_bias=bias,
    )


def compare(ours: TopK, theirs: TopK, *, biased: bool) -> tuple[bool, bool, bool]:
    """Whether choice, weights and gradient of `ours` are those of megatron-core's router under the rule `theirs`."""
    logits, bias, _ = inputs(theirs, tokens=200)
    bias = bias if biased else None
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights, chosen = dense_map(route(x, ours, bias=bias), EXPERTS)
    expected_weights, expected_chosen = oracle(y, theirs, bias)
    gradient = torch.randn_like(logits)
    weights.backward(gradient)
    expected_weights.backward(gradient)
    return torch.equal(chosen, expected_chosen), torch.equal(weights, expected_weights), torch.equal(x.grad, y.grad)


# With softmax, megatron-core ignores a bias, and we refuse it.
@pytest.mark.parametrize(
    ("rule", "biased"),
    [(rule, biased) for rule in RULES for biased in (False, True) if rule.score == "sigmoid" or not biased],
    ids=str,
)
def test_equals_megatron(rule, biased):
    assert compare(rule, rule, biased=biased) == (True, True, True)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_another_rule_does_not(rule):
    chosen, weights, gradient = compare(replace(rule, scaling_factor=2.0), rule, biased=False)
    assert (chosen, weights) == (True, False)
    assert gradient is ((rule.score, rule.top_k) == ("softmax", 1)), "a single weight is one whatever the logits"
    if rule.num_groups:
        free = replace(rule, num_groups=0, group_top_k=0)
        assert compare(free, rule, biased=False)[0] is False


def test_low_precision_logits_are_routed_in_fp32():
    rule = RULES[-1]
    logits, bias, _ = inputs(rule, tokens=100)
    low = logits.bfloat16()
    weights, chosen = dense_map(route(low, rule, bias=bias), EXPERTS)
    expected_weights, expected_chosen = oracle(low.float(), rule, bias)
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, expected_chosen)
    assert torch.equal(weights, expected_weights)


def test_best_expert_comes_first():
    logits, _, _ = inputs(TopK(top_k=4), tokens=50)
    tokens = route(logits, TopK(top_k=4))
    assert torch.equal(tokens.experts, logits.topk(4, dim=1).indices)
    assert (tokens.scores.diff(dim=1) < 0).all()


def test_ties_go_to_the_lower_number():
    logits = torch.zeros(5, 64)
    assert torch.equal(route(logits, TopK(top_k=8)).experts, torch.arange(8).expand(5, 8))
    assert not torch.equal(logits.topk(8, dim=1).indices, torch.arange(8).expand(5, 8)), "torch.topk does otherwise"
    logits[:, 7], logits[:, 11] = -0.0, 1.0
    assert route(logits, TopK(top_k=9)).experts[0].tolist() == [11, 0, 1, 2, 3, 4, 5, 6, 7]
    grouped = TopK(top_k=4, score="sigmoid", num_groups=4, group_top_k=2)
    logits[:, 40:42] = 1.0  # group 2, with a sum above that of group 0, where 11 is
    assert route(logits, grouped).experts[0].tolist() == [11, 40, 41, 0]


def test_a_number_that_is_no_number_ranks_first():
    logits = torch.randn(3, 8)
    logits[1, 5] = torch.nan
    tokens = route(logits, TopK(top_k=2))
    assert tokens.experts[1, 0] == 5
    assert tokens.scores.isnan().any(dim=1).tolist() == [False, True, False]


def test_bias_changes_the_choice_and_nothing_else():
    rule = TopK(top_k=4, score="sigmoid")
    logits, bias, _ = inputs(rule, tokens=50)
    bias.requires_grad_()
    logits.requires_grad_()
    biased, free = route(logits, rule, bias=bias), route(logits, rule)
    assert not torch.equal(biased.experts, free.experts)
    scores = torch.sigmoid(logits).gather(1, biased.experts)
    torch.testing.assert_close(biased.scores, scores / scores.sum(dim=1, keepdim=True))
    biased.scores[:, 0].sum().backward()
    assert bias.grad is None
    assert logits.grad.abs().max() > 0


def test_feeds_the_expert_layer():
    torch.manual_seed(0)
    x, fc1, fc2 = torch.randn(9, 8), torch.randn(EXPERTS, 12, 8), torch.randn(EXPERTS, 8, 6)
    logits, _, _ = inputs(RULES[0], tokens=9)
    tokens = route(logits, RULES[0])
    y = swiglu_experts(x, fc1, fc2, tokens)
    gate, up = torch.einsum("td,efd->tef", x, fc1).chunk(2, dim=2)
    every = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, fc2)
    weights, _ = dense_map(tokens, EXPERTS)
    torch.testing.assert_close(y, (every * weights[:, :, None]).sum(dim=1), rtol=1e-4, atol=1e-4)
    other = swiglu_experts(x, fc1, fc2, Tokens(tokens.experts.roll(1, dims=1), tokens.scores))
    assert (other - y).abs().max() > 0.1


@pytest.mark.parametrize(
    ("rule", "biased", "message"),
    [
        (TopK(top_k=0), False, "top_k = 0: must be from 1 to the 24 experts"),
        (TopK(top_k=25), False, "top_k = 25: must be from 1 to the 24 experts"),
        (TopK(top_k=2), True, 'score = "softmax": a selection bias needs "sigmoid"'),
        (TopK(top_k=2, num_groups=5, group_top_k=1), False, "num_groups = 5: must divide the 24 experts"),
        (TopK(top_k=2, group_top_k=1), False, "num_groups = 0: must divide the 24 experts"),
        (TopK(top_k=2, num_groups=6), False, "group_top_k = 0: must be from 1 to num_groups and to top_k"),
        (
            TopK(top_k=2, num_groups=6, group_top_k=3),
            False,
            "group_top_k = 3: must be from 1 to num_groups and to top_k",
        ),
        (TopK(top_k=9, num_groups=6, group_top_k=2), False, "top_k = 9: 2 groups have 8 experts"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, biased, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        route(torch.randn(3, EXPERTS), rule, bias=torch.zeros(EXPERTS) if biased else None)


def test_backend_is_chosen_by_device_and_experts(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_backend(cuda, 1024) == "triton"
    assert choose_backend(cuda, 1025) == "torch"
    assert choose_backend(torch.device("cpu"), 64) == "torch"
    monkeypatch.setattr(router.triton_support, "installed", lambda: False)
    assert choose_backend(cuda, 64) == "torch"


CASES = Path(__file__).parent / "router_cases.py"

# A wrong factor, and no limit to the groups.
BREAK_KERNEL = """
from dataclasses import replace
from pretrain_kernels.triton_support import Launch
run = Launch.run
def broken(launch):
    new = {"scale": 1.25, "GROUP_K": 99}
    run(replace(launch, arguments={name: new.get(name, value) for name, value in launch.arguments.items()}))
Launch.run = broken
"""


def test_kernels_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    results = run_cases(CASES, tmp_path, interpret=True)
    assert len(results) > 12
    assert not {name: message for name, message in results.items() if message}


def test_broken_kernels_are_noticed(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    results = run_cases(CASES, tmp_path, interpret=True, only="equals_torch or ties or no_tokens", first=BREAK_KERNEL)
    right = {name for name, message in results.items() if not message}
    assert right == {"test_ties_go_to_the_lower_number[free]", "test_no_tokens"}
    assert len(results) == len(RULES) + 3


@pytest.mark.parametrize(
    ("rule", "experts"),
    [
        (TopK(top_k=8), 128),
        (TopK(top_k=8, score="sigmoid", num_groups=8, group_top_k=4), 256),
        (TopK(top_k=16, score="sigmoid"), 1024),
    ],
    ids=str,
)
def test_machine_code_has_no_spills(rule, experts):
    pytest.importorskip("triton", reason="Triton is not installed")
    from pretrain_kernels.triton_compile import compile_ahead
    from pretrain_kernels.triton_router import backward_launch, forward_launch

    logits = torch.empty(4096, experts, device="meta")
    chosen = torch.empty(4096, rule.top_k, dtype=torch.int64, device="meta")
    scores = torch.empty(4096, rule.top_k, device="meta")
    bias = torch.empty(experts, device="meta") if rule.score == "sigmoid" else None
    for launch in (
        forward_launch(logits, rule, bias, chosen, scores),
        backward_launch(logits, rule, chosen, scores, logits),
    ):
        compiled = compile_ahead(launch, capability=90)
        assert compiled.local_accesses == compiled.stack_bytes == 0
