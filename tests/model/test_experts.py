"""The experts of a layer against megatron-core's, one by one, and the choice of their backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

import pretrain_kernels.experts
from pretrain.config.schema import ParallelConfig
from pretrain.errors import ConfigError
from pretrain.model import native, transformer_engine
from pretrain.model.build import build_chunks, choose_experts_backend
from pretrain.model.native import GroupedExperts
from pretrain.model.transformer_config import compute_dtype, transformer_config
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.configs import MOE, make_config
from tests.helpers.layouts import CPU, single_process
from tests.kernels.layers import ROWS, errors, random_layer

E, D, FFN = 5, 32, 24


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


# Of norms; bf16 rounds two intermediates and the result.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


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
    layer = random_layer(rows, dtype=dtype)
    with torch.no_grad():
        ours.linear_fc1.weight.copy_(layer.fc1)
        ours.linear_fc2.weight.copy_(layer.fc2)
        for expert, mlp in enumerate(theirs.local_experts):
            mlp.linear_fc1.weight.copy_(layer.fc1[expert])
            mlp.linear_fc2.weight.copy_(layer.fc2[expert])
    results = []
    for module in (ours, theirs):
        x, scores = layer.x.clone().requires_grad_(), layer.routing.scores.clone().requires_grad_()
        y, bias = module(x, torch.tensor(rows), scores)
        assert bias is None
        y.backward(layer.dy)
        results.append({"y": y, "x": x.grad, "scores": scores.grad})
    for name in ("linear_fc1", "linear_fc2"):
        results[0][name] = getattr(ours, name).weight.grad
        results[1][name] = torch.stack([getattr(mlp, name).weight.grad for mlp in theirs.local_experts])
    assert [tensor.dtype for tensor in results[0].values()] == [tensor.dtype for tensor in results[1].values()]
    assert max(errors(*results).values()) < BOUND[dtype]


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_gradients_go_where_data_parallel_sums_them(frozen: bool, mesh: Mesh) -> None:
    """Into `main_grad`, which megatron-core's DDP gives to the weights that train, on top of what it holds."""
    model = make_config(MOE, {"model.hidden_size": D, "model.expert_ffn_size": FFN, "model.num_experts": E}).model
    experts = GroupedExperts(E, transformer_config(model, ParallelConfig(), "fp32"), mesh.groups)
    layer = random_layer(ROWS["uneven"], dtype=torch.float32)
    weights = experts.linear_fc1.weight, experts.linear_fc2.weight
    with torch.no_grad():
        weights[0].copy_(layer.fc1)
        weights[1].copy_(layer.fc2)

    def step() -> None:
        experts(layer.x, torch.tensor(ROWS["uneven"]), layer.routing.scores)[0].backward(layer.dy)

    step()
    expected = [weight.grad for weight in weights]
    weights[0].requires_grad_(not frozen)
    trained = [weight for weight in weights if weight.requires_grad]
    for weight in weights:
        weight.grad = None
    for weight in trained:
        weight.main_grad = torch.full_like(weight, 2.0)
    step()
    for weight, gradient in zip(weights, expected, strict=True):
        assert weight.grad is None
        if weight.requires_grad:
            torch.testing.assert_close(weight.main_grad, 2.0 + gradient, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("asked", "precision", "used"), [("auto", "bf16", "grouped_mm"), ("loop", "fp32", "loop"), ("auto", "fp32", "loop")]
)
def test_backend_of_the_configuration_reaches_the_layer(
    asked: str, precision: str, used: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 18 if (asked, used) == ("auto", "loop") else 16  # not a multiple of 16 bytes in fp32
    changes = {"model.experts_backend": asked, "run.precision": precision, "model.expert_ffn_size": width}
    config = make_config(MOE, changes)
    assert choose_experts_backend(config.model, config.parallel, precision) == used
    (chunk,) = build_chunks(
        config.model, parallel=config.parallel, precision=precision, sequence_length=8, groups=mesh.groups
    )
    experts = [module for module in chunk.modules() if isinstance(module, GroupedExperts)]
    assert [layer.backend for layer in experts] == [used] * 4
    asked_for = []
    swiglu_experts = native.swiglu_experts

    def recorded(*tensors: object, backend: str, **options: object) -> torch.Tensor:
        asked_for.append(backend)
        return swiglu_experts(*tensors, backend=backend, **options)

    monkeypatch.setattr(native, "swiglu_experts", recorded)
    rows = torch.zeros(8, dtype=torch.int64)
    experts[0](torch.ones(0, 32, dtype=compute_dtype(precision)), rows, torch.ones(0))
    assert asked_for == [used]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.experts_backend": "triton"}, "needs an NVIDIA GPU"),
        ({"model.experts_backend": "grouped_mm", "model.expert_ffn_size": 18}, "F = 18"),
        ({"model.experts_backend": "grouped_mm", "parallel.expert_tensor": 8}, "F = 2"),
    ],
)
def test_backend_that_does_not_fit_is_one_clear_line(
    changes: dict[str, object], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_kernels.experts.triton_support, "installed", lambda: True)
    config = make_config(MOE, changes)
    with pytest.raises(ConfigError) as error:
        choose_experts_backend(config.model, config.parallel, "fp32")
    (line,) = error.value.problems
    assert line.startswith(f'model.experts_backend = "{changes["model.experts_backend"]}": ')
    assert problem in line
    assert "\n" not in line
    auto = config.model.model_copy(update={"experts_backend": "auto"})
    assert choose_experts_backend(auto, config.parallel, "fp32") in ("loop", "grouped_mm")


def test_transformer_engine_has_experts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "backend", object)
    model = make_config(MOE, {"model.backend": "transformer_engine"}).model
    assert choose_experts_backend(model, ParallelConfig(), "bf16") == "transformer_engine"
    with pytest.raises(ConfigError, match=r'model\.experts_backend = "loop": Transformer Engine'):
        choose_experts_backend(model.model_copy(update={"experts_backend": "loop"}), ParallelConfig(), "bf16")
