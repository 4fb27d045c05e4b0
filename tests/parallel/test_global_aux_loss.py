"""The global balancing loss weighs the same on any number of data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from pretrain.config.schema import Config
from pretrain.model.router import CountingRouter
from tests.helpers.configs import MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Outcome, assemble, train, train_alone

GLOBAL_BATCH = 4


def one_microbatch_each(ranks: int, **router: float) -> Config:
    """All of the global batch at once, so that the running mean of the load is the load of the global batch."""
    return make_config(
        MOE,
        {
            "model.init_std": 0.1,
            "model.num_layers": 1,
            "model.router": router,
            "batch.global_batch_size": GLOBAL_BATCH,
            "batch.micro_batch_size": GLOBAL_BATCH // ranks,
        },
    )


def router_gradient(config: Config, ranks: Sequence[Outcome]) -> torch.Tensor:
    gradients = assemble(config.model, [rank.gradients for rank in ranks])
    return gradients["decoder.layers.0.mlp.router.weight"]


def train_both(config: Config) -> tuple[Outcome, Outcome]:
    """A step with our coefficient, and with megatron-core's."""
    ours = train(config, 1)
    CountingRouter.get_aux_loss_coeff = TopKRouter.get_aux_loss_coeff
    return ours, train(config, 1)


def test_ranks_that_share_the_batch_get_the_gradient_of_the_whole() -> None:
    whole, shared = one_microbatch_each(1, global_aux_loss=1.0), one_microbatch_each(2, global_aux_loss=1.0)
    expected = train_alone(whole, 1)
    language = router_gradient(whole, [train_alone(one_microbatch_each(1), 1)])
    ours, theirs = zip(*run_ranks(train_both, 2, shared), strict=True)
    for rank in ours:
        assert rank.aux_losses[0]["global_aux_loss"] == pytest.approx(expected.aux_losses[0]["global_aux_loss"])
    gradient = router_gradient(whole, [expected])
    torch.testing.assert_close(router_gradient(shared, ours), gradient, rtol=1e-5, atol=1e-7)
    # Its balancing part, which megatron-core alone would halve.
    balancing = gradient - language
    assert balancing.abs().max() > 1e-3
    torch.testing.assert_close(router_gradient(shared, theirs) - language, balancing / 2, rtol=1e-4, atol=1e-6)
