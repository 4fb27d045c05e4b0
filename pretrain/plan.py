"""What a run will be, before it runs: every derived number of a configuration on a given number of ranks.

Needs neither torch nor megatron-core nor any device, so it answers in a second for any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.rules import Layout, check, smallest_world_size
from pretrain.config.schema import Config
from pretrain.errors import ConfigError
from pretrain.model.counts import (
    Flops,
    ParameterCounts,
    RankMemory,
    count_flops,
    count_parameters,
    local_tokens,
    rank_memory,
    tokens_per_expert,
)


@dataclass(frozen=True)
class StagePlan:
    """A stretch of a run with one model and one layout."""

    start_step: int
    steps: int
    tokens: int
    shape: dict[str, int]
    """Layers, hidden size and so on, by their configuration keys."""
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
    precision: str
    tokens_per_step: int
    steps: int
    tokens: int
    total_flops: int
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


def make_plan(config: Config, world_size: int | None = None) -> Plan:
    """Check the configuration and derive its numbers.

    Args:
        world_size: ranks; without it, the fewest that the layout fits on.

    Raises:
        ConfigError: with every rule that is broken.
    """
    if world_size is None:
        world_size = smallest_world_size(config)
    problems = check(config, world_size)
    if problems:
        raise ConfigError(problems)
    stages = (_plan_stage(config, world_size, start_step=0, steps=config.total_steps),)
    return Plan(
        world_size=world_size,
        precision=config.run.precision,
        tokens_per_step=config.batch.tokens_per_step,
        steps=sum(stage.steps for stage in stages),
        tokens=sum(stage.tokens for stage in stages),
        total_flops=sum(stage.total_flops for stage in stages),
        stages=stages,
    )


def _plan_stage(config: Config, world_size: int, *, start_step: int, steps: int) -> StagePlan:
    model, batch = config.model, config.batch
    layout = Layout.of(config, world_size)
    tokens = steps * batch.tokens_per_step
    flops = count_flops(model, batch.sequence_length)
    tokens_in_expert_group = local_tokens(batch, layout) * layout.expert * layout.expert_tensor
    return StagePlan(
        start_step=start_step,
        steps=steps,
        tokens=tokens,
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
    }
    return {key: value for key, value in shape.items() if value}


def format_plan(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    lines = [
        f"{ranks}, {plan.precision}: {plan.steps:,} steps of {quantity(plan.tokens_per_step)} tokens, "
        f"{quantity(plan.tokens)} tokens, {scientific(plan.total_flops)} FLOPs"
    ]
    for number, stage in enumerate(plan.stages, start=1):
        if len(plan.stages) > 1:
            lines += ["", f"Stage {number}, from step {stage.start_step:,}"]
        for title, rows in _stage_rows(stage).items():
            lines += ["", title, *_align(rows)]
    return "\n".join(lines)


def _stage_rows(stage: StagePlan) -> dict[str, list[tuple[str, str, str]]]:
    """Section title -> rows of (name, value, remark)."""
    parameters, flops, layout = stage.parameters, stage.flops, stage.layout
    counts = {
        "total": parameters.total,
        "active per token": parameters.active,
        "non-embedding": parameters.non_embedding,
        **{f"  {name.replace('_', ' ')}": value for name, value in parameters.by_part.items() if value},
    }
    remarks = {"non-embedding": "without norms"}
    sections = {
        "Model": [("", line, "") for line in _describe_shape(stage.shape)],
        "Parameters": [(name, quantity(value), remarks.get(name, f"{value:,}")) for name, value in counts.items()],
        "FLOPs, forward and backward": [
            ("per token", quantity(flops.per_token), "causal attention at half the square"),
            ("  full attention", quantity(flops.per_token_full_attention), ""),
            ("  6 N_active", quantity(flops.per_token_6nd), ""),
            ("in all", scientific(stage.total_flops), f"6 N_active D: {scientific(stage.total_flops_6nd)}"),
        ],
        "Layout": _layout_rows(layout),
        f"Memory per rank (pipeline rank {stage.memory.pipeline_rank}, the largest)": _memory_rows(stage.memory),
    }
    if stage.tokens_per_expert_per_step:
        sections["Layout"] += [
            ("tokens per expert", quantity(stage.tokens_per_expert_per_step), "per step, at even load"),
            ("", quantity(stage.tokens_per_expert_per_microbatch), "per micro-batch"),
        ]
    return sections


def _describe_shape(shape: Mapping[str, int]) -> list[str]:
    """The shape in words, attention first."""
    heads, groups = shape["num_attention_heads"], shape["num_query_groups"]
    lines = [
        f"{shape['num_layers']} layers, hidden {shape['hidden_size']}, {heads} heads of {shape['head_dim']} "
        f"in {groups} groups, vocabulary {shape['vocab_size']:,}"
    ]
    if "num_experts" in shape:
        experts = f"{shape['num_experts']} experts of ffn {shape['expert_ffn_size']}, top-{shape['top_k']}"
        if "shared_expert_ffn_size" in shape:
            experts += f", shared expert of ffn {shape['shared_expert_ffn_size']}"
        if "first_dense_layers" in shape:
            experts += f", first {shape['first_dense_layers']} layers dense with ffn {shape['ffn_size']}"
        return [*lines, experts]
    return [*lines, f"dense, ffn {shape['ffn_size']}"]


def _layout_rows(layout: Layout) -> list[tuple[str, str, str]]:
    sizes = {
        "data": layout.data_parallel,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
    }
    experts = {
        "data": layout.expert_data_parallel,
        "expert": layout.expert,
        "tensor": layout.expert_tensor,
        "pipeline": layout.pipeline,
    }
    chunks = f" in {layout.pipeline_chunks} chunks" if layout.pipeline_chunks > 1 else ""
    rows = [("ranks", " x ".join(f"{name} {size}" for name, size in sizes.items()), "")]
    if layout.experts_per_rank:
        rows.append(("  of experts", " x ".join(f"{name} {size}" for name, size in experts.items()), ""))
        rows.append(("experts per rank", str(layout.experts_per_rank), ""))
    rows.append(("layers per stage", f"{layout.layers_per_stage}{chunks}", ""))
    rows.append(("micro-batches", f"{layout.microbatches}", "per step and rank"))
    return rows


def _memory_rows(memory: RankMemory) -> list[tuple[str, str, str]]:
    return [
        ("weights", binary_bytes(memory.weights), ""),
        ("gradients", binary_bytes(memory.gradients), "fp32"),
        ("optimizer", binary_bytes(memory.optimizer), "rank that owns the most"),
        ("activations", binary_bytes(memory.activations), "estimate"),
        ("logits", binary_bytes(memory.logits), ""),
        ("total", binary_bytes(memory.total), ""),
    ]


def _align(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Two-space indent, names padded to one width, values of three columns padded to another."""
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max((len(value) for _, value, remark in rows if remark), default=0)
    lines = []
    for name, value, remark in rows:
        head = f"  {name:<{name_width}}  " if name_width else "  "
        lines.append(f"{head}{value:<{value_width}}  {remark}".rstrip())
    return lines


def quantity(value: float) -> str:
    """A count with four significant digits from a million on: `2.563 B`, `449.5 M`, `1,024`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{_four_digits(value / size)} {unit}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def scientific(value: float) -> str:
    """A large number in powers of ten: `5.39e20`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def binary_bytes(value: float) -> str:
    """Bytes in the largest binary unit below them: `45.0 GiB`, `12.3 MiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _four_digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"
