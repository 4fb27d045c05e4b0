"""The stages of a run: its model and layout before, between and after its growth points; and growth points in words.

Pure arithmetic on configurations. What the entries of a grown tensor are stands in `pretrain.growth`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.growth import WIDTH_AXES, DepthGrowth, ExpertGrowth, GrowthConfig, RewarmConfig, WidthGrowth
from pretrain.config.schema import Config, ModelConfig, ParallelConfig

BUFFER_BYTES = 64 << 20
"""Largest size of each of the two buffers, one to send and one to receive, through which values move between ranks at a
growth: little beside a model. Two processes on a CPU took 0.35 s with 1 MiB, 0.22 s with 16 MiB, 0.20 s with 64 MiB and
0.22 s with 128 MiB for 256 MiB to each other (best of 5, noise 10 %)."""


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one model and one layout."""

    config: Config
    """The run's configuration with this stage's [model] and [parallel]."""
    start_step: int
    """Optimizer steps done before it."""
    growth: GrowthConfig | None
    """What began it; None for the first."""


def stages(config: Config) -> tuple[Stage, ...]:
    """All stages of a run, the first being the configuration as written. Of configurations that pass `check`."""
    found = [Stage(config, 0, None)]
    for growth in config.growth:
        before = found[-1].config
        after = before.model_copy(
            update={
                "model": grown_model(before.model, growth),
                "parallel": changed_parallel(before.parallel, growth),
            }
        )
        found.append(Stage(after, growth_step(config, growth), growth))
    return tuple(found)


def growth_step(config: Config, growth: GrowthConfig) -> int:
    """Optimizer steps done before a growth; a number of tokens is rounded up to whole steps."""
    return growth.at_step or -(-growth.at_tokens // config.batch.tokens_per_step)


def changed_parallel(parallel: ParallelConfig, growth: GrowthConfig) -> ParallelConfig:
    """The layout after a growth."""
    changes = growth.parallel.model_dump(exclude_none=True) if growth.parallel else {}
    return parallel.model_copy(update=changes)


def grown_model(model: ModelConfig, growth: GrowthConfig) -> ModelConfig:
    """The model after a growth."""
    changes: dict[str, object] = {}
    if growth.depth:
        changes |= _deeper(model, growth.depth)
    if growth.experts:
        changes |= _richer(model, growth.experts)
    for name, width in growth.widths.items():
        changes |= _wider(model, name, width)
    router = changes.pop("router", {})
    assert isinstance(router, dict)
    return model.model_copy(update={**changes, "router": model.router.model_copy(update=router)})


def layer_sources(num_layers: int, depth: DepthGrowth) -> tuple[int, ...]:
    """Source layer of every layer after a growth in depth (arXiv 2510.08008).

    interpose: j // factor; stack: j mod num_layers. The first `keep_first` and last `keep_last` layers occur once: a
    stack's passes but the first leave out the former, all but the last the latter (SOLAR's depth up-scaling).
    """
    first, last = depth.keep_first, num_layers - depth.keep_last
    middle = range(first, last)
    if depth.method == "interpose":
        repeated = [layer for layer in middle for _ in range(depth.factor)]
    else:
        repeated = [*middle] * depth.factor
    return (*range(first), *repeated, *range(last, num_layers))


def wider_size(size: int, width: WidthGrowth) -> int:
    """Size of an axis after a growth in width."""
    return round(size * width.factor)


def fan_in_scale(size: int, new_size: int, *, copied: bool) -> float:
    """Factor on every entry of a matrix whose `size` inputs became `new_size`, which keeps the RMS of its output.

    With m_j the multiplicity of input j, both sides copied: sqrt(size / sum m_j^2), 1/2 when all are doubled; else the
    new inputs are independent of the old ones, and it is sqrt(size / new_size) (SPARKLING, arXiv 2602.02472,
    equations 14 to 17, whose c > 1 holds for whole c only).
    """
    if not copied:
        return math.sqrt(size / new_size)
    each, more = divmod(new_size, size)
    squares = (size - more) * each**2 + more * (each + 1) ** 2
    return math.sqrt(size / squares)


def is_copied(width: WidthGrowth) -> bool:
    """Whether both sides of a wider axis, what writes it and what reads it, are copies."""
    return width.fan_out == "copy" and width.fan_in == "copy"


def preserves_function(growth: GrowthConfig) -> bool:
    """Whether the model computes the same right after a growth, up to rounding and to the noise that is asked for."""
    widths = all(width.init in ("copy", "uneven") and width.factor % 1 == 0 for width in growth.widths.values())
    depth = growth.depth is None or growth.depth.identity
    experts = growth.experts is None or growth.experts.top_k == "double" or growth.experts.exact_start
    return widths and depth and experts


def describe_growth(model: ModelConfig, growth: GrowthConfig) -> str:
    """What grows and how, of the `model` that a growth finds: `layers 4 -> 8 (interpose), hidden 128 -> 256 (copy)`."""
    grown, parts = grown_model(model, growth), []
    if growth.depth:
        parts.append(f"layers {model.num_layers} -> {grown.num_layers} ({_describe_depth(growth.depth)})")
    if growth.experts:
        how = _describe_experts(growth.experts, model.top_k, grown.top_k)
        parts.append(f"experts {model.num_experts} -> {grown.num_experts} ({how})")
    for name, width in growth.widths.items():
        before, after = axis_size(model, name), axis_size(grown, name)
        parts.append(f"{name.replace('_', ' ')} {before} -> {after} ({_describe_width(width)})")
    return ", ".join(parts)


def describe_state(growth: GrowthConfig) -> str:
    """What the optimizer keeps at a growth."""
    return {
        "asymmetric": "old entries keep their state, new ones start at zero",
        "reset": "all entries start at zero, the step count too",
        "copy": "old entries keep their state, new ones get their source's",
        "exact": "copies share their source's state such that training goes on as before",
    }[growth.optimizer_state]


def describe_rewarm(rewarm: RewarmConfig | None) -> str:
    """What the learning rate does after a growth."""
    if rewarm is None:
        return "goes on as before"
    return (
        f"of {rewarm.entries} entries from {rewarm.start:g} to {rewarm.ratio:g} times its value here in "
        f"{rewarm.steps} steps, then a curve of its own to the end"
    )


def axis_size(model: ModelConfig, name: str) -> int:
    """Size of the axis that a width key, one of WIDTH_AXES, grows; 0 if the model has none."""
    size: int = model.query_groups if name == "query_groups" else getattr(model, WIDTH_AXES[name][1])
    return size


def _describe_depth(depth: DepthGrowth) -> str:
    words: list[str] = [depth.method]
    if depth.keep_first or depth.keep_last:
        words.append(f"first {depth.keep_first} and last {depth.keep_last} once")
    if depth.identity:
        words.append("identity at the start")
    return ", ".join(words)


def _describe_experts(experts: ExpertGrowth, top_k: int, new_top_k: int) -> str:
    words = [f"top-k {top_k} -> {new_top_k}" if new_top_k != top_k else f"top-k {top_k} held"]
    if experts.order == "interleave":
        words.append("interleaved")
    if experts.utility:
        words.append("chosen by gradients")
    if experts.exact_start:
        words.append("copies out of reach at the start")
    words += [f"noise {experts.noise:g}"] if experts.noise else []
    words += [f"bias noise {experts.bias_noise:g}"] if experts.bias_noise else []
    return ", ".join(words)


def _describe_width(width: WidthGrowth) -> str:
    words = [f"{width.init} {width.split:g} : {1 - width.split:g}" if width.split else width.init]
    words += [f"noise {width.noise:g}"] if width.noise else []
    return ", ".join(words)


def _deeper(model: ModelConfig, depth: DepthGrowth) -> dict[str, object]:
    sources = layer_sources(model.num_layers, depth)
    changes: dict[str, object] = {"num_layers": len(sources)}
    if model.is_moe:
        changes |= _dense_layers([model.is_moe_layer(source) for source in sources])
    return changes


def _dense_layers(is_moe: Sequence[bool]) -> dict[str, object]:
    """The keys that say which layers are dense."""
    # A model without any layer of experts breaks a rule, which is told beside the others.
    first = is_moe.index(True) if True in is_moe else len(is_moe)
    return {
        "first_dense_layers": first,
        "dense_layers": tuple(layer for layer in range(first, len(is_moe)) if not is_moe[layer]),
    }


def _richer(model: ModelConfig, experts: ExpertGrowth) -> dict[str, object]:
    g, router = experts.factor, model.router
    doubled = experts.top_k == "double"
    changes: dict[str, object] = {}
    if router.num_groups and experts.order == "append":
        # Copies of a group form a group of their own, so that every group's best experts are what they were.
        changes["num_groups"] = router.num_groups * g
        if doubled:
            changes["group_top_k"] = router.group_top_k * g
    if doubled and router.score_function == "sigmoid" and not router.normalize_top_k:
        # Each expert's weight is its score, whatever the others': g copies would count g times.
        changes["scaling_factor"] = router.scaling_factor / g
    return {
        "num_experts": model.num_experts * g,
        "top_k": model.top_k * (g if doubled else 1),
        "router": changes,
    }


def _wider(model: ModelConfig, name: str, width: WidthGrowth) -> dict[str, object]:
    if name == "query_groups":
        groups = wider_size(model.query_groups, width)
        heads = model.num_attention_heads // model.query_groups * groups
        return {"num_query_groups": groups, "num_attention_heads": heads, "head_dim": model.channels}
    size = axis_size(model, name)
    changes: dict[str, object] = {WIDTH_AXES[name][1]: wider_size(size, width)}
    if name == "hidden":
        changes["head_dim"] = model.channels
        if model.tie_embeddings:
            # One table cannot be scaled for the output layer and not for the input: the logits are.
            copied = width.fan_out == "copy"
            changes["logit_scale"] = model.logit_scale * fan_in_scale(size, wider_size(size, width), copied=copied)
    return changes
