"""How evenly the routers load their experts, from the tokens each expert got.

Letters: L MoE layers, E experts. Counts are int64 [L, E]: (token, expert) assignments of the global batch.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Entries up to which the load of every expert goes into a row (about 6 bytes each); larger models log per layer only.
MAX_LOAD_ENTRIES = 1024
# Logged steps without a token after which an expert counts as dead.
WINDOW_ROWS = 50

Array = NDArray[np.float64]


def load(counts: torch.Tensor | NDArray[Any]) -> Array:
    """[L, E] tokens of each expert over the mean of its layer: 1 is an even load. NaN for a layer without tokens."""
    tokens = np.asarray(counts, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return tokens / tokens.mean(axis=1, keepdims=True)


def max_violation(load: Array) -> Array:
    """[L] load of the fullest expert minus 1: 0 is even, E - 1 a single expert (MaxVio of Wang et al. 2024,
    arXiv 2408.15664, equation 4)."""
    return load.max(axis=1) - 1


def entropy(load: Array) -> Array:
    """[L] entropy of the load over log E: 1 is even, 0 a single expert; 1 when there is but one."""
    experts = load.shape[1]
    if experts == 1:
        return np.ones(len(load))
    share = load / experts
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=1) / np.log(experts)


def variation(load: Array) -> Array:
    """[L] coefficient of variation of the load: standard deviation over mean."""
    return load.std(axis=1)


def balance_figures(counts: torch.Tensor | NDArray[Any]) -> dict[str, Any]:
    """Figures of one step: lists of length L for `max_violation`, `entropy` and `load_cv`, with their means and
    extremes over layers as `max_violation_mean`, `max_violation_max`, `entropy_mean`, `entropy_min`,
    `load_cv_mean`; and `load`, the [L, E] load of every expert, when that has at most MAX_LOAD_ENTRIES entries."""
    relative = load(counts)
    violation, evenness, cv = max_violation(relative), entropy(relative), variation(relative)
    figures: dict[str, Any] = {
        "max_violation_mean": float(violation.mean()),
        "max_violation_max": float(violation.max()),
        "entropy_mean": float(evenness.mean()),
        "entropy_min": float(evenness.min()),
        "load_cv_mean": float(cv.mean()),
        "max_violation": violation.round(4).tolist(),
        "entropy": evenness.round(4).tolist(),
        "load_cv": cv.round(4).tolist(),
    }
    if relative.size <= MAX_LOAD_ENTRIES:
        figures["load"] = relative.round(3).tolist()
    return figures


class BalanceWindow:
    """Balance figures of each logged step, with dead experts: those without a token in the last `rows` of them."""

    def __init__(self, rows: int = WINDOW_ROWS) -> None:
        self._rows = rows
        self._counts: deque[NDArray[np.int64]] = deque()
        self._sum = np.zeros((0, 0), dtype=np.int64)

    def add(
        self, counts: torch.Tensor | NDArray[Any], *, bias: torch.Tensor | NDArray[Any] | None = None
    ) -> dict[str, Any]:
        """`balance_figures` of `counts` [L, E] together with `dead_experts` [L] and `dead_experts_total` and, for
        selection biases [L, E], `bias_spread` [L] (largest minus smallest bias) and `bias_spread_max`.

        A model that has grown (another L or E) starts a new window.
        """
        latest = np.array(counts, dtype=np.int64)  # a copy: the caller may count on in the same tensor
        if self._sum.shape != latest.shape:
            self._counts.clear()
            self._sum = np.zeros_like(latest)
        self._counts.append(latest)
        self._sum += latest
        if len(self._counts) > self._rows:
            self._sum -= self._counts.popleft()
        dead = (self._sum == 0).sum(axis=1)
        figures = balance_figures(latest)
        figures |= {"dead_experts_total": int(dead.sum()), "dead_experts": dead.tolist()}
        if bias is not None:
            spread = np.ptp(np.asarray(bias, dtype=np.float64), axis=1)
            figures |= {"bias_spread_max": float(spread.max()), "bias_spread": spread.round(6).tolist()}
        return figures
