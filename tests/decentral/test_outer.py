"""The outer optimizer is torch's SGD with Nesterov momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.decentral.outer import Nesterov


def _outer(masters: list[torch.Tensor], **settings: float) -> Nesterov:
    slots: Any = [SimpleNamespace(master=master) for master in masters]
    return Nesterov(slots, **settings)


def _deviation(ours_momentum: float, theirs_momentum: float) -> float:
    """Largest difference after four rounds."""
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(7, 3, generator=generator), torch.randn(5, generator=generator)]
    outer = _outer([tensor.clone() for tensor in start], lr=0.7, momentum=ours_momentum)
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    sgd = torch.optim.SGD(theirs, lr=0.7, momentum=theirs_momentum, nesterov=True)
    largest = 0.0
    for _ in range(4):
        means = [tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator) for tensor in theirs]
        for parameter, mean in zip(theirs, means, strict=True):
            parameter.grad = parameter.detach() - mean
        sgd.step()
        weights = outer.step(means)
        largest = max(largest, *(float((a - b.detach()).abs().max()) for a, b in zip(weights, theirs, strict=True)))
    return largest


def test_is_torchs_sgd_with_nesterov_momentum() -> None:
    # Weights of size 1, a handful of fp32 operations each round.
    assert _deviation(0.9, 0.9) < 1e-6
    assert _deviation(0.9, 0.8) > 1e-3


def test_learning_rate_one_without_momentum_is_the_mean() -> None:
    outer = _outer([torch.tensor([1.0, 2.0])], lr=1.0, momentum=0.0)
    assert outer.step([torch.tensor([0.5, 4.0])])[0].tolist() == [0.5, 4.0]


def test_another_sites_state_is_taken_over_whole() -> None:
    masters = [torch.ones(3)]
    one, other = _outer(masters, lr=0.7, momentum=0.9), _outer([torch.zeros(3)], lr=0.7, momentum=0.9)
    one.step([torch.full((3,), 2.0)])
    other.take([tensor.clone() for tensor in one.state()])
    mean = [torch.full((3,), 3.0)]
    assert torch.equal(one.step(mean)[0], other.step(mean)[0])


@pytest.mark.parametrize("settings", [{"lr": 0.7, "momentum": 0.9}])
def test_begins_at_the_masters_and_does_not_share_their_memory(settings: dict[str, float]) -> None:
    master = torch.ones(3)
    outer = _outer([master], **settings)
    master.fill_(5.0)
    assert outer.anchors[0].tolist() == [1.0] * 3
    outer.step([torch.zeros(3)])
    outer.begin_again()
    assert outer.anchors[0].tolist() == [5.0] * 3
    assert outer.velocities[0].tolist() == [0.0] * 3
