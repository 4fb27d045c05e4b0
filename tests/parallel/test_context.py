"""The part of context parallelism that is ours: cutting sequences and averaging losses. Attention over the cut
sequences is Transformer Engine's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import run_ranks

SEQUENCE = 16


def _losses_of_both_ranks() -> tuple[float, float, list[int]]:
    from pretrain.platform import cpu_adapter

    cpu_adapter.apply()
    from pretrain.parallel.engine import _forward_step

    seen: list[int] = []

    def chunk(tokens: torch.Tensor, positions: torch.Tensor, mask: None, labels: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == positions.shape == labels.shape == (2, SEQUENCE // 2)
        assert torch.equal(tokens % SEQUENCE, positions), "tokens and positions are cut differently"
        seen.extend(positions[0].tolist())
        return (tokens * labels).double()

    tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE)
    context = dist.group.WORLD
    assert context is not None
    losses, average = _forward_step(iter([{"tokens": tokens, "labels": tokens + 1}]), chunk, context=context)
    differentiated, reported = average(losses)
    # What the schedule does with the first and DDP with its gradient: times the context size, then a mean over ranks.
    scaled = differentiated * context.size()
    means = torch.stack([scaled, reported["loss"]])
    dist.all_reduce(means)
    whole = (tokens * (tokens + 1)).double().mean().item()
    differentiated_off, reported_off = (means / context.size() - whole).tolist()
    return differentiated_off, reported_off, seen


def test_context_ranks_share_each_sequence_and_average_its_losses() -> None:
    results = run_ranks(_losses_of_both_ranks, 2)
    for differentiated, reported, _ in results:
        assert differentiated == pytest.approx(0, abs=1e-4)
        assert reported == pytest.approx(0, abs=1e-4)
    first, second = (positions for _, _, positions in results)
    assert sorted(first + second) == list(range(SEQUENCE))
    # Causal attention: the first and last quarter together cost what the middle ones do.
    assert first == [0, 1, 2, 3, 12, 13, 14, 15]
