"""Rules for `[[growth]]`: what each growth point needs of the run and of the model it finds.

Rules about the grown model itself (does the layout still divide it?) are those of every model, and checked as such.
"""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.growth import WIDTH_AXES, DepthGrowth, ExpertGrowth, GrowthConfig, WidthGrowth
from pretrain.config.optim import Kind
from pretrain.config.schema import Config, ModelConfig
from pretrain.config.stages import axis_size, grown_model, growth_step, wider_size

PROBING = ("sophia", "kron")
"""Optimizers whose states depend on numbers drawn for every entry."""


def growth_rules(config: Config) -> Iterator[str]:
    """Every broken rule of the growth points, each seen with the model that the points before it leave."""
    previous = 0
    for index, growth in enumerate(config.growth):
        yield from _time_rules(config, growth, f"growth[{index}]", previous)
        previous = growth_step(config, growth)
    model = config.model
    for index, growth in enumerate(config.growth):
        problems = list(_operator_rules(model, growth, f"growth[{index}]", config.optim.kind))
        yield from problems
        if problems:
            return  # The model after this point is not known.
        model = grown_model(model, growth)


def _time_rules(config: Config, growth: GrowthConfig, key: str, previous: int) -> Iterator[str]:
    if bool(growth.at_step) == bool(growth.at_tokens):
        yield (
            f"{key}.at_step = {growth.at_step}, {key}.at_tokens = {growth.at_tokens}: exactly one of them must be "
            "given; " + ("leave one out" if growth.at_step else "set one")
        )
        return
    step, name = growth_step(config, growth), "at_step" if growth.at_step else "at_tokens"
    at = f"{key}.{name} = {getattr(growth, name)}" + ("" if growth.at_step else f" (step {step})")
    if bool(config.budget.tokens) != bool(config.budget.steps) and step >= config.total_steps:
        yield f"{at}: must come before the end of the budget, step {config.total_steps}; grow earlier or train longer"
    if step <= previous:
        yield f"{at}: must come after the growth before it, at step {previous}; order them and leave steps between"
    if growth.rewarm and step < config.schedule.warmup_steps:
        yield (
            f"{at}: {key}.rewarm starts from the learning rate of this step, which is still warming up to step "
            f"schedule.warmup_steps = {config.schedule.warmup_steps}; grow later, or leave out {key}.rewarm"
        )
    elif growth.rewarm and step + growth.rewarm.steps >= config.total_steps > step:
        yield (
            f"{key}.rewarm.steps = {growth.rewarm.steps}: must end before the budget, which has "
            f"{config.total_steps - step} steps left after the growth; use fewer"
        )
    utility = growth.experts.utility if growth.experts else None
    if utility and 0 < step - previous < utility.steps:
        yield (
            f"{key}.experts.utility.steps = {utility.steps}: the model is as it is for only {step - previous} steps "
            f"before the growth; use {step - previous} or fewer, or grow later"
        )


def _operator_rules(model: ModelConfig, growth: GrowthConfig, key: str, kind: Kind) -> Iterator[str]:
    if not (growth.depth or growth.experts or growth.widths):
        yield f"{key}: nothing grows; give it depth, experts, {' or '.join(WIDTH_AXES)}"
    if growth.depth:
        yield from _depth_rules(model, growth.depth, f"{key}.depth")
    if growth.experts and not model.is_moe:
        yield f"{key}.experts: a dense model (model.num_experts = 0) has no experts to copy; leave it out"
    elif growth.experts:
        # An exact state asks for copies that stay equal.
        exact = growth.optimizer_state == "exact"
        yield from _expert_rules(model, growth.experts, f"{key}.experts", exact=exact)
    for name, width in growth.widths.items():
        yield from _width_rules(model, name, width, f"{key}.{name}")
    yield from _state_rules(growth, key, kind)


def _depth_rules(model: ModelConfig, depth: DepthGrowth, key: str) -> Iterator[str]:
    kept = depth.keep_first + depth.keep_last
    if kept >= model.num_layers:
        yield (
            f"{key}.keep_first + keep_last = {kept}: leaves none of the {model.num_layers} layers to repeat; "
            f"keep at most {model.num_layers - 1}"
        )


def _expert_rules(model: ModelConfig, experts: ExpertGrowth, key: str, *, exact: bool) -> Iterator[str]:
    router = model.router
    if experts.top_k == "double" and model.top_k == 1 and router.score_function == "sigmoid" and router.normalize_top_k:
        yield (
            f'{key}.top_k = "double": with model.top_k = 1 the sigmoid scores are used as they are and with '
            f"{experts.factor} they would be normalised, which is another function; set "
            'model.router.normalize_top_k = false, or top_k = "hold"'
        )
    if experts.factor > 2 and experts.top_k == "double" and not experts.noise and not exact:
        # Chosen together and of one state, they get the same updates. What holds top_k chooses between them.
        yield (
            f"{key}.factor = {experts.factor}: several copies of one expert would stay equal for ever; grow by 2 "
            f"twice, or set {key}.noise, for example 0.01"
        )
    held = {"bias_noise": experts.bias_noise, "exact_start": experts.exact_start, "utility": experts.utility}
    for name, value in held.items():
        if value and experts.top_k != "hold":
            yield f'{key}.{name}: only for top_k = "hold"; leave it out, or set {key}.top_k = "hold"'
        elif value and name != "utility" and not router.bias_update_rate:
            yield (
                f"{key}.{name}: needs a selection bias (model.router.bias_update_rate = 0 is none); leave it out, or "
                "train with one"
            )
    if experts.bias_noise and experts.exact_start:
        yield f"{key}.bias_noise = {experts.bias_noise}: with exact_start no copy is chosen at first; leave one out"
    if experts.utility and experts.utility.max_copies < experts.factor - 1:
        yield (
            f"{key}.utility.max_copies = {experts.utility.max_copies}: too few for {experts.factor} times the experts; "
            f"use {experts.factor - 1} or more"
        )
    if experts.utility and router.num_groups:
        yield (
            f"{key}.utility: copies that are not spread evenly break the model.router.num_groups = "
            f"{router.num_groups} groups; leave out utility"
        )


def _width_rules(model: ModelConfig, name: str, width: WidthGrowth, key: str) -> Iterator[str]:
    size = axis_size(model, name)
    if not size:
        yield f"{key}: the model has no such axis (model.{WIDTH_AXES[name][1]} = 0); leave it out"
        return
    grown = size * width.factor
    if abs(grown - wider_size(size, width)) > 1e-9 * grown or wider_size(size, width) == size:
        yield f"{key}.factor = {width.factor}: {size} times that is no larger whole number; use 2, or what gives one"
    if (width.init == "uneven") != (width.split is not None):
        rule = "needs" if width.init == "uneven" else "has no use for"
        yield f'{key}.init = "{width.init}": {rule} {key}.split; {"set it" if width.split is None else "leave it out"}'
    if width.init == "uneven" and width.factor != 2:
        yield f'{key}.factor = {width.factor}: init = "uneven" splits each channel in two; use 2'
    if width.noise and width.init not in ("copy", "uneven"):
        yield f'{key}.noise = {width.noise}: for copies, and init = "{width.init}" is not; leave it out'
    if width.factor > 2 and "random" not in (width.fan_out, width.fan_in) and not width.noise:
        # Their gradients, states and learning rates are the same for ever.
        noise = f", or set {key}.noise, for example 0.01" if width.init == "copy" else ""
        yield (
            f"{key}.factor = {width.factor}: several copies of one channel would stay equal for ever; grow by 2 "
            f"twice{noise}"
        )


def _state_rules(growth: GrowthConfig, key: str, kind: Kind) -> Iterator[str]:
    if growth.optimizer_state != "exact":
        return
    experts = growth.experts
    exact = experts and experts.top_k == "double" and experts.noise == 0 and not (growth.depth or growth.widths)
    if not exact:
        yield (
            f'{key}.optimizer_state = "exact": known only for experts alone with top_k = "double" and noise = 0; use '
            '"asymmetric", "copy" or "reset"'
        )
    elif kind in PROBING:
        yield (
            f'{key}.optimizer_state = "exact": optim.kind = "{kind}" probes every expert with random numbers of its '
            'own, so that copies part; use "asymmetric", "copy" or "reset"'
        )
