"""Balance figures against torch's own entropy and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from pretrain.metrics import moe
from pretrain.metrics.moe import BalanceWindow, balance_figures

EVEN = torch.full((2, 4), 5)
SKEWED = torch.tensor([[8, 0, 0, 0], [4, 2, 1, 1]])  # means 2 and 2


def test_even_load_is_perfect_and_a_single_expert_the_worst():
    even = balance_figures(EVEN)
    assert even["max_violation"] == [0, 0]
    assert even["entropy"] == [1, 1]
    assert even["load_cv"] == [0, 0]
    skewed = balance_figures(SKEWED)
    assert skewed["max_violation"] == [3, 1]  # 8/2 - 1 = E - 1, 4/2 - 1
    assert skewed["entropy"] == [0, pytest.approx(1.75 / 2)]  # 1/2 + 2/4 + 3/8 + 3/8 bits of 2
    assert skewed["load_cv"] == pytest.approx([math.sqrt(3), math.sqrt(1.5) / 2], abs=1e-4)
    assert skewed["load"] == [[4, 0, 0, 0], [2, 1, 0.5, 0.5]]
    assert skewed["max_violation_mean"] == 2
    assert skewed["max_violation_max"] == 3
    assert skewed["entropy_min"] == 0
    assert skewed["entropy_mean"] == pytest.approx(0.4375)


def test_entropy_equals_torch():
    counts = torch.randint(0, 1000, (6, 64), generator=torch.Generator().manual_seed(0))
    ours = moe.entropy(moe.load(counts))
    theirs = torch.distributions.Categorical(probs=counts.double()).entropy() / math.log(64)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)
    assert np.abs(ours - theirs.flip(0).numpy()).max() > 1e-4  # the order of layers matters


def test_numpy_and_torch_counts_give_the_same_figures():
    assert balance_figures(SKEWED) == balance_figures(SKEWED.numpy())


def test_odd_shapes():
    assert balance_figures(torch.tensor([[7]]))["entropy"] == [1]
    assert math.isnan(balance_figures(torch.zeros(1, 4, dtype=torch.int64))["max_violation"][0])


def test_large_models_do_not_write_the_load_of_each_expert():
    edge = moe.MAX_LOAD_ENTRIES // 8
    assert "load" in balance_figures(torch.ones(8, edge))
    figures = balance_figures(torch.ones(8, edge + 1))
    assert "load" not in figures
    assert sum(len(value) if isinstance(value, list) else 1 for value in figures.values()) == 3 * 8 + 5


def test_dead_experts_have_no_token_in_the_whole_window():
    window = BalanceWindow(rows=2)
    assert window.add(np.array([[4, 0, 4]]))["dead_experts"] == [1]
    assert window.add(np.array([[0, 8, 0]]))["dead_experts"] == [0]  # all had tokens in the last two rows
    assert window.add(np.array([[0, 8, 0]]))["dead_experts"] == [2]  # the first row has left the window
    assert window.add(np.array([[1, 7, 0]]))["dead_experts_total"] == 1


def test_window_keeps_its_own_copy():
    counts = torch.tensor([[1, 1]])
    window = BalanceWindow(rows=2)
    window.add(counts)
    counts[:] = torch.tensor([[0, 5]])
    assert window.add(counts)["dead_experts_total"] == 0


def test_growth_starts_a_new_window():
    window = BalanceWindow(rows=10)
    window.add(torch.tensor([[1, 1]]))
    assert window.add(torch.tensor([[1, 1], [0, 2]]))["dead_experts"] == [0, 1]
    assert window.add(torch.tensor([[1, 1, 0, 0], [0, 2, 0, 0]]))["dead_experts"] == [2, 3]


def test_bias_spread():
    window = BalanceWindow()
    assert "bias_spread" not in window.add(EVEN)
    figures = window.add(EVEN, bias=torch.tensor([[-0.5, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert figures["bias_spread"] == [0.75, 0]
    assert figures["bias_spread_max"] == 0.75
