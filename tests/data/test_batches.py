"""Micro-batches: the same global batches for every layout, and resuming is as if never stopped."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from pretrain.config.schema import BatchConfig, DataSource
from pretrain.data.batches import BatchIterator, validation_batches
from pretrain.data.dataset import BlendedDataset, open_blend
from pretrain.errors import DataError
from tests.data.conftest import counting_dataset, write_dataset

S = 8


@pytest.fixture
def dataset(tmp_path: Path) -> BlendedDataset:
    """20 and 50 samples; a sample's first token tells which it is."""
    sources = [
        DataSource(prefix=counting_dataset(tmp_path / "a", 20 * S + 1), weight=1),
        DataSource(prefix=counting_dataset(tmp_path / "b", 50 * S + 3, start=1000), weight=2),
    ]
    return open_blend(sources, sequence_length=S, vocab_size=5000, seed=7)


def config(micro: int, global_: int = 12) -> BatchConfig:
    return BatchConfig(sequence_length=S, global_batch_size=global_, micro_batch_size=micro)


def take(iterator: BatchIterator, steps: int) -> list[list[tuple[int, ...]]]:
    """Of each step, the micro-batches as tuples of first tokens."""
    count = iterator.micro_batches_per_step
    firsts = [tuple(batch["tokens"][:, 0].tolist()) for batch in islice(iterator, steps * count)]
    return [firsts[step * count : (step + 1) * count] for step in range(steps)]


def global_batches(dataset: BlendedDataset, *, micro: int, dp_size: int, steps: int = 15, consumed: int = 0):
    """Of each step, the micro-batches of all ranks."""
    ranks = [
        take(BatchIterator(dataset, config(micro), dp_rank=rank, dp_size=dp_size, consumed_samples=consumed), steps)
        for rank in range(dp_size)
    ]
    return [[batch for rank in ranks for batch in rank[step]] for step in range(steps)]


def test_batches_hold_tokens_and_their_successors(dataset: BlendedDataset) -> None:
    batch = next(BatchIterator(dataset, config(3)))
    assert batch["tokens"].shape == batch["labels"].shape == (3, S)
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    for row in range(3):
        torch.testing.assert_close(torch.cat([batch["tokens"][row], batch["labels"][row, -1:]]), dataset[row])
    torch.testing.assert_close(batch["labels"], batch["tokens"] + 1)  # ids of this dataset count up


@pytest.mark.parametrize(("micro", "dp_size"), [(1, 2), (1, 3), (1, 12), (2, 2), (2, 3), (2, 6), (3, 2), (3, 4)])
def test_micro_batches_do_not_depend_on_data_parallel_size(dataset: BlendedDataset, micro: int, dp_size: int) -> None:
    one = global_batches(dataset, micro=micro, dp_size=1)
    many = global_batches(dataset, micro=micro, dp_size=dp_size)
    assert [sorted(step) for step in many] == [sorted(step) for step in one]
    # Every rank has its own: nothing is read twice.
    assert all(len(step) == 12 // micro for step in many)


@pytest.mark.parametrize("micro", [2, 3, 4, 6, 12])
def test_global_batches_do_not_depend_on_micro_batch_size(dataset: BlendedDataset, micro: int) -> None:
    def samples(size: int) -> list[list[int]]:
        return [
            sorted(first for batch in step for first in batch)
            for step in global_batches(dataset, micro=size, dp_size=1)
        ]

    assert samples(micro) == samples(1)
    assert samples(1)[0] == sorted(int(dataset[sample][0]) for sample in range(12))
    assert samples(1)[0] != samples(1)[1]


@pytest.mark.parametrize("stop_after", [1, 4, 7])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_resume_continues_exactly(dataset: BlendedDataset, stop_after: int, dp_size: int) -> None:
    straight = global_batches(dataset, micro=2, dp_size=1)
    stopped = BatchIterator(dataset, config(2), dp_size=dp_size)
    take(stopped, stop_after)
    assert stopped.consumed_samples == 12 * stop_after  # and not what was read ahead
    rest = global_batches(dataset, micro=2, dp_size=dp_size, steps=15 - stop_after, consumed=stopped.consumed_samples)
    assert [sorted(step) for step in rest] == [sorted(step) for step in straight[stop_after:]]
    wrong = global_batches(
        dataset, micro=2, dp_size=dp_size, steps=15 - stop_after, consumed=stopped.consumed_samples + 1
    )
    assert [sorted(step) for step in wrong] != [sorted(step) for step in straight[stop_after:]]


def test_consumed_samples_counts_whole_global_batches(dataset: BlendedDataset) -> None:
    iterator = BatchIterator(dataset, config(2), dp_size=2, consumed_samples=5)
    seen = []
    for _ in range(7):
        next(iterator)
        seen.append(iterator.consumed_samples)
    assert seen == [5, 5, 17, 17, 17, 29, 29]


def test_batch_size_may_change_at_a_resume(dataset: BlendedDataset) -> None:
    first = take(BatchIterator(dataset, config(2, 4)), 3)
    then = take(BatchIterator(dataset, config(2, 8), consumed_samples=12), 2)
    firsts = [first for steps in (first, then) for step in steps for batch in step for first in batch]
    assert firsts == [int(dataset[sample][0]) for sample in range(28)]


def test_indivisible_batches_are_refused(dataset: BlendedDataset) -> None:
    with pytest.raises(ValueError, match="does not divide over 5"):
        BatchIterator(dataset, config(2), dp_size=5)


def test_error_in_a_sample_reaches_the_caller(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", [[1] * (3 * S), [99], [1] * S])
    dataset = open_blend([DataSource(prefix=prefix)], sequence_length=S, vocab_size=50, seed=0)
    with pytest.raises(DataError, match="token 99"):
        take(BatchIterator(dataset, config(1, 4)), 1)


def test_validation_reads_the_same_samples_every_time(dataset: BlendedDataset) -> None:
    def read(dp_size: int) -> list[tuple[int, ...]]:
        return sorted(
            tuple(batch["tokens"][:, 0].tolist())
            for rank in range(dp_size)
            for batch in validation_batches(dataset, config(2), batches=3, dp_rank=rank, dp_size=dp_size)
        )

    assert read(1) == read(1) == read(2)
    assert sorted(first for batch in read(1) for first in batch) == sorted(int(dataset[i][0]) for i in range(36))


def test_validation_does_not_repeat_samples(dataset: BlendedDataset) -> None:
    assert len(list(validation_batches(dataset, config(12), batches=5))) == 5  # all 20 and 40 of 50
    with pytest.raises(DataError, match=r"a: 20 samples.*eval\.batches = 6 of 12 would read it 1\.20 times"):
        validation_batches(dataset, config(12), batches=6)
