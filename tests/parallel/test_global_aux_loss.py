"""The global balancing loss weighs the same on any number of data-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter

from pretrain.config.schema import Config
from pretrain.model.router import CountingRouter
from tests.helpers.configs import MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Outcome, assemble, train

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


def router_gradient(config: Config, ranks: list[Outcome]) -> torch.Tensor:
    gradients = assemble(config.model, [rank.gradients for rank in ranks])
    return gradients["decoder.layers.0.mlp.router.weight"]


def train_as_megatron_core(config: Config) -> Outcome:
    CountingRouter.get_aux_loss_coeff = TopKRouter.get_aux_loss_coeff
    return train(config, 1)


def test_ranks_that_share_the_batch_get_the_gradient_of_the_whole() -> None:
    whole, shared = one_microbatch_each(1, global_aux_loss=1.0), one_microbatch_each(4, global_aux_loss=1.0)
    without = one_microbatch_each(1)
    expected, language = (run_ranks(train, 1, config, 1) for config in (whole, without))
    actual, as_it_was = run_ranks(train, 4, shared, 1), run_ranks(train_as_megatron_core, 4, shared)
    assert [rank.losses for rank in actual] == [actual[0].losses] * 4
    assert abs(actual[0].aux_losses[0]["global_aux_loss"] - expected[0].aux_losses[0]["global_aux_loss"]) < 1e-6
    gradient = router_gradient(whole, expected)
    torch.testing.assert_close(router_gradient(shared, actual), gradient, rtol=1e-5, atol=1e-7)
    # Its balancing part, which megatron-core alone would weigh with 1/4.
    balancing = gradient - router_gradient(without, language)
    assert balancing.abs().max() > 1e-3
    shrunk = router_gradient(shared, as_it_was) - router_gradient(without, language)
    torch.testing.assert_close(shrunk, balancing / 4, rtol=1e-4, atol=1e-6)
