"""The parallel layout changes nothing: every layout trains as one process does, from the same initial weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from pretrain.config.schema import Config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Outcome, assemble, double_expert_gradients, engine_of, train, train_alone
from tests.helpers.replicas import differing_replicas
from tests.parallel.cases import LAYOUTS, PAIRS, STEPS, alone, configuration, outcome

# Layouts add the same fp32 numbers up in other orders, each addition off by up to 6e-8 of its result. Measured over
# the table, and allowed several times over: losses differ by 2e-7 of their value, gradients of the first step by
# 1.6e-6 of their tensor's largest entry, weights after the last (norm gains are near 1) by 3.8e-7, and gradient norms
# by 1.5e-6, most of it by the third step, from weights that differ already.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1.5e-6


def check_equal(config: Config, actual: list[Outcome], expected: Outcome) -> None:
    """AssertionError unless the ranks' outcome is that of the single process, up to rounding."""
    for rank in actual:
        assert rank.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=NORM_TOLERANCE)
        assert rank.eval_loss == pytest.approx(expected.eval_loss, rel=LOSS_TOLERANCE)
        # Counts, and the bias that follows their signs: the same experts for every token.
        assert rank.loads == expected.loads
        assert rank.biases == expected.biases
        for mine, theirs in zip(rank.aux_losses, expected.aux_losses, strict=True):
            assert mine == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    expected_gradients = assemble(config.model, [expected.gradients])
    gradients = assemble(config.model, [rank.gradients for rank in actual])
    assert gradients.keys() == expected_gradients.keys()
    for key, theirs in expected_gradients.items():
        largest = theirs.abs().max()
        assert largest > 0, key
        assert (gradients[key] - theirs).abs().max() <= GRADIENT_TOLERANCE * largest, f"gradient of {key}"
    expected_weights = assemble(config.model, [expected.weights])
    weights = assemble(config.model, [rank.weights for rank in actual])
    assert weights.keys() == expected_weights.keys()
    for key, theirs in expected_weights.items():
        assert (weights[key] - theirs).abs().max() <= WEIGHT_TOLERANCE, key


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_layout_trains_as_one_process(layout: str, kind: str) -> None:
    check_equal(configuration(layout, kind), outcome(layout, kind), alone(kind))


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_copies_of_a_weight_stay_bit_equal(layout: str, kind: str) -> None:
    ranks = outcome(layout, kind)
    assert [rank.differing for rank in ranks] == [[]] * LAYOUTS[layout][0]
    for rank in ranks:
        assert (rank.losses, rank.grad_norms, rank.eval_loss) == (
            ranks[0].losses,
            ranks[0].grad_norms,
            ranks[0].eval_loss,
        )


def test_three_steps_move_every_weight_far_beyond_the_tolerance() -> None:
    config = configuration("single", "sigmoid")
    start = assemble(config.model, [train_alone(config, 0).weights])
    end = assemble(config.model, [alone("sigmoid").weights])
    moved = {key: float((end[key] - start[key]).abs().max()) for key in start}
    assert min(moved.values()) > 100 * WEIGHT_TOLERANCE, min(moved, key=lambda key: moved[key])


# ----- what the checks above are worth


@dataclass(frozen=True)
class Broken:
    """What one of two ranks saw of runs that are broken on purpose."""

    wrongly_scaled: Outcome
    """Experts' gradients doubled, as if they were averaged over half the ranks."""
    differing_before: list[str]
    differing_after: list[str]
    """`differing_replicas` once a router's entry on the last rank has become the next larger number."""


def break_things() -> Broken:
    scaled = train(configuration("EP2", "sigmoid"), STEPS, double_expert_gradients)
    with engine_of(configuration("DP2", "softmax")) as engine:
        before = differing_replicas(engine.shards)
        shard = next(shard for shard in engine.shards if shard.logical.kind == "router")
        if engine.mesh.rank == engine.mesh.world_size - 1:
            entry = shard.tensor.detach().view(-1)[:1]
            entry.copy_(torch.nextafter(entry, torch.tensor(1.0)))
        return Broken(scaled, before, differing_replicas(engine.shards))


@functools.cache
def broken() -> list[Broken]:
    return run_ranks(break_things, 2)


def test_wrongly_scaled_expert_gradients_are_noticed() -> None:
    config, ranks = configuration("EP2", "sigmoid"), [rank.wrongly_scaled for rank in broken()]
    with pytest.raises(AssertionError):
        check_equal(config, ranks, alone("sigmoid"))
    key = "decoder.layers.2.mlp.experts.linear_fc1.weight"
    expected = assemble(config.model, [alone("sigmoid").gradients])[key]
    actual = assemble(config.model, [rank.gradients for rank in ranks])[key]
    torch.testing.assert_close(actual, 2 * expected, rtol=1e-4, atol=1e-6)


def test_one_bit_of_one_copy_is_noticed() -> None:
    for rank in broken():
        assert rank.differing_before == []
        assert rank.differing_after == ["decoder.layers.0.mlp.router.weight"]
