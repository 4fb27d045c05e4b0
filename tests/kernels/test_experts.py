"""The expert layer of every backend against its fp64 reference, and what must hold without one.

Run with TRITON_INTERPRET=1, every test of this file also takes the Triton backend.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel

from pretrain_kernels import Grouped, Tokens, grouped, swiglu_experts
from pretrain_kernels.grouped import GROUPED_MM, LOOP
from pretrain_kernels.triton_support import interpreting
from tests.kernels.layers import NAMES, ROWS, Layer, Results, errors, random_layer, same

BACKENDS = ["loop", "grouped_mm", *(["triton"] if interpreting() else [])]
# Of norms. fp32 sums up at most 130 products, fp64 likewise; bf16 rounds h, the activation and the result, 2^-9 each;
# Triton's interpreter cuts bf16 off instead, 2^-8 each and all in one direction.
BOUND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2 if interpreting() else 8e-3}


def layers(dtype: torch.dtype = torch.float32, **shape: int) -> list[Layer]:
    """One of each routing: grouped rows of all kinds, tokens with one and with three experts, and no token."""
    grouped_rows = [random_layer(rows, dtype=dtype, **shape) for rows in ROWS.values()]
    return [
        *grouped_rows,
        random_layer(dtype=dtype, **shape),
        random_layer(per_token=1, dtype=dtype, **shape),
        random_layer(tokens=0, dtype=dtype, **shape),
    ]


def row_by_row(layer: Layer) -> Results:
    """Grouped rows by the definition, one at a time, in fp64."""
    assert isinstance(layer.routing, Grouped)
    leaves = [tensor.double() for tensor in (layer.x, layer.fc1, layer.fc2, layer.routing.scores)]
    x, fc1, fc2, scores = (leaf.clone().requires_grad_() for leaf in leaves)
    expert_of_row = [expert for expert, count in enumerate(layer.routing.rows_per_expert) for _ in range(count)]
    y, width = 0 * x, fc2.shape[-1]
    for row, expert in enumerate(expert_of_row):
        gate, up = fc1[expert, :width] @ x[row], fc1[expert, width:] @ x[row]
        out = fc2[expert] @ (gate / (1 + torch.exp(-gate)) * up * scores[row])
        y = y.index_put((torch.tensor(row),), out)
    leaves = (x, fc1, fc2, scores)
    gradients = torch.autograd.grad(y, leaves, layer.dy.double(), allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("rows", [rows for rows in ROWS.values() if sum(rows) < 100])
def test_reference_equals_the_definition(rows: list[int]) -> None:
    layer = random_layer(rows, dtype=torch.float64)
    assert max(errors(layer.reference(), row_by_row(layer)).values()) < 1e-14


def test_reference_of_tokens_equals_that_of_their_rows() -> None:
    layer = random_layer()
    expanded = Grouped(torch.tensor([3, 0, 0, 0, 0]), layer.routing.scores[0])
    assert isinstance(layer.routing, Tokens)
    order = layer.routing.experts[0].sort()
    counts = layer.routing.experts[0].bincount(minlength=5)
    expanded = Grouped(counts, layer.routing.scores[0][order.indices])
    rows = replace(layer, x=layer.x[:1].expand(3, -1), routing=expanded, dy=layer.dy[:1].expand(3, -1))
    torch.testing.assert_close(row_by_row(rows)["y"].sum(0), layer.reference()["y"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_fp64(backend: str, dtype: torch.dtype) -> None:
    for layer in layers(dtype):
        results = layer.run(backend)
        assert max(errors(results, layer.reference()).values()) < BOUND[dtype]
        assert [tensor.dtype for tensor in results.values()] == [dtype] * 4 + [torch.float32]


@pytest.mark.parametrize(("D", "width"), [(7, 5), (33, 8), (8, 33), (12, 18)])
@pytest.mark.parametrize("dtype", BOUND)
def test_odd_widths_and_fp64_take_the_loop(dtype: torch.dtype, D: int, width: int) -> None:
    for layer in layers(dtype, D=D, F=width):
        results = layer.run("auto")
        assert max(errors(results, layer.reference()).values()) < BOUND[dtype]
        assert same(results, layer.run("loop"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_as_accurate_as_a_plain_loop_in_bf16(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the interpreter cuts bf16 off instead of rounding it")
    for layer in (random_layer(ROWS["about 128"], dtype=torch.bfloat16), random_layer(dtype=torch.bfloat16)):
        truth = layer.reference()
        ours, theirs = errors(layer.run(backend), truth), errors(layer.reference(dtype=torch.bfloat16), truth)
        assert all(ours[name] <= 1.5 * theirs[name] for name in NAMES), (ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shifted_group_is_noticed(backend: str) -> None:
    layer = random_layer(ROWS["uneven"])
    shifted = replace(layer.routing, rows_per_expert=torch.tensor([8, 0, 4, 9, 3]))
    assert min(errors(replace(layer, routing=shifted).run(backend), layer.reference()).values()) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_unused_experts_are_zeros(backend: str) -> None:
    """Not None: the reduction over ranks waits for every parameter's gradient."""
    for rows in ROWS.values():
        results = random_layer(rows).run(backend)
        for expert, count in enumerate(rows):
            assert bool(results["fc1"][expert].any()) == bool(results["fc2"][expert].any()) == (count > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_experts(backend: str) -> None:
    """No weight gradient for them, the same one for the others, and gradients through both."""
    for layer in (random_layer(ROWS["uneven"]), random_layer(ROWS["middle empty"]), random_layer()):
        for mask in ([True] * 5, [False, True, True, False, True], [False] * 5):
            trainable = torch.tensor(mask)
            results, full = layer.run(backend, trainable=trainable), layer.run(backend)
            assert same(results, full, "y", "x", "scores")
            for name in ("fc1", "fc2"):
                assert torch.equal(results[name][trainable], full[name][trainable])
                assert not results[name][~trainable].any()
            assert max(errors(results, layer.reference(trainable=trainable)).values()) < BOUND[torch.float32]


def test_frozen_experts_cost_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop leaves out their products; to grouped_mm they have no rows."""
    layer, trainable = random_layer(ROWS["uneven"]), torch.tensor([False, True, True, False, True])
    rows: list[int] = []
    mm, grouped_mm = torch.mm, F.grouped_mm

    def counted_mm(a, b, *, out):
        rows.append(a.shape[1])
        return mm(a, b, out=out)

    def counted_grouped_mm(a, b, *, offs):
        if b.dim() == 2:
            rows.append(int(offs[-1]))
        return grouped_mm(a, b, offs=offs)

    monkeypatch.setattr(grouped.torch, "mm", counted_mm)
    monkeypatch.setattr(grouped.F, "grouped_mm", counted_grouped_mm)
    counts = torch.tensor(ROWS["uneven"])
    for products in (LOOP, GROUPED_MM):
        for mask, expected in ((None, 24), (trainable, 8)):
            rows.clear()
            products.weight_gradient(layer.dy, layer.x, counts, mask)
            assert sum(rows) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_stays_where_it_is(backend: str) -> None:
    """NaN and infinity in the rows of an expert, in its weights, or in memory that nobody has written to."""
    layer = random_layer(ROWS["uneven"])
    clean, bad = layer.run(backend), slice(8, 12)  # the rows of expert 2
    x, dy, fc1 = layer.x.clone(), layer.dy.clone(), layer.fc1.clone()
    x[bad], dy[bad], fc1[2] = float("nan"), float("inf"), float("nan")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = replace(layer, x=x, dy=dy, fc1=fc1).run(backend, trainable=torch.tensor([1, 1, 0, 1, 1]).bool())
        untouched = layer.run(backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(clean, untouched)
    others = torch.tensor([0, 1, 3, 4])
    for name in ("fc1", "fc2"):
        assert torch.equal(poisoned[name][others], clean[name][others])
        assert not poisoned[name][2].any()
    for name in ("y", "x", "scores"):
        assert poisoned[name][bad].isnan().any()
        assert torch.equal(poisoned[name][: bad.start], clean[name][: bad.start])
        assert torch.equal(poisoned[name][bad.stop :], clean[name][bad.stop :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_on_one_expert_is_a_dense_layer(backend: str) -> None:
    layer = random_layer(ROWS["all on one"])
    gate, up = F.linear(layer.x, layer.fc1[2]).chunk(2, dim=-1)
    dense = F.linear(F.silu(gate) * up, layer.fc2[2]) * layer.routing.scores.unsqueeze(-1)
    torch.testing.assert_close(layer.run(backend)["y"], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_tokens_and_of_experts_does_not_matter(backend: str) -> None:
    layer = random_layer()
    results, routing = layer.run(backend), layer.routing
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = Tokens(routing.experts[shuffle], routing.scores[shuffle])
    shuffled = replace(layer, x=layer.x[shuffle], dy=layer.dy[shuffle], routing=moved).run(backend)
    expected = {name: results[name][shuffle] if name in ("y", "x", "scores") else results[name] for name in NAMES}
    assert max(errors(shuffled, expected).values()) < BOUND[torch.float32]
    assert errors(shuffled, results)["y"] > 0.1

    new_number = torch.tensor([3, 0, 4, 1, 2])
    renamed = replace(layer, routing=replace(routing, experts=new_number[routing.experts]))
    renumbered = replace(renamed, fc1=layer.fc1[new_number.argsort()], fc2=layer.fc2[new_number.argsort()]).run(backend)
    expected = {name: results[name][new_number.argsort()] if "fc" in name else results[name] for name in NAMES}
    assert max(errors(renumbered, expected).values()) < BOUND[torch.float32]
    assert errors(renamed.run(backend), results)["y"] > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_copies_with_half_the_score_each_are_one_expert(backend: str) -> None:
    layer = random_layer(per_token=2)
    routing = layer.routing
    assert isinstance(routing, Tokens)
    twins = Tokens(torch.cat([routing.experts, routing.experts + 5], dim=1), routing.scores.repeat(1, 2) / 2)
    doubled = replace(layer, fc1=layer.fc1.repeat(2, 1, 1), fc2=layer.fc2.repeat(2, 1, 1), routing=twins).run(backend)
    single = layer.run(backend)
    halves = {name: doubled[name].unflatten(0, (2, 5)) for name in ("fc1", "fc2")}
    merged = {"y": doubled["y"], "x": doubled["x"], "scores": doubled["scores"][:, :2]}
    merged |= {name: copies.sum(0) for name, copies in halves.items()}
    assert max(errors(merged, single).values()) < BOUND[torch.float32]
    assert all(torch.equal(copies[0], copies[1]) for copies in halves.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_by_bit(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in (random_layer(dtype=dtype), random_layer(ROWS["about 128"], dtype=dtype)):
            assert same(layer.run(backend), layer.run(backend))
    assert not same(random_layer().run(backend), random_layer(seed=1).run(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_activation_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(dtype=dtype)
    expected = layer.run("grouped_mm")
    blocks: list[torch.Tensor] = []
    widened = grouped._widened
    monkeypatch.setattr(grouped, "_widened", lambda rows, scores: blocks.append(rows) or widened(rows, scores))
    monkeypatch.setitem(grouped.BLOCK, "cpu", 0)  # row by row
    assert same(layer.run("grouped_mm"), expected)
    assert {len(rows) for rows in blocks} == {1}
    assert len(blocks) == 3 * layer.routing.scores.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores(backend: str) -> None:
    """The output is linear in them, they could as well weigh the output, and their gradient says so."""
    layer = random_layer(ROWS["uneven"])
    results = layer.run(backend)
    doubled = replace(layer, routing=replace(layer.routing, scores=2 * layer.routing.scores)).run(backend)
    assert torch.equal(doubled["y"], 2 * results["y"])  # a factor of two does not round
    plain = replace(layer, routing=replace(layer.routing, scores=torch.ones(24))).run(backend)
    torch.testing.assert_close(plain["y"] * layer.routing.scores.unsqueeze(-1), results["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((plain["y"] * layer.dy).sum(-1), results["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_gradients_in_any_memory_layout(backend: str) -> None:
    for layer in (random_layer(ROWS["uneven"]), random_layer()):
        x = torch.empty(32, len(layer.x)).T.copy_(layer.x)
        expanded = torch.ones(()).expand(layer.dy.shape)
        transposed = torch.empty(32, len(layer.x)).T.copy_(layer.dy)
        assert not any(tensor.is_contiguous() for tensor in (x, expanded, transposed))
        assert same(replace(layer, x=x, dy=transposed).run(backend), layer.run(backend))
        assert same(replace(layer, dy=expanded).run(backend), replace(layer, dy=torch.ones_like(layer.dy)).run(backend))


def parameters(layer: Layer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """fc1 and fc2 with a main gradient of ones."""
    found = (torch.nn.Parameter(layer.fc1.clone()), torch.nn.Parameter(layer.fc2.clone()))
    for parameter in found:
        parameter.main_grad = torch.ones(parameter.shape)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_collects_micro_batches(backend: str) -> None:
    layer, trainable = random_layer(dtype=torch.bfloat16), torch.tensor([True, False, True, True, True])
    weights = parameters(layer)
    halves = [slice(0, 15), slice(15, 30)]
    assert isinstance(layer.routing, Tokens)
    for half in halves:
        routing = Tokens(layer.routing.experts[half], layer.routing.scores[half])
        out = swiglu_experts(
            layer.x[half], *weights, routing, trainable=trainable, backend=backend, accumulate_main_grad=True
        )
        out.backward(layer.dy[half])
    expected = layer.reference(trainable=trainable)
    for name, weight in zip(("fc1", "fc2"), weights, strict=True):
        assert weight.grad is None
        collected = weight.main_grad - 1
        assert not collected[1].any()
        assert float((collected - expected[name]).norm() / expected[name].norm()) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_under_megatron_cores_hook(backend: str, overlap: bool) -> None:
    """The hook adds nothing a second time, finds the gradient that it insists on, and leaves none."""
    layer = random_layer()
    weights, ready = parameters(layer), []
    group = SimpleNamespace(register_grad_ready=lambda parameter, _: ready.append(parameter))
    ddp = SimpleNamespace(
        param_to_bucket_group=dict.fromkeys(weights, group),
        ddp_config=SimpleNamespace(overlap_grad_reduce=overlap),
        force_all_reduce=False,
    )
    for weight in weights:
        weight.grad_added_to_main_grad = False
        weight.register_post_accumulate_grad_hook(DistributedDataParallel._make_backward_post_hook(ddp, weight))
    for accumulate, expected in ((True, 1.0), (False, 2.0)):
        out = swiglu_experts(layer.x, *weights, layer.routing, backend=backend, accumulate_main_grad=accumulate)
        out.backward(layer.dy)
        for name, weight in zip(("fc1", "fc2"), weights, strict=True):
            assert weight.grad is None
            assert weight.grad_added_to_main_grad is accumulate
            torch.testing.assert_close(weight.main_grad - 1, expected * layer.run(backend)[name], rtol=1e-4, atol=1e-5)
            weight.grad_added_to_main_grad = False
    assert len(ready) == (4 if overlap else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_through_a_kept_graph(backend: str) -> None:
    layer = random_layer()
    x = layer.x.clone().requires_grad_()
    out = swiglu_experts(x, layer.fc1, layer.fc2, layer.routing, backend=backend)
    out.backward(layer.dy, retain_graph=True)
    once = x.grad.clone()
    out.backward(layer.dy)
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("wanted", NAMES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    layer = random_layer()
    leaves = {"x": layer.x, "fc1": layer.fc1, "fc2": layer.fc2, "scores": layer.routing.scores}
    leaf = leaves[wanted] = leaves[wanted].clone().requires_grad_()
    routing = replace(layer.routing, scores=leaves["scores"])
    swiglu_experts(leaves["x"], leaves["fc1"], leaves["fc2"], routing, backend=backend).backward(layer.dy)
    assert torch.equal(leaf.grad, layer.run(backend)[wanted])


def saved_bytes(layer: Layer, backend: str) -> int:
    """What autograd keeps for backward, without the weights."""
    weights = {layer.fc1.data_ptr(), layer.fc2.data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu_experts(layer.x.requires_grad_(), layer.fc1, layer.fc2, layer.routing, backend=backend)
    return sum(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_only_rows_and_pre_activations(backend: str) -> None:
    layer = random_layer(ROWS["about 128"], dtype=torch.bfloat16)
    R, (E, D, width) = len(layer.x), layer.fc2.shape
    needed = 2 * R * D + 4 * R * width
    assert needed <= saved_bytes(layer, backend) <= needed + 8 * (R + E) + 1024


def losses(backend: str, *, steps: int = 50, scale: float = 1.0) -> list[float]:
    """Loss of gradient descent on a layer that is to become another one; scores by a softmax over a few experts."""
    goal, layer = (random_layer(tokens=16, experts=3, per_token=2, D=16, F=8, seed=seed) for seed in (1, 0))
    target = goal.run("loop")["y"]
    fc1, fc2 = (weight.clone().requires_grad_() for weight in (layer.fc1, layer.fc2))
    router = torch.zeros(3, 16, requires_grad=True)
    curve = []
    for _ in range(steps):
        scores, experts = (layer.x @ router.T).softmax(-1).topk(2)
        loss = F.mse_loss(swiglu_experts(layer.x, fc1, fc2, Tokens(experts, scale * scores), backend=backend), target)
        for leaf, gradient in zip((fc1, fc2, router), torch.autograd.grad(loss, (fc1, fc2, router)), strict=True):
            leaf.data -= 0.5 * gradient
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("backend", ["auto", *BACKENDS[1:]])
def test_loss_curves_are_equal(backend: str) -> None:
    expected = losses("loop")
    assert expected[-1] < 0.8 * expected[0]
    assert losses(backend) == pytest.approx(expected, rel=1e-5)
    assert losses("loop", scale=1.001) != pytest.approx(expected, rel=1e-5)
