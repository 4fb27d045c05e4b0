"""Activation recomputation on the CPU: the same gradients, bit for bit, with dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.platform import cpu_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
MODES: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "attention and experts": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    cpu_adapter.apply()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(**changes: Any) -> dict[str, torch.Tensor]:
    from tests.platform.gpt import one_step

    return one_step({}, **DROPOUT, **changes)["gradients"]


@pytest.fixture(scope="module")
def stored(world_of_one: None) -> dict[str, torch.Tensor]:
    """Gradients with every activation stored."""
    return gradients()


def equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_changes_no_gradient(mode: str, stored: dict[str, torch.Tensor]) -> None:
    assert equal(gradients(**MODES[mode]), stored)


def test_dropout_of_the_second_pass_must_be_that_of_the_first(
    stored: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.tensor_parallel import random

    monkeypatch.setattr(random, "_set_all_rng_states", lambda *states: None)
    assert not equal(gradients(**MODES["full"]), stored)


def test_dropout_is_on(stored: dict[str, torch.Tensor]) -> None:
    from tests.platform.gpt import one_step

    assert not equal(one_step({})["gradients"], stored)


def test_checkpoint_restores_forked_random_states() -> None:
    """Draws inside and outside of a fork, within `tensor_parallel.checkpoint`, are the same again in the backward."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    masks: list[torch.Tensor] = []

    def draw(x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(4)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            mask = torch.stack([mask, torch.rand(4)])
        masks.append(mask)
        return x * mask

    x = torch.ones(2, 4, requires_grad=True)
    y = tensor_parallel.checkpoint(draw, False, x)
    between = torch.rand(3)  # draws after the forward pass, from both states
    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(3)
    before, tracked = torch.get_rng_state(), tensor_parallel.get_cuda_rng_tracker().get_states()
    y.sum().backward()
    assert torch.equal(masks[0], masks[1])
    assert x.grad is not None
    assert torch.equal(x.grad, masks[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(state, tracked[name]) for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()
    )
    assert not torch.equal(between, torch.rand(3))
