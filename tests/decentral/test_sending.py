"""Tensors between sites: means and owners' bytes, in buckets of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.decentral.sending import from_publishers, from_source, mean_of_givers
from pretrain.optim.exchange import gather_lanes
from tests.helpers.distributed import run_ranks
from tests.helpers.sites import GroupRound

SHAPES = [(5, 3), (1,), (17,), (2, 2, 2)]
MEMBERS = 3


def _tensors(site: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(site)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def _means(givers: list[int], bucket_bytes: int) -> tuple[list[torch.Tensor], bool, int]:
    round_ = GroupRound()
    mine = _tensors(round_.site)
    staged = mean_of_givers(round_, mine, givers, bucket_bytes=bucket_bytes)
    untouched = all(torch.equal(a, b) for a, b in zip(mine, _tensors(round_.site), strict=True))
    return staged, untouched, round_.largest


@pytest.mark.parametrize("bucket_bytes", [4, 28, 1 << 20])
@pytest.mark.parametrize("givers", [[0, 1, 2], [0, 2], [1]])
def test_mean_is_that_of_the_givers_with_the_same_bits_everywhere(givers: list[int], bucket_bytes: int) -> None:
    results = run_ranks(_means, MEMBERS, givers, bucket_bytes)
    wanted = [torch.stack([_tensors(site)[i].double() for site in givers]).mean(dim=0) for i in range(len(SHAPES))]
    everyone = [
        torch.stack([_tensors(site)[i].double() for site in range(MEMBERS)]).mean(dim=0) for i in range(len(SHAPES))
    ]
    for staged, untouched, largest in results:
        assert untouched, "what is staged must not change the model"
        assert largest <= bucket_bytes
        for mine, first, reference in zip(staged, results[0][0], wanted, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine.double(), reference, rtol=0, atol=1e-6)
    if len(givers) < MEMBERS:
        # The same comparison sees a member that should not have given.
        assert max(float((a - b).abs().max()) for a, b in zip(wanted, everyone, strict=True)) > 1e-2


def _of_source(source: int) -> list[torch.Tensor]:
    round_ = GroupRound()
    return from_source(round_, _tensors(round_.site), source, bucket_bytes=16)


def test_a_source_gives_its_own_bits() -> None:
    for staged in run_ranks(_of_source, MEMBERS, 1):
        assert all(torch.equal(a, b) for a, b in zip(staged, _tensors(1), strict=True))


def _published(publishers: list[int], dtype: torch.dtype, bucket_bytes: int) -> tuple[list[Any], int]:
    round_ = GroupRound()
    return from_publishers(round_, _tensors(round_.site, dtype), publishers, bucket_bytes=bucket_bytes), round_.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [8, 64, 1 << 20])
@pytest.mark.parametrize("publishers", [[0, 1, 2, 0], [2, 2, 2, 2], [1, 0, 1, 0]])
def test_publishers_bytes_win(publishers: list[int], dtype: torch.dtype, bucket_bytes: int) -> None:
    results = run_ranks(_published, MEMBERS, publishers, dtype, bucket_bytes)
    for site, (staged, largest) in enumerate(results):
        # One buffer to send and one for each member to receive.
        assert largest * (MEMBERS + 1) <= max(bucket_bytes, MEMBERS + 1)
        for i, (publisher, tensor) in enumerate(zip(publishers, staged, strict=True)):
            if publisher == site:
                assert tensor is None, "own ones are not echoed"
            else:
                assert torch.equal(tensor, _tensors(publisher, dtype)[i])
                assert not torch.equal(tensor, _tensors(site, dtype)[i])


@pytest.mark.parametrize(("chunk", "parts"), [(22, [17] * 3), (50, [50]), (1000, [50]), (49, [25] * 2), (1, [1] * 50)])
def test_little_more_is_sent_than_there_is(chunk: int, parts: list[int]) -> None:
    """The last part is sent whole, with whatever is in the buffer: parts of 22 would be 66 in all."""
    sent = []

    def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
        sent.append(len(tensor))
        return [tensor, tensor]

    gather_lanes([[torch.ones(20), torch.ones(30)], [torch.ones(10)]], 0, chunk, all_gather)
    assert sent == parts


def _empty_lists() -> list[int]:
    round_ = GroupRound()
    means = mean_of_givers(round_, [], [0, 1], bucket_bytes=8)
    published = from_publishers(round_, [], [], bucket_bytes=8)
    dist.barrier()
    return [len(means), len(published)]


def test_nothing_to_send() -> None:
    assert run_ranks(_empty_lists, 2) == [[0, 0]] * 2
