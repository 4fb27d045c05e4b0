"""The one global order of samples, in closed form.

Which sample comes i-th depends on the seed, the sources and their weights, and on nothing else: not on the number of
ranks, the batch sizes or the training budget. Nothing is stored or built, so any position can be reached at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm

# Four rounds make a Feistel network a strong pseudo-random permutation for large domains (Luby and Rackoff, 1988);
# NIST SP 800-38G uses 10 for domains as small as ours can be.
_ROUNDS = 10


def permute(index: int, size: int, *, key: Sequence[int]) -> int:
    """Where `index` goes in the pseudo-random permutation of range(size) that `key` names.

    A keyed Feistel network over the next even number of bits, walked along its cycle until it lands in range (fewer
    than four steps on average).
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    secret = ",".join(map(str, key)).encode()
    value = index
    while True:
        left, right = value >> half, value & mask
        for number in range(_ROUNDS):
            message = right.to_bytes(8, "little") + bytes([number])
            mixed = hashlib.blake2b(message, digest_size=8, key=secret).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        value = left << half | right
        if value < size:
            return value


class BlendOrder:
    """Deals the positions 0, 1, 2, ... to sources in proportion to their weights, as evenly as possible.

    The sources are the leaves of a balanced binary tree. At each node, of the first n positions that arrive, the left
    half gets n times its share of the weight, rounded. After any number of positions, every source is therefore within
    ceil(log2(sources)) / 2 of its exact share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(weight) for weight in weights]
        common = lcm(*(fraction.denominator for fraction in fractions))
        # Weight of the sources before each one, as integers: rounding must be exact at positions of any size.
        self._before = [0, *accumulate(int(fraction * common) for fraction in fractions)]

    def __len__(self) -> int:
        return len(self._before) - 1

    def locate(self, position: int) -> tuple[int, int]:
        """The source of a position, and how many earlier positions that source has had."""
        first, last = 0, len(self)
        while last - first > 1:
            middle = (first + last) // 2
            left = self._left_share(position, first, middle, last)
            if self._left_share(position + 1, first, middle, last) > left:
                last, position = middle, left
            else:
                first, position = middle, position - left
        return first, position

    def counts(self, positions: int) -> list[int]:
        """How many of the first `positions` positions each source gets."""

        def split(first: int, last: int, count: int) -> list[int]:
            if last - first == 1:
                return [count]
            middle = (first + last) // 2
            left = self._left_share(count, first, middle, last)
            return split(first, middle, left) + split(middle, last, count - left)

        return split(0, len(self), positions)

    def _left_share(self, count: int, first: int, middle: int, last: int) -> int:
        """Of `count` positions for the sources [first, last), how many go to [first, middle): rounded half up."""
        left = self._before[middle] - self._before[first]
        total = self._before[last] - self._before[first]
        return (2 * count * left + total) // (2 * total)
