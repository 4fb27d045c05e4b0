"""Every kind of router against its definition written out here, its losses, its counts and its balancing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from pretrain.config.rules import check
from pretrain.config.schema import Config, ParallelConfig, RouterConfig
from pretrain.model.build import build_chunks
from pretrain.model.router import CountingRouter
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh, mesh_of
from pretrain.parallel.routing_stats import aux_losses, expert_load, reset_routing_stats, selection_bias
from tests.helpers.configs import MOE, make_config
from tests.helpers.layouts import CPU, engine_of, microbatches, single_process

S, B, D, E = 10, 3, 32, 8

SOFTMAX: dict[str, Any] = {"score_function": "softmax", "normalize_top_k": True}
SOFTMAX_OVER_ALL: dict[str, Any] = {"score_function": "softmax", "normalize_top_k": False}
SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "normalize_top_k": True}
PLAIN_SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "normalize_top_k": False}
GROUPS = {"num_groups": 4, "group_top_k": 2}
BIAS = {"bias_update_rate": 1e-2}

KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "softmax": (SOFTMAX, 3),
    "softmax, scaled": (SOFTMAX | {"scaling_factor": 2.5}, 2),
    "softmax, groups": (SOFTMAX | GROUPS, 4),
    "softmax over all": (SOFTMAX_OVER_ALL, 3),
    "softmax over all, one": (SOFTMAX_OVER_ALL, 1),
    "softmax over all, groups": (SOFTMAX_OVER_ALL | GROUPS, 2),
    "sigmoid": (SIGMOID, 3),
    "sigmoid, one": (SIGMOID, 1),
    "sigmoid, all": (SIGMOID, E),
    "sigmoid, bias, scaled": (SIGMOID | BIAS | {"scaling_factor": 2.5}, 3),
    "sigmoid, bias, groups": (SIGMOID | BIAS | GROUPS, 4),
    "plain sigmoid": (PLAIN_SIGMOID, 3),
    "plain sigmoid, one": (PLAIN_SIGMOID, 1),
    "plain sigmoid, bias, groups, scaled": (PLAIN_SIGMOID | BIAS | GROUPS | {"scaling_factor": 1.5}, 4),
}


@pytest.fixture(autouse=True, scope="module")
def world_of_one() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with mesh_of(ParallelConfig(), CPU) as mesh:
        yield mesh


def config_of(router: dict[str, Any], top_k: int = 2, **keys: Any) -> Config:
    changes = {"model.num_layers": 1, "model.hidden_size": D, "model.num_experts": E, "model.top_k": top_k}
    config = make_config(MOE, {**changes, "model.router": router, **keys})
    assert check(config, 1) == []
    return config


def router_of(config: Config, mesh: Mesh) -> CountingRouter:
    """The router of a one-layer model, with random weights and, where there is one, random selection bias."""
    (chunk,) = build_chunks(
        config.model,
        parallel=config.parallel,
        precision=config.run.precision,
        sequence_length=config.batch.sequence_length,
        groups=mesh.groups,
    )
    router = chunk.decoder.layers[0].mlp.router
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=generator) / 4)
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.randn(E, generator=generator) / 4)
    # What the schedule sets before a backward pass over one micro-batch.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    return router


def random_input(seed: int = 1) -> torch.Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(seed))


def route_by_definition(
    logits: torch.Tensor, router: RouterConfig, top_k: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> combine weights [T, E], choice [T, E], one token after the other."""
    weights, choices = [], []
    for token in logits:
        score = token.softmax(0) if router.score_function == "softmax" else token.sigmoid()
        # Softmax over the chosen ranks experts, and groups, by logit.
        rank = token if (router.score_function, router.normalize_top_k) == ("softmax", True) else score
        rank = (rank if bias is None else rank + bias).tolist()
        allowed = range(E)
        if router.num_groups:
            size, per_group = E // router.num_groups, top_k // router.group_top_k
            groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
            by_worth = sorted(
                groups, key=lambda group: -sum(sorted((rank[e] for e in group), reverse=True)[:per_group])
            )
            allowed = [e for group in by_worth[: router.group_top_k] for e in group]
        chosen = sorted(allowed, key=lambda e: -rank[e])[:top_k]
        choice = torch.zeros(E, dtype=torch.bool)
        choice[chosen] = True
        weight = torch.where(choice, score, 0.0)
        if router.normalize_top_k and (router.score_function == "softmax" or top_k > 1):
            weight = weight / weight.sum()
        weights.append(weight * router.scaling_factor)
        choices.append(choice)
    return torch.stack(weights), torch.stack(choices)


def errors_of(kind: str, mesh: Mesh, **wrong: Any) -> list[float]:
    """Largest error of combine weights, input gradient and weight gradient, over their largest entry.

    `wrong` changes the definition they are compared with.
    """
    keys, top_k = KINDS[kind]
    config = config_of(keys, top_k)
    router = router_of(config, mesh)
    x = random_input().requires_grad_()
    probs, choice = router(x)
    grad = torch.randn(probs.shape, generator=torch.Generator().manual_seed(2))
    probs.backward(grad)
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, router.weight))
    bias = None if router.expert_bias is None else router.expert_bias.double()
    definition = config.model.router.model_copy(update=wrong)
    expected, expected_choice = route_by_definition((x64 @ weight64.T).view(-1, E), definition, top_k, bias)
    expected.backward(grad.double())
    if not wrong:
        assert torch.equal(choice, expected_choice)
    pairs = [(probs, expected), (x.grad, x64.grad), (router.weight.grad, weight64.grad)]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_router_is_its_definition(kind: str, mesh: Mesh) -> None:
    # fp32 against fp64; logits are sums of 32 products.
    assert max(errors_of(kind, mesh)) < 3e-6


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("softmax", {"normalize_top_k": False}),
        ("softmax over all", {"normalize_top_k": True}),
        ("sigmoid", {"normalize_top_k": False}),
        ("plain sigmoid", {"normalize_top_k": True}),
        ("sigmoid", {"score_function": "softmax"}),
        ("sigmoid, bias, scaled", {"scaling_factor": 1.0}),
        ("sigmoid, bias, groups", {"num_groups": 0}),
    ],
)
def test_another_definition_is_noticed(kind: str, wrong: dict[str, Any], mesh: Mesh) -> None:
    assert min(errors_of(kind, mesh, **wrong)) > 1e-2


def test_selection_bias_chooses_but_does_not_weigh(mesh: Mesh) -> None:
    router = router_of(config_of(PLAIN_SIGMOID | BIAS, 2), mesh)
    router.expert_bias[5] = 10.0
    probs, choice = router(random_input())
    assert choice[:, 5].all()
    assert probs.max() <= 1


# ----- bf16


def test_bf16_routes_in_fp32(mesh: Mesh) -> None:
    router = router_of(config_of(SIGMOID, 3, **{"run.precision": "bf16"}), mesh)
    x = random_input().bfloat16()
    assert router.weight.dtype == torch.bfloat16
    probs, choice = router(x)
    assert probs.dtype == torch.float32
    logits = (x.double() @ router.weight.double().T).view(-1, E)
    expected, expected_choice = route_by_definition(logits, RouterConfig(**SIGMOID), 3, None)
    assert torch.equal(choice, expected_choice)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-6)
    rounded, _ = route_by_definition((x @ router.weight.T).double().view(-1, E), RouterConfig(**SIGMOID), 3, None)
    assert (rounded - expected).abs().max() > 1e-4


def test_bf16_counts_beyond_256(mesh: Mesh) -> None:
    router = router_of(config_of(SIGMOID | BIAS, 1), mesh).bfloat16()
    assert router.weight.dtype == torch.bfloat16
    router.expert_bias[3] = 10.0
    for tokens in (300, 1):
        router(torch.ones(tokens, 1, D, dtype=torch.bfloat16))
    assert router.load.tolist() == router.local_tokens_per_expert.tolist() == [0, 0, 0, 301, 0, 0, 0, 0]
    # What megatron-core's buffer would make of it.
    assert float(torch.tensor(300.0, dtype=torch.bfloat16) + 1) != 301


# ----- auxiliary losses


def balancing_loss(
    logits: torch.Tensor, score_function: str, top_k: int, load: torch.Tensor | None = None
) -> torch.Tensor:
    """E * sum_i f_i P_i over the tokens [T, E] (Switch Transformer, equation 4); f is from `load` where it is given."""
    if score_function == "softmax":
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    if load is None:
        load = torch.bincount(scores.topk(top_k, dim=-1).indices.flatten(), minlength=E)
    return E * (load / load.sum() * scores.mean(0)).sum()


def expected_loss(name: str, logits: torch.Tensor, score_function: str, top_k: int) -> torch.Tensor:
    """A loss without its coefficient, for logits [S, B, E]."""
    if name == "z_loss":
        return logits.exp().sum(-1).log().square().mean()
    if name == "sequence_aux_loss":
        per_sequence = [balancing_loss(one, score_function, top_k) for one in logits.unbind(1)]
        return torch.stack(per_sequence).mean()
    return balancing_loss(logits.flatten(0, 1), score_function, top_k)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, PLAIN_SIGMOID], ids=["softmax", "sigmoid", "plain sigmoid"])
@pytest.mark.parametrize("losses", [["aux_loss"], ["sequence_aux_loss"], ["global_aux_loss"], ["z_loss"], None])
def test_gradient_of_auxiliary_losses(kind: dict[str, Any], losses: list[str] | None, mesh: Mesh) -> None:
    names = losses or ["aux_loss", "sequence_aux_loss", "global_aux_loss", "z_loss"]
    coefficients = {name: 0.5 + index for index, name in enumerate(names)}
    router = router_of(config_of(kind | coefficients, 3), mesh)
    x = random_input()
    probs, _ = router(x)
    # The language model's own gradient is zero: what is left is that of the losses.
    probs.backward(torch.zeros_like(probs))
    weight = router.weight.detach().double().requires_grad_()
    logits = x.double() @ weight.T
    total = sum(value * expected_loss(name, logits, kind["score_function"], 3) for name, value in coefficients.items())
    total.backward()
    assert weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_global_loss_uses_the_load_of_the_microbatches_so_far(mesh: Mesh) -> None:
    router = router_of(config_of(SOFTMAX | {"global_aux_loss": 1.0}, 3), mesh)
    loads = []
    for seed in (1, 2):
        router.weight.grad = None
        probs, choice = router(random_input(seed))
        loads.append(choice.sum(0))
        probs.backward(torch.zeros_like(probs))
    weight = router.weight.detach().double().requires_grad_()
    logits = (random_input(2).double() @ weight.T).view(-1, E)
    (of_both,) = torch.autograd.grad(
        balancing_loss(logits, "softmax", 3, loads[0] + loads[1]), weight, retain_graph=True
    )
    (of_second,) = torch.autograd.grad(balancing_loss(logits, "softmax", 3, loads[1]), weight)
    torch.testing.assert_close(router.weight.grad.double(), of_both, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(router.weight.grad.double(), of_second, rtol=1e-2)


def test_no_auxiliary_loss_without_a_coefficient(mesh: Mesh) -> None:
    router = router_of(config_of(SOFTMAX), mesh)
    probs, _ = router(random_input())
    probs.backward(torch.zeros_like(probs))
    assert not router.weight.grad.any()


# ----- in training


TRAINED: dict[str, Any] = {
    "model.num_layers": 3,
    "model.first_dense_layers": 1,
    "model.ffn_size": 48,
    "model.init_std": 0.1,
    "batch.sequence_length": 16,
    "batch.micro_batch_size": 2,
}


def training_config(router: dict[str, Any], **keys: Any) -> Config:
    return make_config(MOE, {**TRAINED, "model.router": router, **keys})


def step(engine: Engine, config: Config) -> None:
    reset_routing_stats(engine)
    engine.forward_backward(microbatches(config, engine.mesh, 0))


def routers(engine: Engine) -> list[CountingRouter]:
    return [module for module in engine.chunks[0].modules() if isinstance(module, CountingRouter)]


def test_logged_losses_are_means_over_microbatches_and_layers() -> None:
    names = ["aux_loss", "sequence_aux_loss", "z_loss"]
    config = training_config(SOFTMAX | dict.fromkeys(names, 1e-2))
    seen: list[torch.Tensor] = []
    with engine_of(config) as engine:
        for router in routers(engine):
            gating = router.gating
            router.gating = lambda x, gating=gating: seen.append(gating(x).detach()) or gating(x)
        step(engine, config)
        logged = aux_losses(engine, config.model)
    assert len(seen) == 2 * engine.microbatches
    for name in names:
        expected = torch.stack([expected_loss(name, logits.double(), "softmax", 2) for logits in seen]).mean()
        assert logged[name] == pytest.approx(float(expected), rel=1e-5)
    assert logged["aux_loss"] != pytest.approx(logged["sequence_aux_loss"], rel=1e-3)


def count_everything(router: CountingRouter, routing_map: torch.Tensor, padding_mask: object = None) -> None:
    """As `_apply_expert_bias` would count without regard to evaluation and recomputation."""
    router.load += routing_map.sum(dim=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_load_counts_every_token_once(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_config(SIGMOID | BIAS, **{"parallel.recompute": recompute})
    passes: dict[int, list[torch.Tensor]] = {}
    with engine_of(config) as engine:
        for layer, router in enumerate(routers(engine)):
            router.register_forward_hook(
                lambda _module, _args, out, layer=layer: passes.setdefault(layer, []).append(out[1].sum(0))
            )
        step(engine, config)
        load = expert_load(engine, config.model)
        tokens = config.batch.tokens_per_step
        assert load.sum(dim=1).tolist() == [tokens * config.model.top_k] * 2
        again = 1 if recompute == "none" else 2
        for layer, counts in passes.items():
            assert len(counts) == again * engine.microbatches
            assert torch.equal(torch.stack(counts).sum(0), again * load[layer])
        engine.evaluate(microbatches(config, engine.mesh, 1), engine.microbatches)
        assert torch.equal(expert_load(engine, config.model), load)
        # Counting regardless goes wrong where there is recomputation, and in evaluation.
        monkeypatch.setattr(CountingRouter, "_apply_expert_bias", count_everything)
        engine.evaluate(microbatches(config, engine.mesh, 1), engine.microbatches)
        assert torch.equal(expert_load(engine, config.model).sum(dim=1), 2 * load.sum(dim=1))


def test_bias_takes_one_step_towards_the_mean_load() -> None:
    config = training_config(SIGMOID | BIAS)
    with engine_of(config) as engine:
        step(engine, config)
        load = expert_load(engine, config.model)
        bias = selection_bias(engine, config.model)
        # No trace left for the next step.
        assert not any(router.local_tokens_per_expert.any() for router in routers(engine))
        engine.evaluate(microbatches(config, engine.mesh, 1), engine.microbatches)
        assert torch.equal(selection_bias(engine, config.model), bias)
    mean = config.batch.tokens_per_step * config.model.top_k / config.model.num_experts
    torch.testing.assert_close(bias, 1e-2 * torch.sign(mean - load), rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.0, 2e-2])
def test_bias_evens_the_load(rate: float) -> None:
    config = training_config(SIGMOID | {"bias_update_rate": rate})
    with engine_of(config) as engine:
        loads = []
        for _ in range(12):
            step(engine, config)
            loads.append(expert_load(engine, config.model).float())
    unevenness = [float(load.std() / load.mean()) for load in loads]
    if rate:
        assert unevenness[-1] < unevenness[0] / 2
    else:
        assert unevenness[-1] == unevenness[0] > 0.3


def test_routers_without_bias_have_none() -> None:
    config = training_config(SOFTMAX)
    with engine_of(config) as engine:
        assert selection_bias(engine, config.model) is None
        assert isinstance(routers(engine)[0], TopKRouter)
        assert aux_losses(engine, config.model) == {}
