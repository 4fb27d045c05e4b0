"""The parallel layout changes nothing: every layout trains as one process does, from the same initial weights."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.parallel.replicas import differing_replicas
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Outcome, assemble, double_expert_gradients, engine_of, train
from tests.parallel.cases import LAYOUTS, PAIRS, STEPS, configuration, outcome

# Layouts add the same fp32 numbers up in other orders, each addition off by up to 6e-8 of its result. Measured over
# the table, and allowed several times over: losses differ by 2e-7 of their value, gradients of the first step by
# 1.3e-6 of their tensor's largest entry, weights after the last (norm gains are near 1) by 2.6e-7, and gradient norms
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
        assert rank.loads == expected.loads
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
    check_equal(configuration(layout, kind), outcome(layout, kind), outcome("single", kind)[0])


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
    start = assemble(config.model, [run_ranks(train, 1, config, 0)[0].weights])
    end = assemble(config.model, [outcome("single", "sigmoid")[0].weights])
    moved = {key: float((end[key] - start[key]).abs().max()) for key in start}
    assert min(moved.values()) > 100 * WEIGHT_TOLERANCE, min(moved, key=lambda key: moved[key])


def test_wrongly_scaled_expert_gradients_are_noticed() -> None:
    config = configuration("EP2", "sigmoid")
    broken = run_ranks(train, 2, config, STEPS, double_expert_gradients)
    with pytest.raises(AssertionError):
        check_equal(config, broken, outcome("single", "sigmoid")[0])
    expected = assemble(config.model, [outcome("single", "sigmoid")[0].gradients])
    gradients = assemble(config.model, [rank.gradients for rank in broken])
    key = "decoder.layers.2.mlp.experts.linear_fc1.weight"
    torch.testing.assert_close(gradients[key], 2 * expected[key], rtol=1e-4, atol=1e-6)


def flip_a_bit_of_a_copy(config: Config) -> tuple[list[str], list[str]]:
    """`differing_replicas` before and after one entry on the last rank becomes the next larger number."""
    with engine_of(config) as engine:
        before = differing_replicas(engine.shards)
        shard = next(shard for shard in engine.shards if shard.logical.kind == "router")
        if engine.mesh.rank == engine.mesh.world_size - 1:
            entry = shard.tensor.detach().view(-1)[:1]
            entry.copy_(torch.nextafter(entry, torch.tensor(1.0)))
        return before, differing_replicas(engine.shards)


def test_one_bit_of_one_copy_is_noticed() -> None:
    ranks = run_ranks(flip_a_bit_of_a_copy, 2, configuration("DP2", "softmax"))
    assert ranks == [([], ["decoder.layers.0.mlp.router.weight"])] * 2
