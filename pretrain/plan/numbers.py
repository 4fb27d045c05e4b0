"""The numbers of a plan: of every stage of a run, of the growth points between them, and of the whole."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.rules import Layout, check, smallest_world_size
from pretrain.config.schema import Config
from pretrain.config.stages import (
    BUFFER_BYTES,
    Stage,
    describe_growth,
    describe_rewarm,
    describe_state,
    preserves_function,
    stages,
)
from pretrain.errors import ConfigError
from pretrain.model.counts import (
    Flops,
    ParameterCounts,
    count_flops,
    count_parameters,
    local_tokens,
    tokens_per_expert,
)
from pretrain.optim.routing import check_routes
from pretrain.plan.decentral import DecentralPlan, plan_decentral
from pretrain.plan.memory import RankMemory, rank_memory
from pretrain.plan.optimizer import OptimizerPlan, plan_optimizer


@dataclass(frozen=True)
class GrowthMemory:
    """Bytes on one rank while the model grows, when both models are there. Gradients and activations are not.

    Of the rank that holds the most before and of the one that holds the most afterwards, which may be two ranks: an
    upper bound for each.
    """

    old_weights: int
    old_optimizer: int
    new_weights: int
    new_optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.old_weights + self.old_optimizer + self.new_weights + self.new_optimizer + self.buffers


@dataclass(frozen=True)
class GrowthPlan:
    """What happens at a growth point."""

    grows: str
    preserves_function: bool
    """Whether the model computes the same right after it, up to rounding and to the noise that is asked for."""
    optimizer_state: str
    rewarm: str
    memory: GrowthMemory


@dataclass(frozen=True)
class StagePlan:
    """A stretch of a run with one model and one layout."""

    start_step: int
    steps: int
    tokens: int
    growth: GrowthPlan | None
    """What began it; None for the first."""
    shape: dict[str, int]
    """Layers, hidden size and so on, by their configuration keys; of dense_layers, how many they are."""
    parameters: ParameterCounts
    flops: Flops
    total_flops: int
    total_flops_6nd: int
    layout: Layout
    tokens_per_expert_per_step: float
    """Rows of one expert per optimizer step at even load (0 for a dense model)."""
    tokens_per_expert_per_microbatch: float
    """Rows of one expert in one grouped matrix product, gathered from the ranks that share the expert's group."""
    memory: RankMemory


@dataclass(frozen=True)
class Plan:
    """Stages of a run in order, and what is common to them."""

    world_size: int
    """Ranks, of each site if there are several."""
    precision: str
    tokens_per_step: int
    steps: int
    tokens: int
    total_flops: int
    total_flops_6nd: int
    scratch_flops: int
    """Of the final model trained on all the tokens."""
    scratch_flops_6nd: int
    saved: float
    """Share of scratch_flops that the run does without."""
    saved_6nd: float
    """The same with 6 * active parameters * tokens, as the papers on growth count (arXiv 2602.02472, table 2)."""
    stages: tuple[StagePlan, ...]
    optimizer: OptimizerPlan
    decentral: DecentralPlan | None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        plan = asdict(self)
        for stage, row in zip(self.stages, plan["stages"], strict=True):
            row["memory"]["total"] = stage.memory.total
            if stage.growth:
                row["growth"]["memory"]["total"] = stage.growth.memory.total
        if self.decentral:
            plan["decentral"] = self.decentral.to_json()
        return plan


def make_plan(config: Config, world_size: int | None = None) -> Plan:
    """Check the configuration and derive its numbers.

    Args:
        world_size: ranks, of one site if there are several; without it, the fewest that the layouts of all stages fit
            on.

    Raises:
        ConfigError: with every rule that is broken.
    """
    if world_size is None:
        world_size = smallest_world_size(config)
    problems = check(config, world_size) or check_routes(config)
    if problems:
        raise ConfigError(problems)
    run = stages(config)
    starts = [*(stage.start_step for stage in run), config.total_steps]
    growths = [None, *(_plan_growth(old, new, world_size) for old, new in itertools.pairwise(run))]
    planned = tuple(
        _plan_stage(stage.config, world_size, growth=growth, start_step=start, steps=end - start)
        for stage, growth, (start, end) in zip(run, growths, itertools.pairwise(starts), strict=True)
    )
    tokens = sum(stage.tokens for stage in planned)
    flops, flops_6nd = sum(stage.total_flops for stage in planned), sum(stage.total_flops_6nd for stage in planned)
    final = planned[-1].flops
    scratch, scratch_6nd = final.per_token * tokens, final.per_token_6nd * tokens
    return Plan(
        world_size=world_size,
        precision=config.run.precision,
        tokens_per_step=config.batch.tokens_per_step,
        steps=sum(stage.steps for stage in planned),
        tokens=tokens,
        total_flops=flops,
        total_flops_6nd=flops_6nd,
        scratch_flops=scratch,
        scratch_flops_6nd=scratch_6nd,
        saved=1 - flops / scratch,
        saved_6nd=1 - flops_6nd / scratch_6nd,
        stages=planned,
        optimizer=plan_optimizer(config, run[-1].config.model, tokens),
        decentral=plan_decentral(config, Layout.of(config, world_size)),
    )


def _plan_stage(
    config: Config, world_size: int, *, growth: GrowthPlan | None, start_step: int, steps: int
) -> StagePlan:
    model, batch = config.model, config.batch
    layout = Layout.of(config, world_size)
    tokens = steps * batch.tokens_per_step
    flops = count_flops(model, batch.sequence_length)
    tokens_in_expert_group = local_tokens(batch, layout) * layout.expert * layout.expert_tensor
    return StagePlan(
        start_step=start_step,
        steps=steps,
        tokens=tokens,
        growth=growth,
        shape=_shape(config),
        parameters=count_parameters(model),
        flops=flops,
        total_flops=flops.per_token * tokens,
        total_flops_6nd=flops.per_token_6nd * tokens,
        layout=layout,
        tokens_per_expert_per_step=tokens_per_expert(model, batch.tokens_per_step),
        tokens_per_expert_per_microbatch=tokens_per_expert(model, tokens_in_expert_group),
        memory=rank_memory(config, layout),
    )


def _plan_growth(before: Stage, after: Stage, world_size: int) -> GrowthPlan:
    growth = after.growth
    assert growth is not None
    old, new = _held(before.config, world_size), _held(after.config, world_size)
    # A buffer is never larger than what it has to hold, and a single rank needs none.
    buffer = min(BUFFER_BYTES, new.weights + new.optimizer) if world_size > 1 else 0
    return GrowthPlan(
        grows=describe_growth(before.config.model, growth),
        preserves_function=preserves_function(growth),
        optimizer_state=describe_state(growth),
        rewarm=describe_rewarm(growth.rewarm),
        memory=GrowthMemory(old.weights, old.optimizer, new.weights, new.optimizer, buffers=2 * buffer),
    )


def _held(config: Config, world_size: int) -> RankMemory:
    """Memory of the rank that holds the most between steps, when no tokens are under way."""
    idle = config.model_copy(update={"batch": config.batch.model_copy(update={"sequence_length": 0})})
    return rank_memory(idle, Layout.of(config, world_size))


def _shape(config: Config) -> dict[str, int]:
    model = config.model
    shape = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "head_dim": model.channels,
        "vocab_size": model.vocab_size,
        "ffn_size": model.ffn_size,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "expert_ffn_size": model.expert_ffn_size,
        "shared_expert_ffn_size": model.shared_expert_ffn_size,
        "first_dense_layers": model.first_dense_layers,
        "dense_layers": len(model.dense_layers),
    }
    return {key: value for key, value in shape.items() if value}
