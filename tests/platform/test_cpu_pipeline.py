"""Pipeline schedules over gloo give the gradients of a single stage, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.platform import cpu_adapter
from tests.helpers.distributed import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")

PLAIN = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PLAIN, "virtual_pipeline_model_parallel_size": 2}
# Two stages exchange activations and gradients with the same neighbour. In one batch of sends and receives they are
# matched by order alone, forward with backward; issued one by one over two groups they are not.
ONE_BY_ONE = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
RUNS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "single": ({}, {}),  # two data-parallel ranks with the same data
    "1F1B": (PLAIN, {"deallocate_pipeline_outputs": True}),
    "interleaved": (INTERLEAVED, {**ONE_BY_ONE, "deallocate_pipeline_outputs": True}),
    "interleaved, overlapped reduction": (INTERLEAVED, {**ONE_BY_ONE, "overlap_grad_reduce": True}),
    "interleaved, batched": (INTERLEAVED, {}),
    "tied, single": ({}, {"tied": True}),
    "tied, 1F1B": (PLAIN, {"tied": True}),
}


def run_all() -> dict[str, Any]:
    cuda = torch.Tensor.cuda
    cpu_adapter.apply()
    from tests.platform.gpt import one_step

    results: dict[str, Any] = {name: one_step(layout, **changes) for name, (layout, changes) in RUNS.items()}
    # The patch of Tensor.cuda is used where the last stage gets its copy of a tied embedding.
    torch.Tensor.cuda = cuda
    try:
        one_step(PLAIN, tied=True)
    except (AssertionError, RuntimeError) as error:
        results["without tensor_cuda"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What every rank of two has of every run."""
    return run_ranks(run_all, 2)


def gathered(ranks: list[dict[str, Any]], run: str) -> dict[str, torch.Tensor]:
    return {name: gradient for rank in ranks for name, gradient in rank[run]["gradients"].items()}


def differing(ranks: list[dict[str, Any]], run: str) -> list[str]:
    """Parameters whose gradient is not that of the single stage."""
    expected = gathered(ranks, "tied, single" if run.startswith("tied") else "single")
    actual = gathered(ranks, run)
    assert actual.keys() == expected.keys()
    return [name for name, gradient in expected.items() if not torch.equal(actual[name], gradient)]


@pytest.mark.parametrize("run", ["1F1B", "interleaved", "interleaved, overlapped reduction"])
def test_schedule_equals_single_stage(run: str, ranks: list[dict[str, Any]]) -> None:
    assert differing(ranks, run) == []
    assert ranks[1][run]["losses"] == ranks[0]["single"]["losses"]
    assert all(gradient.abs().sum() > 0 for gradient in gathered(ranks, run).values())


def test_batched_exchange_of_two_interleaved_stages_is_wrong(ranks: list[dict[str, Any]]) -> None:
    """Why the interleaved schedule needs ONE_BY_ONE, on any backend; and that the comparison above can fail."""
    assert differing(ranks, "interleaved, batched")


def test_tied_embedding_on_two_stages_equals_single_stage(ranks: list[dict[str, Any]]) -> None:
    expected, actual = gathered(ranks, "tied, single"), gathered(ranks, "tied, 1F1B")
    name = "embedding.word_embeddings.weight"
    assert actual.keys() == expected.keys()
    # The single stage adds both uses of the table up in one backward pass, micro-batch by micro-batch.
    torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-7)
    assert differing(ranks, "tied, 1F1B") in ([], [name])


def test_tied_embedding_needs_tensor_cuda(ranks: list[dict[str, Any]]) -> None:
    assert all("CUDA" in rank["without tensor_cuda"] for rank in ranks)


def send_and_free(patched: bool) -> torch.Tensor | None:
    """Rank 0 sends 4 MB of ones, frees them, and writes twos into fresh memory, before rank 1 receives."""
    if patched:
        cpu_adapter.pipeline_sends()
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    def exchange(*, send: torch.Tensor | None = None, receive: torch.Tensor | None = None) -> None:
        requests = p2p_communication._p2p_ops(
            tensor_send_prev=None,
            tensor_recv_prev=receive,
            tensor_send_next=send,
            tensor_recv_next=None,
            group=pipeline,
            prev_pipeline_rank=1 - dist.get_rank(),
            next_pipeline_rank=1 - dist.get_rank(),
        )
        # Rank 1 takes part in the first barrier before it receives.
        if send is not None:
            deallocate_output_tensor(send, deallocate_pipeline_outputs=True)
            others.extend(torch.full((1 << 20,), 2.0) for _ in range(8))
            dist.barrier(signals)
        for request in requests.values():
            request.wait()

    pipeline, signals = dist.new_group(), dist.new_group()
    others: list[torch.Tensor] = []
    if dist.get_rank() == 0:
        exchange(send=torch.ones(1 << 20))
        return None
    dist.barrier(signals)
    received = torch.zeros(1 << 20)
    exchange(receive=received)
    return received


def test_a_stage_may_free_its_output_while_it_is_sent() -> None:
    assert torch.equal(run_ranks(send_and_free, 2, True)[1], torch.ones(1 << 20))


def test_gloo_alone_sends_freed_memory() -> None:
    """What lies there by then, or, where the allocator has returned it to the system, nothing: the sender dies."""
    try:
        received = run_ranks(send_and_free, 2, False)[1]
    except AssertionError as error:
        assert "Connection closed by peer" in str(error)  # noqa: PT017 - one of two outcomes
    else:
        assert not torch.equal(received, torch.ones(1 << 20))
