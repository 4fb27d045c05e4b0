"""A rank whose experts nobody chooses takes part in every collective and gets zero gradients."""

from __future__ import annotations

import torch

from pretrain.config.schema import Config
from tests.helpers.configs import MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import engine_of, microbatches

FAVOURITE = 3


def train_with_one_expert(config: Config) -> dict[str, float]:
    """Largest gradient of each of this rank's experts' tensors, when every token chooses the same expert."""
    with engine_of(config) as engine:
        for shard in engine.shards:
            if shard.logical.kind == "router_bias":
                shard.tensor[FAVOURITE] = 100.0  # Sigmoid scores end at 1.
        loss = engine.forward_backward(microbatches(config, engine.mesh, 0))
        largest = {"loss": float(loss)}
        for shard in engine.shards:
            if shard.logical.is_expert:
                for expert, gradient in enumerate(shard.view(shard.tensor.main_grad)):
                    largest[f"{shard.key} {shard.offset[0] + expert}"] = float(gradient.abs().max())
        assert torch.isfinite(loss)
        return largest


def test_experts_without_tokens_get_zero_gradients() -> None:
    router = {"score_function": "sigmoid", "bias_update_rate": 1e-3}
    config = make_config(
        MOE,
        {
            "model.router": router,
            "model.top_k": 1,
            "model.num_layers": 2,
            "parallel.expert": 4,
            "batch.sequence_length": 2,
            "batch.global_batch_size": 4,
        },
    )
    ranks = run_ranks(train_with_one_expert, 4, config)
    assert len({rank.pop("loss") for rank in ranks}) == 1
    largest = {key: value for rank in ranks for key, value in rank.items()}
    assert len(largest) == 2 * 2 * config.model.num_experts
    for key, value in largest.items():
        assert (value > 0) == key.endswith(f" {FAVOURITE}"), (key, value)
