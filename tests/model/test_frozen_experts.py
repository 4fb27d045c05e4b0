"""Frozen experts: the layer computes what it does when all of them train, and their weights cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.schema import ParallelConfig
from pretrain.errors import ConfigError
from pretrain.model import build, native
from pretrain.model.build import build_chunks
from pretrain.model.native import GroupedExperts
from pretrain.model.stacked_weight import StackedWeight
from pretrain.model.transformer_config import compute_dtype, transformer_config
from pretrain.parallel.engine import build_engine
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.configs import MOE, make_config
from tests.helpers.layouts import CPU, single_process
from tests.kernels.layers import random_layer
from tests.kernels.triton_process import run_cases

E, D, FFN = 5, 32, 24
TRAINED = (1, 3, 4)
ROWS = [7, 9, 3, 0, 5]
Results = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


def layer_of(mesh: Mesh, trained: tuple[int, ...] | None, *, precision: str = "fp32", backend: str = "loop"):
    """One layer's experts with random weights, the same whichever of them train."""
    keys = {"model.hidden_size": D, "model.expert_ffn_size": FFN, "model.num_experts": E, "run.precision": precision}
    config = transformer_config(make_config(MOE, keys).model, ParallelConfig(), precision)
    layer = GroupedExperts(E, config, mesh.groups, backend=backend, trained=trained)
    values = random_layer(ROWS, dtype=compute_dtype(precision))
    with torch.no_grad():
        for stacked, value in ((layer.linear_fc1, values.fc1), (layer.linear_fc2, values.fc2)):
            for start, weight in stacked.parts():
                weight.copy_(value[start : start + len(weight)])
    return layer


def results(layer: GroupedExperts, *, precision: str = "fp32", main_grad: bool = False) -> Results:
    """Output and gradients; those of weights by projection and expert, of the experts that have one.

    main_grad: they are collected there, as under megatron-core's DDP.
    """
    values = random_layer(ROWS, dtype=compute_dtype(precision))
    x, scores = values.x.clone().requires_grad_(), values.routing.scores.clone().requires_grad_()
    if main_grad:
        for weight in (weight for weight in layer.parameters() if weight.requires_grad):
            weight.main_grad, weight.grad_added_to_main_grad = torch.full(weight.shape, 2.0), False
    y, _ = layer(x, torch.tensor(ROWS), scores)
    y.backward(values.dy)
    found = {"y": y.detach(), "x": x.grad, "scores": scores.grad}
    for name in ("linear_fc1", "linear_fc2"):
        for start, weight in getattr(layer, name).parts():
            gradients = weight.grad
            # What its hook finds is a stand-in, which it needs and drops.
            assert (gradients is None) is not weight.requires_grad
            if main_grad and weight.requires_grad:
                assert weight.grad_added_to_main_grad
                gradients = weight.main_grad
            if gradients is not None:
                found |= {f"{name} {start + i}": gradient for i, gradient in enumerate(gradients)}
    return found


def check_gradients(actual: Results, all_train: Results) -> None:
    """AssertionError unless everything but the gradients of frozen weights is the same, bit by bit."""
    frozen = {f"{name} {expert}" for name in ("linear_fc1", "linear_fc2") for expert in set(range(E)) - set(TRAINED)}
    assert actual.keys() == all_train.keys() - frozen
    for name, value in actual.items():
        assert torch.equal(value, all_train[name]), name
    assert all(bool(all_train[f"linear_fc1 {expert}"].any()) for expert in (0, 1, 4))


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_all_but_gradients_of_frozen_weights_is_as_if_all_train(
    backend: str, precision: str, main_grad: bool, mesh: Mesh
) -> None:
    """Expert 0 is frozen and expert 1 trains: what Transformer Engine's grouped linear, which asks the first, fails."""
    layers = {trained: layer_of(mesh, trained, precision=precision, backend=backend) for trained in (TRAINED, None)}
    found = {k: results(layer, precision=precision, main_grad=main_grad) for k, layer in layers.items()}
    check_gradients(found[TRAINED], found[None])


def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = run_cases(Path(__file__).with_name("frozen_experts_triton_cases.py"), tmp_path, interpret=True)
    assert len(cases) == 7
    assert not {name: message for name, message in cases.items() if message}


def test_asking_the_first_expert_is_noticed(mesh: Mesh) -> None:
    expected, layer = results(layer_of(mesh, None)), layer_of(mesh, TRAINED)
    layer.trainable.fill_(bool(layer.trainable[0]))
    with pytest.raises(AssertionError, match="linear_fc1 1"):
        check_gradients(results(layer), expected)


def test_gradients_added_to_the_wrong_expert_are_noticed(mesh: Mesh) -> None:
    expected, layer = results(layer_of(mesh, None), main_grad=True), layer_of(mesh, TRAINED)
    trained = layer.linear_fc2.trained()
    layer.linear_fc2.trained = lambda: [(start - 1, weight) for start, weight in trained]
    with pytest.raises(AssertionError, match="linear_fc2 1"):
        check_gradients(results(layer, main_grad=True), expected)


def test_all_training_is_one_parameter_without_detours(mesh: Mesh) -> None:
    for trained in (None, range(E)):
        layer = layer_of(mesh, trained)
        assert [name for name, _ in layer.named_parameters()] == ["linear_fc1.weight", "linear_fc2.weight"]
        assert layer.trainable is None
        assert layer.linear_fc1.stack() is layer.linear_fc1.weight


def test_frozen_experts_are_parameters_that_want_no_gradient(mesh: Mesh) -> None:
    layer = layer_of(mesh, TRAINED)
    found = {name: (len(weight), weight.requires_grad) for name, weight in layer.linear_fc1.named_parameters()}
    assert found == {"weight_0": (1, False), "weight_1": (1, True), "weight_2": (1, False), "weight_3": (2, True)}
    # Nothing trains: no gradient of any weight, but one of the input.
    assert results(layer_of(mesh, ())).keys() == {"y", "x", "scores"}


@pytest.mark.parametrize(("trained", "rows"), [(None, sum(ROWS)), (TRAINED, sum(ROWS[e] for e in TRAINED)), ((), 0)])
def test_frozen_weights_have_no_products(trained: tuple[int, ...] | None, rows: int, mesh: Mesh) -> None:
    """Multiply-adds of a backward pass: all rows for the inputs, those of experts that train for the weights."""
    layer, values = layer_of(mesh, trained), random_layer(ROWS)
    x = values.x.clone().requires_grad_()
    y, _ = layer(x, torch.tensor(ROWS), values.routing.scores)
    with FlopCounterMode(display=False) as counter:
        y.backward(values.dy)
    per_row = 2 * 3 * D * FFN
    assert counter.get_total_flops() == per_row * (sum(ROWS) + rows)


@pytest.mark.parametrize("trained", [TRAINED, ()])
def test_grouped_products_leave_rows_of_frozen_experts_out(trained: tuple[int, ...], mesh: Mesh) -> None:
    layer, values = layer_of(mesh, trained, backend="grouped_mm"), random_layer(ROWS)
    x = values.x.clone().requires_grad_()
    y, _ = layer(x, torch.tensor(ROWS), values.routing.scores)
    rows_of_weights = []
    grouped_mm = torch.nn.functional.grouped_mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        if b.dim() == 2:
            rows_of_weights.append(int(offs[-1]))
        return grouped_mm(a, b, offs=offs)

    with mock.patch("torch.nn.functional.grouped_mm", counted):
        y.backward(values.dy)
    assert rows_of_weights == [sum(ROWS[expert] for expert in trained)] * (2 if trained else 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_that_wraps_the_model_moves_the_weights(precision: str, mesh: Mesh) -> None:
    """`.to(device)`, megatron-core's Float16Module and DDP: what is written to a parameter is what kernels read."""
    engine = build_engine(make_config(MOE, {"run.precision": precision}), mesh, trained=(1, 2, 6))
    for layer in (module for module in engine.chunks[0].modules() if isinstance(module, GroupedExperts)):
        for stacked in (layer.linear_fc1, layer.linear_fc2):
            for start, weight in stacked.parts():
                weight.detach().fill_(start)
            assert stacked.stack().flatten(1)[:, 0].tolist() == [0, 1, 1, 3, 3, 3, 6, 7]


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.clone])
def test_weights_that_have_moved_are_noticed(change, mesh: Mesh) -> None:
    layer = layer_of(mesh, TRAINED)
    layer.linear_fc1.check_views()
    layer.linear_fc1._apply(change)
    with pytest.raises(AssertionError, match="left the stack"):
        layer.linear_fc1.check_views()
    # And the engine asks.
    moved = mock.patch.object(native.GroupedExperts, "_apply", lambda self, fn, **_: self.linear_fc2._apply(change))
    with moved, pytest.raises(AssertionError, match="left the stack"):
        build_engine(make_config(MOE, {}), mesh, trained=(1, 2, 6))


def test_a_mark_for_every_expert_is_asked_for() -> None:
    with pytest.raises(AssertionError, match="2 marks for 3 experts"):
        StackedWeight(torch.zeros(3, 2, 2), [True, False])


def test_experts_of_transformer_engine_refuse(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "choose_experts_backend", lambda *_: "transformer_engine")
    config = make_config(MOE, {})
    options = {"parallel": config.parallel, "precision": "bf16", "sequence_length": 8, "groups": mesh.groups}
    with pytest.raises(ConfigError, match=r'model\.backend = "auto": Transformer Engine cannot freeze') as error:
        build_chunks(config.model, **options, trained=(0,))
    assert len(error.value.problems) == 1
