"""The closed-form order: permutations are permutations and look random; blends are as even as promised."""

from __future__ import annotations

from collections import Counter
from math import ceil, log2

import numpy as np
import pytest

from pretrain.data.order import BlendOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4096, 5001])
def test_permute_is_a_permutation(size: int) -> None:
    for key in ((0, 0, 0), (1, 2, 3)):
        assert sorted(permute(index, size, key=key) for index in range(size)) == list(range(size))


def test_permute_depends_on_every_part_of_the_key() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (10, 1, 1), (1, 0, 11)]
    orders = {tuple(permute(index, 500, key=key) for index in range(500)) for key in keys}
    assert len(orders) == len(keys)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


def test_permute_looks_uniform() -> None:
    """Over many keys, each index goes everywhere, and neighbours part in every direction; a rotation does the first
    but not the second."""
    size, keys = 23, 4000
    # 99.9 % quantile of chi-square with 22 degrees of freedom is 48.3 (any table); the draws are fixed.
    limit = 48.3
    shifts = np.random.default_rng(0).integers(size, size=keys)

    def statistics(image) -> list[float]:
        first = np.array([[image(0, key), image(1, key), image(size - 1, key)] for key in range(keys)])
        steps = (first[:, 1] - first[:, 0]) % size
        where = [chi_square(np.bincount(column, minlength=size)) for column in first.T]
        # A step is never 0; over the others it is uniform.
        return [*where, chi_square(np.bincount(steps, minlength=size)[1:])]

    assert max(statistics(lambda index, key: permute(index, size, key=(key, 0, 0)))) < limit
    rotation = statistics(lambda index, key: (index + shifts[key]) % size)
    assert max(rotation[:3]) < limit < rotation[3]


def test_permute_is_unrelated_to_the_file_order() -> None:
    order = np.array([permute(index, 2000, key=(0, 0, 0)) for index in range(2000)])
    # Rank correlation of 2000 random values has a standard deviation of 1/sqrt(1999) = 0.022.
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.09
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.09


BLENDS = [[1.0], [1, 1], [0.7, 0.3], [0.1, 0.2, 0.7], [5, 1, 1, 1e-3, 3], list(range(1, 14)), [1e-9, 1], [1 / 3] * 3]


def largest_error(sources: list[int], weights: list[float]) -> float:
    """Largest distance, over all prefixes and sources, of a source's count from its exact share."""
    picked = np.cumsum(np.eye(len(weights))[sources], axis=0)
    share = np.array(weights) / np.sum(weights)
    return float(np.abs(picked - np.arange(1, len(sources) + 1)[:, None] * share).max())


@pytest.mark.parametrize("weights", BLENDS)
def test_every_prefix_of_a_blend_is_close_to_its_weights(weights: list[float]) -> None:
    order = BlendOrder(weights)
    places = [order.locate(position) for position in range(3000)]
    # Each source counts up from 0 without gaps.
    drawn: Counter[int] = Counter()
    for source, index in places:
        assert index == drawn[source]
        drawn[source] += 1
    bound = ceil(log2(len(weights))) / 2 if len(weights) > 1 else 0
    assert largest_error([source for source, _ in places], weights) <= bound + 1e-9
    for positions in (0, 1, 7, 3000):
        tally = Counter(source for source, _ in places[:positions])
        assert order.counts(positions) == [tally[source] for source in range(len(weights))]


def test_a_random_draw_is_not_that_close() -> None:
    weights = [0.1, 0.2, 0.7]
    random = np.random.default_rng(0).choice(3, p=weights, size=3000)
    assert largest_error(random.tolist(), weights) > 5


def test_blend_is_exact_at_large_positions() -> None:
    order = BlendOrder([0.3, 0.7, 1e-6])
    far = 10**15
    before, after = order.counts(far), order.counts(far + 1)
    assert sum(before) == far
    source, index = order.locate(far)
    assert index == before[source]
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(number == source) for number in range(3)]
    for count, weight in zip(before, [0.3, 0.7, 1e-6], strict=True):
        assert abs(count - far * weight / 1.000001) <= 2
