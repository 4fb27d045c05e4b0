"""A plan as text for a terminal: one stage as a list; several as a table with a column each, and what is between."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pretrain.config.rules import Layout
from pretrain.plan.decentral_text import decentral_tables
from pretrain.plan.memory import RankMemory
from pretrain.plan.numbers import Plan, StagePlan
from pretrain.plan.optimizer import OptimizerPlan
from pretrain.plan.tables import Row, align, binary_bytes, grid, quantity, scientific


def format_plan(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    if plan.decentral:
        ranks = f"{'1 site' if plan.decentral.sites == 1 else f'{plan.decentral.sites} sites'} of {ranks}"
    lines = [
        f"{ranks}, {plan.precision}: {plan.steps:,} steps of {quantity(plan.tokens_per_step)} tokens, "
        f"{quantity(plan.tokens)} tokens, {scientific(plan.total_flops)} FLOPs"
    ]
    if len(plan.stages) == 1:
        for title, rows in _stage_rows(plan.stages[0]).items():
            lines += ["", title, *align(rows)]
        if plan.decentral:
            lines += ["", *decentral_tables(plan, plan.decentral)]
        return "\n".join([*lines, "", *_optimizer_table(plan.optimizer)])
    lines += ["", *_stage_table(plan.stages)]
    for before, after in itertools.pairwise(plan.stages):
        tokens = quantity(after.start_step * plan.tokens_per_step)
        lines += ["", f"Growth at step {after.start_step:,}, {tokens} tokens", *align(_growth_rows(before, after))]
    return "\n".join([*lines, "", *_compute_table(plan), "", *_optimizer_table(plan.optimizer)])


def _stage_rows(stage: StagePlan) -> dict[str, list[Row]]:
    """Section title -> rows."""
    sections = {
        "Model": [("", line, "") for line in _describe_shape(stage.shape)],
        "Parameters": _parameter_rows(stage),
        "FLOPs, forward and backward": _flops_rows(stage),
        "Layout": _layout_rows(stage.layout),
        f"Memory per rank (pipeline rank {stage.memory.pipeline_rank}, the largest)": _memory_rows(stage.memory),
    }
    if stage.tokens_per_expert_per_step:
        sections["Layout"] += [
            ("tokens per expert", quantity(stage.tokens_per_expert_per_step), "per step, at even load"),
            ("", quantity(stage.tokens_per_expert_per_microbatch), "per micro-batch"),
        ]
    return sections


def _parameter_rows(stage: StagePlan) -> list[Row]:
    parameters = stage.parameters
    counts = {
        "total": parameters.total,
        "active per token": parameters.active,
        "non-embedding": parameters.non_embedding,
        **{f"  {name.replace('_', ' ')}": value for name, value in parameters.by_part.items() if value},
    }
    remarks = {"non-embedding": "without norms"}
    return [(name, quantity(value), remarks.get(name, f"{value:,}")) for name, value in counts.items()]


def _flops_rows(stage: StagePlan) -> list[Row]:
    flops = stage.flops
    return [
        ("per token", quantity(flops.per_token), "causal attention at half the square"),
        ("  full attention", quantity(flops.per_token_full_attention), ""),
        ("  6 N_active", quantity(flops.per_token_6nd), ""),
        ("in all", scientific(stage.total_flops), f"6 N_active D: {scientific(stage.total_flops_6nd)}"),
    ]


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
        if "dense_layers" in shape:
            experts += f", {shape['dense_layers']} further layers dense"
        return [*lines, experts]
    return [*lines, f"dense, ffn {shape['ffn_size']}"]


def _layout_rows(layout: Layout) -> list[Row]:
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


def _memory_rows(memory: RankMemory) -> list[Row]:
    return [
        ("weights", binary_bytes(memory.weights), ""),
        ("gradients", binary_bytes(memory.gradients), "fp32"),
        ("optimizer", binary_bytes(memory.optimizer), "rank that owns the most"),
        ("activations", binary_bytes(memory.activations), "estimate"),
        ("logits", binary_bytes(memory.logits), ""),
        ("total", binary_bytes(memory.total), ""),
    ]


def _stage_table(stages: Sequence[StagePlan]) -> list[str]:
    """All stages side by side."""
    columns = [_stage_column(stage) for stage in stages]
    header = [f"stage {number}" for number in range(1, len(stages) + 1)]
    rows: list[tuple[str, Sequence[str]]] = []
    for title in columns[0]:
        rows.append((title, ()))
        # Growth adds parts that the first stages do not have.
        names = dict.fromkeys(name for column in columns for name in column[title])
        rows += [(f"  {name}", [column[title].get(name, "-") for column in columns]) for name in names]
    return grid("", header, rows)


def _stage_column(stage: StagePlan) -> dict[str, dict[str, str]]:
    """Section title -> row name -> value."""
    layout = {"layers per stage": f"{stage.layout.layers_per_stage}", "micro-batches": f"{stage.layout.microbatches}"}
    if stage.tokens_per_expert_per_step:
        layout["tokens per expert, step"] = quantity(stage.tokens_per_expert_per_step)
        layout["tokens per expert, micro-batch"] = quantity(stage.tokens_per_expert_per_microbatch)
    return {
        "Budget": {
            "from step": f"{stage.start_step:,}",
            "steps": f"{stage.steps:,}",
            "tokens": quantity(stage.tokens),
        },
        "Model": {name: f"{size:,}" for name, size in stage.shape.items()},
        "Parameters": {name: value for name, value, _ in _parameter_rows(stage)},
        "FLOPs, forward and backward": {
            **{name: value for name, value, _ in _flops_rows(stage)},
            "  6 N_active D": scientific(stage.total_flops_6nd),
        },
        "Layout": _size_column(stage.layout) | layout,
        "Memory per rank": {name: value for name, value, _ in _memory_rows(stage.memory)},
    }


def _size_column(layout: Layout) -> dict[str, str]:
    sizes = {
        "data": layout.data_parallel,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
    }
    if layout.pipeline_chunks > 1:
        sizes["pipeline chunks"] = layout.pipeline_chunks
    if layout.experts_per_rank:
        sizes["expert data"] = layout.expert_data_parallel
        sizes["expert"] = layout.expert
        sizes["expert tensor"] = layout.expert_tensor
        sizes["experts per rank"] = layout.experts_per_rank
    return {name: f"{size}" for name, size in sizes.items()}


def _growth_rows(before: StagePlan, after: StagePlan) -> list[Row]:
    growth = after.growth
    assert growth is not None
    memory = growth.memory
    old, new = memory.old_weights + memory.old_optimizer, memory.new_weights + memory.new_optimizer
    function = "preserved, up to rounding and the noise asked for" if growth.preserves_function else "changes"
    return [
        ("grows", growth.grows, ""),
        ("function", function, ""),
        ("optimizer", growth.optimizer_state, ""),
        ("learning rate", growth.rewarm, ""),
        (
            "memory per rank",
            binary_bytes(memory.total),
            f"at most: weights and optimizer of both models, {binary_bytes(old)} and {binary_bytes(new)}, "
            f"buffers {binary_bytes(memory.buffers)}",
        ),
        ("", "", f"training: {binary_bytes(before.memory.total)} before, {binary_bytes(after.memory.total)} after"),
    ]


def _compute_table(plan: Plan) -> list[str]:
    """What the run costs, and what the final model would have cost from the first token on."""
    return grid(
        "Compute",
        ["exact", "6 N_active D"],
        [
            ("  this run", [scientific(plan.total_flops), scientific(plan.total_flops_6nd)]),
            ("  final size from scratch", [scientific(plan.scratch_flops), scientific(plan.scratch_flops_6nd)]),
            ("  saved", [f"{100 * plan.saved:.1f} %", f"{100 * plan.saved_6nd:.1f} %"]),
        ],
    )


def _optimizer_table(optimizer: OptimizerPlan) -> list[str]:
    """Settings beside the nearest published ones."""
    loss = f" (loss {optimizer.published_loss:.4f})" if optimizer.published_loss else ""
    rows = [
        ("  tokens per step", (optimizer.tokens_per_step, optimizer.published_tokens_per_step), ""),
        *((f"  {key.key}", (key.value, key.published), key.remark) for key in optimizer.keys),
    ]
    lines = grid(
        "",
        [
            f"{quantity(optimizer.model_size)} at {optimizer.ratio:.3g}x",
            f"{optimizer.published_size} at {optimizer.published_ratio}x",
        ],
        [(name, [_setting(value) for value in values]) for name, values, _ in rows],
    )
    remarks = ["", *(remark for _, _, remark in rows)]
    return [
        f"Optimizer {optimizer.kind}: learning rates, and what else differs from the nearest published settings{loss}",
        *(f"{line}  {remark}".rstrip() for line, remark in zip(lines, remarks, strict=True)),
        *(f"  {note}" for note in optimizer.notes),
    ]


def _setting(value: bool | float | str) -> str:
    """A value as a configuration file has it, short."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
