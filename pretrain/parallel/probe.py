"""Passes over a batch that ask for gradients at other weights and leave nothing else behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pretrain.model.router import CountingRouter
from pretrain.parallel.engine import Batch, Engine
from pretrain.parallel.routing_stats import copy_selection_biases, reset_routing_stats, restore_selection_biases

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def probe_passes(engine: Engine, batch: Sequence[Batch]) -> Iterator[Callable[[], None]]:
    """A function that makes a pass over a global batch and leaves its gradients, for the time of a `with` block.

    Every call after the first gives each token the experts of the first: a token that changes experts makes the
    gradient jump, and a difference over a small distance would show little else. (Balancing losses count tokens by a
    choice of their own, which is made anew; on a small model that moved such a difference by 1 to 2 %.) Selection
    biases stay as they are, and loads and losses of the routers are forgotten. The function is collective.

    batch: this rank's micro-batches.
    """
    routers = [m for chunk in engine.chunks for m in chunk.modules() if isinstance(m, CountingRouter)]
    choices = {router: _Choices() for router in routers}
    biases = copy_selection_biases(engine)
    # megatron-core's record of their losses may still have the size of another model.
    reset_routing_stats(engine)

    def backward() -> None:
        engine.forward_backward(iter(batch))
        restore_selection_biases(engine, biases)
        reset_routing_stats(engine)
        for choice in choices.values():
            choice.begin_again()

    for router, choice in choices.items():
        router.router_replay = choice
    try:
        yield backward
    finally:
        for router in choices:
            router.router_replay = None


class _Choices:
    """The experts that one router chose in a pass, call by call; every later pass makes the same calls.

    Stands in for megatron-core's RouterReplay, which keeps one call only and itself in a list for ever.
    """

    def __init__(self) -> None:
        self._made: list[torch.Tensor] = []
        self._next: deque[torch.Tensor] | None = None

    def begin_again(self) -> None:
        """A pass is over: the next one repeats its choices."""
        assert not self._next, "a pass with fewer choices than the first"
        self._next = deque(self._made)

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: TopK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """megatron-core's hook: scores [T, E] -> those of the chosen experts, and which they are, both [T, K]."""
        if self._next is None:
            values, chosen = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
            # As they are many: megatron-core has them as int64.
            self._made.append(chosen.to(torch.int16))
            return values, chosen
        chosen = self._next.popleft().long()
        return scores.gather(1, chosen), chosen
