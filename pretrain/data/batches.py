"""Micro-batches of the global sample order for one data-parallel rank.

Letters: B micro_batch_size, S sequence_length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Self

import torch

from pretrain.config.schema import BatchConfig
from pretrain.data.dataset import BlendedDataset
from pretrain.errors import DataError

_PREFETCH = 2  # micro-batches read ahead; more only helps when reading is slower than training


class BatchIterator:
    """Endless iterator over a rank's micro-batches: {"tokens": [B, S], "labels": [B, S]}, both int64.

    A global batch is the next `global_batch_size` samples of the order. Its micro-batch m is the samples
    [m * B, (m + 1) * B) of it, and belongs to rank m % dp_size. So the set of micro-batches is the same for every
    data-parallel size, and so are sums over it of losses that are defined on a micro-batch.
    """

    def __init__(
        self,
        dataset: BlendedDataset,
        batch: BatchConfig,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        """`consumed_samples` is the position in the order, from `BatchIterator.consumed_samples` of an earlier run."""
        if batch.global_batch_size % (batch.micro_batch_size * dp_size):
            raise ValueError(f"{batch} does not divide over {dp_size} data-parallel ranks")
        self.micro_batches_per_step = batch.global_batch_size // (batch.micro_batch_size * dp_size)
        self._dataset = dataset
        self._batch = batch
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._first_sample = consumed_samples
        self._delivered = 0
        self._pending: deque[Future[dict[str, torch.Tensor]]] = deque()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")

    @property
    def consumed_samples(self) -> int:
        """Position in the order after the last global batch that was delivered to its end."""
        steps = self._delivered // self.micro_batches_per_step
        return self._first_sample + steps * self._batch.global_batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        while len(self._pending) <= _PREFETCH:
            self._pending.append(self._reader.submit(self._read, self._delivered + len(self._pending)))
        micro_batch = self._pending.popleft().result()
        self._delivered += 1
        return micro_batch

    def _read(self, number: int) -> dict[str, torch.Tensor]:
        """This rank's micro-batch `number`, counted from the start of the iterator."""
        step, local = divmod(number, self.micro_batches_per_step)
        size = self._batch.micro_batch_size
        start = self._first_sample + step * self._batch.global_batch_size
        start += (local * self._dp_size + self._dp_rank) * size
        samples = torch.stack([self._dataset[sample] for sample in range(start, start + size)])
        return {"tokens": samples[:, :-1].contiguous(), "labels": samples[:, 1:].contiguous()}


def validation_batches(
    dataset: BlendedDataset, batch: BatchConfig, *, batches: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of the first `batches` global batches: the same samples at every call.

    Raises DataError when a source would have to repeat samples.
    """
    for source, epochs in zip(dataset.sources, dataset.epochs(batches * batch.global_batch_size), strict=True):
        if epochs > 1:
            raise DataError(
                f"{source.prefix}: {len(source)} samples of {batch.sequence_length} tokens; eval.batches = {batches} "
                f"of {batch.global_batch_size} would read it {epochs:.2f} times; lower eval.batches or add data"
            )
    iterator = BatchIterator(dataset, batch, dp_rank=dp_rank, dp_size=dp_size)
    return islice(iterator, batches * iterator.micro_batches_per_step)
