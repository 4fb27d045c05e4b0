"""Models in this process that train and grow, and what they hold as whole logical tensors. A world of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.growth import GrowthConfig
from pretrain.config.rules import check
from pretrain.config.schema import Config, ParallelConfig
from pretrain.config.stages import stages
from pretrain.growth.live import grow_model, moving_tensors
from pretrain.growth.maps import GrowthPoint, TensorMap
from pretrain.model.initialise import draw_normal
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Mesh, mesh_of
from tests.helpers.configs import make_config
from tests.helpers.layouts import CPU, microbatches, single_process

# A step count, far beyond the few steps that tests train for: growth points only need to be in order.
FIRST_GROWTH, BUDGET = 10, 1000

TINY: dict[str, Any] = {
    "run": {"directory": "runs/test", "precision": "fp32"},
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "qk_norm": True,
        # Far larger than usual, so that no branch of the untrained model is negligible or nearly linear.
        "init_std": 0.2,
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": 16,
        "router": {"score_function": "sigmoid", "bias_update_rate": 1e-2},
    },
    "batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 8},
    "budget": {"steps": BUDGET},
    "optim": {"lr": 1e-3, "clip_grad": 0.0},
}
"""A mixture of experts with a selection bias. Gradients are not clipped: their norm changes with the model."""

TINY_DENSE: dict[str, Any] = {
    **TINY,
    "model": {
        **{
            key: value
            for key, value in TINY["model"].items()
            if key not in ("num_experts", "top_k", "expert_ffn_size", "router")
        },
        "ffn_size": 32,
    },
}


@contextmanager
def mesh_of_one() -> Iterator[Mesh]:
    """The mesh of this process alone, which all models here share."""
    with single_process(), mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


@dataclass(frozen=True)
class Model:
    """A model, perhaps grown, with its optimizer."""

    config: Config
    """As written, with the growth points so far."""
    points: tuple[GrowthPoint, ...]
    engine: Engine
    optimizer: ShardedOptimizer

    @property
    def stage(self) -> Config:
        """The configuration it has grown into."""
        return stages(self.config)[-1].config

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Key -> whole fp32 weight (the master), selection bias or (`optimizer.exp_avg.KEY`) state, in its axes."""
        return {tensor.key: tensor.data for tensor in moving_tensors(self.engine.shards, self.optimizer)}

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Key -> gradient of the last `backward`, in the weight's logical axes; copies."""
        trained = [shard for shard in self.engine.shards if shard.logical.trainable]
        return {shard.key: shard.view(shard.tensor.main_grad).clone() for shard in trained}

    def logits(self) -> torch.Tensor:
        """Of one batch, the same for every model: [B, S, V]."""
        batch = next(microbatches(self.config, self.engine.mesh, 0))
        return self.engine.logits(batch, self.config.batch.sequence_length)

    def backward(self, step: int = 0) -> float:
        """Loss of the batch of a step, with its gradients."""
        # megatron-core sizes it by the first model it sees, and here are many.
        get_moe_layer_wise_logging_tracker().clear()
        return float(self.engine.forward_backward(microbatches(self.config, self.engine.mesh, step)))

    def train(self, steps: int, *, first: int = 0, newer: Sequence[float] | None = None) -> list[float]:
        """Losses of some steps. `newer`: learning rates of the growths, relative to that of the rest (default: 1)."""
        rates = [1.0] * len(self.points) if newer is None else newer
        losses = []
        for step in range(first, first + steps):
            losses.append(self.backward(step))
            self.optimizer.step(1.0, rates)
        return losses


def new_model(
    mesh: Mesh, start: Mapping[str, Any], changes: Mapping[str, Any] | None = None, *, steps: int = 2
) -> Model:
    """A model trained for some steps, after its norm gains and selection biases were made random, too."""
    config = make_config(dict(start), dict(changes or {}))
    engine = build_engine(config, mesh)
    with torch.no_grad():
        for shard in engine.shards:
            size, base = {"norm": (0.2, 1.0), "router_bias": (0.05, 0.0)}.get(shard.logical.kind, (0.0, 0.0))
            if size:
                shape = shard.logical.shape
                shard.view().copy_(base + size * draw_normal(1, shard.key, shape, shard.offset, shard.shape))
    model = Model(config, (), engine, ShardedOptimizer(engine.shards, config.optim, mesh.groups))
    model.train(steps)
    return model


def with_growth(config: Config, keys: Mapping[str, Any]) -> Config:
    """The configuration with one more growth point."""
    step = FIRST_GROWTH * (len(config.growth) + 1)
    growth = GrowthConfig.model_validate({"at_step": step, **keys})
    return config.model_copy(update={"growth": (*config.growth, growth)})


def point_of(config: Config, copies: Mapping[int, Sequence[int]] | None = None) -> GrowthPoint:
    """The last growth point of a configuration."""
    *_, before, after = stages(config)
    return GrowthPoint(len(config.growth), config.growth[-1], before.config.model, after.config.model, copies or {})


def grow(
    model: Model,
    *,
    copies: Mapping[int, Sequence[int]] | None = None,
    checked: bool = True,
    wrong: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Model:
    """What `model`, which stays as it is, grows into.

    Args:
        keys: of the growth point.
        copies: of each expert, where they are not alike.
        checked: whether the rules hold.
        wrong: keys of the grown model, those of its router under `router`, that are set to something else.
    """
    config = with_growth(model.config, keys)
    problems = check(config, 1) if checked else []
    assert not problems, problems
    point = point_of(config, copies)
    stage = stages(config)[-1].config
    if wrong:
        router = stage.model.router.model_copy(update=wrong.get("router", {}))
        broken = stage.model.model_copy(update={**wrong, "router": router})
        stage, point = stage.model_copy(update={"model": broken}), replace(point, after=broken)
    points = (*model.points, point)
    grown = grow_model(
        points,
        moving_tensors(model.engine.shards, model.optimizer),
        stage,
        model.engine.mesh,
        optimizer_state=model.optimizer.state_dict(),
        ranks=Ranks(),
    )
    return Model(config, points, grown.engine, grown.optimizer)


def change(old: torch.Tensor, new: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((new - old).abs().max() / old.abs().max())


def gathered(tensor_map: TensorMap, source: torch.Tensor) -> torch.Tensor:
    """The whole target, every entry being that of the whole source it comes from."""
    return source[torch.meshgrid(*(torch.from_numpy(axis.source) for axis in tensor_map.axes), indexing="ij")].clone()


def mask_of(tensor_map: TensorMap) -> torch.Tensor:
    """Which entries of the whole target are new."""
    along = torch.meshgrid(*(torch.from_numpy(axis.is_new) for axis in tensor_map.axes), indexing="ij")
    return torch.stack(along).any(dim=0) | tensor_map.is_new_layer
