"""Rules that tie several configuration keys together, and the parallel layout that follows from them.

Each rule is one line, `key = value: rule; remedy`, and all of them are reported at once. Some are our own
(how logical tensors are sharded), some are megatron-core's, stated here before it raises them one at a time.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config.decentral_rules import decentral_rules
from pretrain.config.growth_rules import growth_rules
from pretrain.config.optim_rules import optim_rules
from pretrain.config.schema import Config, ModelConfig, ParallelConfig, RouterConfig
from pretrain.config.stages import describe_growth, stages


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Every broken rule; those about the number of ranks only when `world_size` is given."""
    problems = _stage_rules(config, world_size)
    problems += [*_budget_rules(config), *_saving_rules(config), *optim_rules(config.optim), *growth_rules(config)]
    problems += decentral_rules(config)
    if not problems:
        # Only now are the later stages known.
        for index, (before, stage) in enumerate(itertools.pairwise(stages(config))):
            assert stage.growth is not None
            point = f"after growth[{index}], {describe_growth(before.config.model, stage.growth)}"
            problems += [f"{point}: {_of_growth(index, line)}" for line in _stage_rules(stage.config, world_size)]
    return problems


def _of_growth(index: int, problem: str) -> str:
    """The problem of a grown model with a remedy in the keys of its growth; sizes of the model follow from these."""
    rule, _, remedy = problem.partition("; ")
    remedy = re.sub(r" or model\.\w+ = \d+$", "", remedy)
    return f"{rule}; {remedy.replace('parallel.', f'growth[{index}].parallel.')}, or change the growth"


def _stage_rules(config: Config, world_size: int | None) -> list[str]:
    """Rules about the model and layout of one stage of a run."""
    return [
        *_attention_rules(config.model),
        *_layer_rules(config.model),
        *(_moe_rules(config.model) if config.model.is_moe else _dense_rules(config)),
        *_pipeline_rules(config),
        *_sharding_rules(config),
        *(_world_size_rules(config, world_size) if world_size is not None else ()),
    ]


def check_runnable(config: Config) -> list[str]:
    """What training needs on this very machine and planning for another one does not: data and optional packages."""
    problems = []
    if not config.data.train:
        problems.append('data.train = []: training needs a dataset; add [[data.train]] with prefix = "PATH"')
    if not importlib.util.find_spec("transformer_engine"):
        remedy = 'which is not installed here; pip install "meristem[cuda]", or'
        contexts = {"parallel.context": config.parallel.context}
        for index, growth in enumerate(config.growth):
            contexts[f"growth[{index}].parallel.context"] = (growth.parallel and growth.parallel.context) or 1
        for key, size in contexts.items():
            if size > 1:
                problems.append(f"{key} = {size}: needs Transformer Engine, {remedy} set {key} = 1")
        if config.model.backend == "transformer_engine":
            problems.append(
                f'model.backend = "transformer_engine": needs Transformer Engine, {remedy} set model.backend = "auto"'
            )
    return problems


def _must_divide(key: str, value: int, of: str, whole: int) -> Iterator[str]:
    """The rule that `value` (named `key`) divides `whole` (named `of`), with the nearest values that would do."""
    if whole % value:
        divisor = next(d for d in range(value, 0, -1) if whole % d == 0)
        multiple = value * -(-whole // value)
        yield f"{key} = {value}: must divide {of} = {whole}; use {key} = {divisor} or {of} = {multiple}"


def _attention_rules(model: ModelConfig) -> Iterator[str]:
    heads = model.num_attention_heads
    if model.num_query_groups:
        yield from _must_divide("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", heads)
    if not model.head_dim and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads = {heads}: must divide model.hidden_size = {model.hidden_size} "
            f"while model.head_dim is not given; set model.head_dim, for example 64 or 128"
        )
    elif model.channels % 2:
        origin = "" if model.head_dim else " (model.hidden_size / model.num_attention_heads)"
        yield (
            f"model.head_dim = {model.channels}{origin}: must be even, because RoPE rotates pairs of channels; "
            f"set model.head_dim = {model.channels + 1}"
        )


def _layer_rules(model: ModelConfig) -> Iterator[str]:
    if model.first_dense_layers >= model.num_layers:
        yield (
            f"model.first_dense_layers = {model.first_dense_layers}: must be less than model.num_layers = "
            f"{model.num_layers}; lower it, or leave out the MoE keys for a dense model"
        )
    stray = [layer for layer in model.dense_layers if not model.first_dense_layers <= layer < model.num_layers]
    if stray:
        yield (
            f"model.dense_layers = {list(model.dense_layers)}: {stray[0]} is not a layer after the first "
            f"{model.first_dense_layers} of {model.num_layers}; leave it out, or use model.first_dense_layers"
        )
    elif model.dense_layers and not model.moe_layers:
        yield f"model.dense_layers = {list(model.dense_layers)}: leaves no layer with experts; list fewer"
    if not model.ffn_size and (model.first_dense_layers or model.dense_layers):
        yield (
            f"model.ffn_size = 0: the dense layers (model.first_dense_layers = {model.first_dense_layers}) need it; "
            "set model.ffn_size, for example to 4 * hidden_size"
        )
    if not model.ffn_size and not model.is_moe:
        yield (
            "model.ffn_size = 0: a dense model (model.num_experts = 0) needs it; set model.ffn_size, or "
            "model.num_experts for a mixture of experts"
        )
    if model.ffn_size and model.is_moe and not (model.first_dense_layers or model.dense_layers):
        yield (
            f"model.ffn_size = {model.ffn_size}: the model has no dense layer (model.first_dense_layers = 0) that "
            "would use it; leave it out, or set model.first_dense_layers"
        )


def _dense_rules(config: Config) -> Iterator[str]:
    """A dense model must not carry keys that only a mixture of experts reads."""
    model, parallel = config.model, config.parallel
    keys = {
        "model.top_k": model.top_k,
        "model.expert_ffn_size": model.expert_ffn_size,
        "model.shared_expert_ffn_size": model.shared_expert_ffn_size,
        "model.first_dense_layers": model.first_dense_layers,
        "model.dense_layers": list(model.dense_layers),
    }
    for key, value in keys.items():
        if value:
            yield f"{key} = {value}: a dense model (model.num_experts = 0) has no use for it; leave it out"
    defaults = RouterConfig()
    for name in RouterConfig.model_fields:
        value = getattr(model.router, name)
        if value != getattr(defaults, name):
            yield (
                f"model.router.{name} = {value}: a dense model (model.num_experts = 0) has no router; "
                "leave out [model.router]"
            )
    for name in ("expert", "expert_tensor"):
        size = getattr(parallel, name)
        if size > 1:
            yield (
                f"parallel.{name} = {size}: a dense model (model.num_experts = 0) has no experts to spread; "
                f"set parallel.{name} = 1"
            )


def _moe_rules(model: ModelConfig) -> Iterator[str]:
    E, K = model.num_experts, model.top_k
    router = model.router
    if not 1 <= K <= E:
        yield f"model.top_k = {K}: must be from 1 to model.num_experts = {E}; set model.top_k in this range"
    if not model.expert_ffn_size:
        yield "model.expert_ffn_size = 0: a mixture of experts (model.num_experts > 0) needs it; set it"
    # The softmax over one selected logit is 1 whatever the logit: the router would get no gradient.
    if K == 1 and router.score_function == "softmax" and router.normalize_top_k:
        yield (
            "model.router.normalize_top_k = true: with model.top_k = 1 and softmax the combine weight is always 1 "
            "and the router cannot learn; set model.router.normalize_top_k = false"
        )
    # megatron-core 0.16 adds the selection bias to sigmoid scores only.
    if router.bias_update_rate and router.score_function != "sigmoid":
        yield (
            f"model.router.bias_update_rate = {router.bias_update_rate}: needs model.router.score_function = "
            f'"sigmoid", not "{router.score_function}"; change it, or balance with model.router.aux_loss'
        )
    yield from _group_rules(model)


def _group_rules(model: ModelConfig) -> Iterator[str]:
    """Group-limited routing as megatron-core's `group_limited_topk` needs it."""
    E, K, groups, chosen = model.num_experts, model.top_k, model.router.num_groups, model.router.group_top_k
    if bool(groups) != bool(chosen):
        given, missing = ("num_groups", "group_top_k") if groups else ("group_top_k", "num_groups")
        yield (
            f"model.router.{missing} = 0: group-limited routing (model.router.{given} = {groups or chosen}) needs it; "
            f"set it, or leave out model.router.{given}"
        )
    if not (groups and chosen):
        return
    yield from _must_divide("model.router.num_groups", groups, "model.num_experts", E)
    yield from _must_divide("model.router.group_top_k", chosen, "model.top_k", K)
    if chosen > groups:
        yield (
            f"model.router.group_top_k = {chosen}: must be at most model.router.num_groups = {groups}; "
            f"use {groups} or less"
        )
    elif K // chosen > E // groups:
        yield (
            f"model.router.group_top_k = {chosen}: each chosen group gives model.top_k / group_top_k = {K // chosen} "
            f"experts but holds only {E // groups}; raise group_top_k or lower model.router.num_groups = {groups}"
        )


def _pipeline_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline_chunks > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.pipeline_chunks = {parallel.pipeline_chunks}: interleaving needs parallel.pipeline of 2 or "
            "more; set parallel.pipeline_chunks = 1"
        )
    stages, name = parallel.pipeline, "parallel.pipeline"
    if parallel.pipeline_chunks > 1:
        stages, name = stages * parallel.pipeline_chunks, "parallel.pipeline * parallel.pipeline_chunks"
    yield from _must_divide(name, stages, "model.num_layers", config.model.num_layers)


def _sharding_rules(config: Config) -> Iterator[str]:
    """Sizes that tensor, expert and context parallelism cut into equal parts."""
    model, parallel = config.model, config.parallel
    cut = {
        "model.vocab_size": model.vocab_size,
        "model.num_query_groups": model.query_groups,
        "model.ffn_size": model.ffn_size,
        "model.shared_expert_ffn_size": model.shared_expert_ffn_size,
    }
    for key, size in cut.items():
        yield from _must_divide("parallel.tensor", parallel.tensor, key, size)
    if model.is_moe:
        yield from _must_divide("parallel.expert", parallel.expert, "model.num_experts", model.num_experts)
        yield from _must_divide(
            "parallel.expert_tensor", parallel.expert_tensor, "model.expert_ffn_size", model.expert_ffn_size
        )
    length = config.batch.sequence_length
    if parallel.context > 1:
        # Each context rank takes one early and one late part of the sequence, so that causal work is even.
        yield from _must_divide("2 * parallel.context", 2 * parallel.context, "batch.sequence_length", length)
    if parallel.tensor > 1:
        # Sequence parallelism, on with tensor parallelism, cuts what context parallelism left.
        name = "parallel.tensor" + (" * parallel.context" if parallel.context > 1 else "")
        yield from _must_divide(name, parallel.tensor * parallel.context, "batch.sequence_length", length)


def _budget_rules(config: Config) -> Iterator[str]:
    budget, schedule = config.budget, config.schedule
    if bool(budget.tokens) == bool(budget.steps):
        yield (
            f"budget.tokens = {budget.tokens}, budget.steps = {budget.steps}: exactly one of them must be given; "
            + ("leave one out" if budget.tokens else "set one")
        )
        return
    total = config.total_steps
    if schedule.warmup_steps >= total:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps}: must be less than the {total} steps of [budget]; "
            "shorten the warm-up or lengthen the budget"
        )
    elif schedule.kind == "wsd" and schedule.warmup_steps > total * (1 - schedule.decay_fraction):
        yield (
            f"schedule.decay_fraction = {schedule.decay_fraction}: the decay must begin after "
            f"schedule.warmup_steps = {schedule.warmup_steps} of {total} steps; "
            f"use {1 - schedule.warmup_steps / total:.2g} or less"
        )


def _saving_rules(config: Config) -> Iterator[str]:
    every, forever = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if forever and (not every or forever % every):
        yield (
            f"checkpoint.keep_every_steps = {forever}: must be a multiple of checkpoint.every_steps = {every}, or "
            "there is nothing to keep at some of these steps; change either"
        )
    if config.eval.every_steps and not config.data.valid:
        yield (
            f"eval.every_steps = {config.eval.every_steps}: validation needs a dataset; add [[data.valid]] with "
            "prefix, or set eval.every_steps = 0"
        )


def _world_size_rules(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    if world_size < 1:
        yield f"world size = {world_size}: must be at least 1; a run alone has 1"
        return
    dense, expert = _model_ranks(parallel), _expert_ranks(parallel)
    yield from _must_divide("parallel.tensor * parallel.pipeline * parallel.context", dense, "world size", world_size)
    yield from _must_divide(
        "parallel.expert * parallel.expert_tensor * parallel.pipeline", expert, "world size", world_size
    )
    if world_size % dense == 0:
        yield from _batch_rules(config, world_size // dense)


def _batch_rules(config: Config, data_parallel: int) -> Iterator[str]:
    parallel, G, B = config.parallel, config.batch.global_batch_size, config.batch.micro_batch_size
    readers = data_parallel * config.sites
    at_once = B * readers
    microbatches = -(-G // at_once)
    if G % at_once:
        remedy = f"use {microbatches * at_once}"
        if G % readers == 0:
            fitting = next(size for size in range(B, 0, -1) if G // readers % size == 0)
            remedy += f", or batch.micro_batch_size = {fitting}"
        names, sizes = "batch.micro_batch_size * data-parallel size", f"{B} * {data_parallel}"
        if config.sites > 1:
            names, sizes = f"{names} * decentral.sites", f"{sizes} * {config.sites}"
        yield f"batch.global_batch_size = {G}: must be a multiple of {names} = {sizes}; {remedy}"
    elif parallel.pipeline_chunks > 1 and microbatches % parallel.pipeline:
        fitting = at_once * parallel.pipeline * -(-microbatches // parallel.pipeline)
        yield (
            f"batch.global_batch_size = {G}: gives {microbatches} micro-batches per step, which the interleaved "
            f"schedule needs in multiples of parallel.pipeline = {parallel.pipeline}; use {fitting}, or set "
            "parallel.pipeline_chunks = 1"
        )


def _model_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the dense weights and share one sequence."""
    return parallel.tensor * parallel.pipeline * parallel.context


def _expert_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the routed experts."""
    return parallel.expert * parallel.expert_tensor * parallel.pipeline


def smallest_world_size(config: Config) -> int:
    """Fewest ranks on which the layouts of all stages fit."""
    layouts = [stage.config.parallel for stage in stages(config)]
    return math.lcm(*map(_model_ranks, layouts), *map(_expert_ranks, layouts))


@dataclass(frozen=True)
class Layout:
    """What follows from the configuration and the number of ranks (of one site, if there are several). Only of
    combinations that pass `check`."""

    world_size: int
    tensor: int
    pipeline: int
    pipeline_chunks: int
    context: int
    expert: int
    expert_tensor: int
    data_parallel: int
    """Ranks with the same dense weights and different sequences."""
    expert_data_parallel: int
    """Ranks with the same routed-expert weights."""
    microbatches: int
    """Per optimizer step and data-parallel rank."""
    layers_per_chunk: int
    experts_per_rank: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Layout:
        """The layout of `config` on `world_size` ranks."""
        parallel, batch = config.parallel, config.batch
        data_parallel = world_size // _model_ranks(parallel)
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            pipeline_chunks=parallel.pipeline_chunks,
            context=parallel.context,
            expert=parallel.expert,
            expert_tensor=parallel.expert_tensor,
            data_parallel=data_parallel,
            expert_data_parallel=world_size // _expert_ranks(parallel),
            microbatches=batch.global_batch_size // (batch.micro_batch_size * data_parallel * config.sites),
            layers_per_chunk=config.model.num_layers // (parallel.pipeline * parallel.pipeline_chunks),
            experts_per_rank=config.model.num_experts // parallel.expert,
        )

    @property
    def layers_per_stage(self) -> int:
        """Layers on one pipeline rank, over all its chunks."""
        return self.layers_per_chunk * self.pipeline_chunks

    def stage_layers(self, pipeline_rank: int) -> tuple[int, ...]:
        """Global numbers of the layers on one pipeline rank; chunks are dealt round-robin, as in megatron-core."""
        starts = (
            (chunk * self.pipeline + pipeline_rank) * self.layers_per_chunk for chunk in range(self.pipeline_chunks)
        )
        return tuple(layer for start in starts for layer in range(start, start + self.layers_per_chunk))
