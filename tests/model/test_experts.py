"""Our experts against megatron-core's, one by one, and against a loop in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from pretrain.config.schema import ParallelConfig
from pretrain.model import experts
from pretrain.model.experts import grouped_linear, grouped_swiglu
from pretrain.model.native import GroupedExperts
from pretrain.model.transformer_config import compute_dtype, transformer_config
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.configs import MOE, make_config
from tests.helpers.layouts import CPU, single_process

E, D, FFN = 5, 32, 24

# Rows of each expert, from none in the first, the last, the middle or all but one, to no row at all.
ROWS = {
    "uneven": [7, 1, 4, 9, 3],
    "first empty": [0, 5, 3, 2, 1],
    "middle empty": [4, 0, 0, 6, 1],
    "last empty": [2, 8, 1, 3, 0],
    "all on one": [0, 0, 13, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


def random_inputs(rows: list[int], dtype: torch.dtype, *, hidden: int = D, ffn: int = FFN) -> list[torch.Tensor]:
    """x [R, D], fc1 [E, 2F, D], fc2 [E, D, F], scores [R] (fp32, as the router's, or fp64), and a gradient [R, D]."""
    generator = torch.Generator().manual_seed(sum(rows))
    R = sum(rows)
    shapes = [(R, hidden), (len(rows), 2 * ffn, hidden), (len(rows), hidden, ffn), (R,), (R, hidden)]
    x, fc1, fc2, scores, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    scores = scores.sigmoid().to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [x.to(dtype), fc1.to(dtype), fc2.to(dtype), scores, grad.to(dtype)]


def run(rows: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output of grouped_swiglu and gradients of x, fc1, fc2 and scores."""
    *leaves, grad = inputs
    x, fc1, fc2, scores = (leaf.clone().requires_grad_() for leaf in leaves)
    out = grouped_swiglu(x, fc1, fc2, torch.tensor(rows), scores)
    return [out, *torch.autograd.grad(out, (x, fc1, fc2, scores), grad)]


def loop_in_fp64(rows: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same by the formula, row by row of the definition."""
    *leaves, grad = (tensor.double() for tensor in inputs)
    x, fc1, fc2, scores = (leaf.clone().requires_grad_() for leaf in leaves)
    expert_of_row = [expert for expert, count in enumerate(rows) for _ in range(count)]
    out = 0 * x
    for row, expert in enumerate(expert_of_row):
        ffn = fc2.shape[-1]
        gate, up = fc1[expert, :ffn] @ x[row], fc1[expert, ffn:] @ x[row]
        y = fc2[expert] @ (gate / (1 + torch.exp(-gate)) * up * scores[row])
        out = out.index_put((torch.tensor(row),), y)
    gradients = torch.autograd.grad(out, (x, fc1, fc2, scores), grad, allow_unused=True, materialize_grads=True)
    return [out, *gradients]


def errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Largest difference of each tensor over its largest entry; 0 for empty tensors."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) if a.numel() else 0.0
        for a, b in zip(actual, expected, strict=True)
    ]


# Relative to the largest entry; sums of up to 32 products. bf16 rounds the two intermediates and the result.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_a_loop_in_fp64(rows: list[int], dtype: torch.dtype) -> None:
    inputs = random_inputs(rows, dtype)
    actual, expected = run(rows, inputs), loop_in_fp64(rows, inputs)
    assert max(errors(actual, expected)) < TOLERANCE[dtype]
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, dtype, dtype, inputs[3].dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "ffn"), [(7, 5), (33, 8), (8, 33), (12, 6)])
def test_odd_widths(hidden: int, ffn: int, dtype: torch.dtype) -> None:
    for rows in ROWS.values():
        inputs = random_inputs(rows, dtype, hidden=hidden, ffn=ffn)
        assert max(errors(run(rows, inputs), loop_in_fp64(rows, inputs))) < TOLERANCE[dtype]


def test_a_shifted_group_is_noticed() -> None:
    rows = ROWS["uneven"]
    inputs = random_inputs(rows, torch.float32)
    shifted = run([rows[0] + 1, rows[1] - 1, *rows[2:]], inputs)
    assert min(errors(shifted, loop_in_fp64(rows, inputs))) > 0.1


@pytest.mark.parametrize(("hidden", "ffn"), [(D, FFN), (7, 5)])
def test_gradients_of_unused_experts_are_zeros(hidden: int, ffn: int) -> None:
    """Not None: the reduction over ranks waits for every parameter's gradient."""
    for rows in ROWS.values():
        _, x, fc1, fc2, scores = run(rows, random_inputs(rows, torch.float32, hidden=hidden, ffn=ffn))
        assert x.shape == (sum(rows), hidden)
        assert scores.shape == (sum(rows),)
        for expert, count in enumerate(rows):
            assert bool(fc1[expert].any()) == bool(fc2[expert].any()) == (count > 0)


def test_grouped_mm_is_used_wherever_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is for what torch's grouped_mm refuses."""
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(experts.F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs))

    def uses_it(width: int, dtype: torch.dtype) -> bool:
        calls.clear()
        x, weight = torch.ones(3, 16, dtype=dtype), torch.ones(2, width, 16, dtype=dtype)
        grouped_linear(x, weight, torch.tensor([1, 2]))
        return bool(calls)

    assert [width for width in range(1, 17) if uses_it(width, torch.float32)] == [4, 8, 12, 16]
    assert [width for width in range(1, 17) if uses_it(width, torch.bfloat16)] == [8, 16]
    assert not any(uses_it(width, torch.float64) for width in range(1, 17))

    def forward_backward(width: int, dtype: torch.dtype) -> None:
        x, weight = torch.ones(3, 16, dtype=dtype, requires_grad=True), torch.ones(2, width, 16, dtype=dtype)
        out = grouped_mm(x, weight.transpose(-2, -1), offs=torch.tensor([1, 3], dtype=torch.int32))
        out.backward(torch.ones_like(out))

    for width, dtype in ((5, torch.float32), (12, torch.bfloat16), (8, torch.float64)):
        with pytest.raises(RuntimeError):
            forward_backward(width, dtype)


def test_gradients_and_rows_in_any_memory_layout() -> None:
    weight = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).t().requires_grad_()
    grouped_linear(x, weight, torch.tensor([2, 3])).sum().backward()
    assert x.grad is not None
    expected = torch.cat([weight[0].sum(0).expand(2, -1), weight[1].sum(0).expand(3, -1)])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_megatron_cores_experts(rows: list[int], precision: str, mesh: Mesh) -> None:
    keys = {"model.hidden_size": D, "model.expert_ffn_size": FFN, "model.num_experts": E, "run.precision": precision}
    model = make_config(MOE, keys).model
    dtype = compute_dtype(precision)
    config = transformer_config(model, ParallelConfig(), precision)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    theirs = SequentialMLP(E, config, submodules, mesh.groups)
    ours = GroupedExperts(E, config, mesh.groups)
    x, fc1, fc2, scores, grad = random_inputs(rows, dtype)
    with torch.no_grad():
        ours.linear_fc1.weight.copy_(fc1)
        ours.linear_fc2.weight.copy_(fc2)
        for expert, mlp in enumerate(theirs.local_experts):
            mlp.linear_fc1.weight.copy_(fc1[expert])
            mlp.linear_fc2.weight.copy_(fc2[expert])
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        out, bias = module(leaves[0], torch.tensor(rows), leaves[1])
        assert bias is None
        out.backward(grad)
        results.append([out, *(leaf.grad for leaf in leaves)])
    results[0] += [ours.linear_fc1.weight.grad, ours.linear_fc2.weight.grad]
    results[1] += [
        torch.stack([getattr(mlp, name).weight.grad for mlp in theirs.local_experts])
        for name in ("linear_fc1", "linear_fc2")
    ]
    assert [tensor.dtype for tensor in results[0]] == [tensor.dtype for tensor in results[1]]
    assert max(errors(*results)) < TOLERANCE[dtype]
