"""Samples of `sequence_length + 1` tokens from Megatron datasets, by their number in the global order.

Letters: S sequence_length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain.config.schema import DataSource
from pretrain.data.files import bin_path, check_files, read_sidecar, sha256_of, sidecar_path
from pretrain.data.order import BlendOrder, permute
from pretrain.errors import DataError

VALIDATION_SEED = 0
"""Of the order of validation samples: one for all runs, so that their losses can be compared."""


class TokenWindows:
    """The documents of one Megatron dataset, one after another in file order, cut into windows of S + 1 tokens.

    Windows are S apart, so that every token but the first is predicted once; what is left at the end is dropped.
    These are the samples of megatron-core's GPTDataset when its documents are not shuffled.
    """

    def __init__(self, prefix: Path, *, sequence_length: int, vocab_size: int) -> None:
        """Raises DataError when the files are damaged, too short, or made for a larger vocabulary."""
        self.index = check_files(prefix)
        self.sidecar = read_sidecar(prefix)
        self.prefix = prefix
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._length = (self.index.tokens - 1) // sequence_length
        if self._length < 1:
            raise DataError(
                f"{bin_path(prefix)}: {self.index.tokens} tokens; one sample takes batch.sequence_length + 1 = "
                f"{sequence_length + 1}; add text or shorten the sequence"
            )
        if self.sidecar is not None:
            self._check_sidecar()
        self._reader = IndexedDataset(str(prefix)).bin_reader

    def _check_sidecar(self) -> None:
        assert self.sidecar is not None
        path, tokenizer = sidecar_path(self.prefix), self.sidecar.tokenizer
        if self.sidecar.tokens != self.index.tokens or self.sidecar.documents != self.index.documents:
            raise DataError(
                f"{path}: {self.sidecar.documents} documents, {self.sidecar.tokens} tokens; the index lists "
                f"{self.index.documents} and {self.index.tokens}; copy or prepare the dataset again"
            )
        if tokenizer.vocab_size > self._vocab_size:
            raise DataError(
                f"{path}: tokenizer.vocab_size = {tokenizer.vocab_size}; must be <= model.vocab_size = "
                f"{self._vocab_size}; raise model.vocab_size or prepare with a smaller vocabulary"
            )

    def __len__(self) -> int:
        """Number of windows in one pass."""
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index` as int64 [S + 1]. Raises DataError when it holds an id the model has no row for."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        start = index * self._sequence_length
        dtype = self.index.dtype
        raw = self._reader.read(dtype=dtype.type, count=self._sequence_length + 1, offset=start * dtype.itemsize)
        window = raw.astype(np.int64)
        for token in (int(window.min()), int(window.max())):
            if not 0 <= token < self._vocab_size:
                raise DataError(
                    f"{bin_path(self.prefix)}: token {token} between positions {start} and {start + len(window)}; ids "
                    f"are >= 0 and < model.vocab_size = {self._vocab_size}; run `pretrain data verify`, or raise "
                    f"model.vocab_size"
                )
        return window


class BlendedDataset:
    """An endless weighted blend of datasets; `dataset[i]` is sample i of the global order.

    Every pass over a source is a permutation of its windows of its own.
    """

    def __init__(self, sources: Sequence[TokenWindows], *, weights: Sequence[float], seed: int) -> None:
        assert len(sources) == len(weights) > 0
        self.sources = tuple(sources)
        self._order = BlendOrder(weights)
        self._weights = tuple(weights)
        self._seed = seed

    def locate(self, sample: int) -> tuple[int, int]:
        """Number of the source of a global sample, and the window in it."""
        source, drawn = self._order.locate(sample)
        size = len(self.sources[source])
        epoch, position = divmod(drawn, size)
        return source, permute(position, size, key=(self._seed, source, epoch))

    def __getitem__(self, sample: int) -> torch.Tensor:
        """Tokens of global sample `sample` >= 0: int64 [S + 1]."""
        source, window = self.locate(sample)
        return torch.from_numpy(self.sources[source][window])

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been passed over after the first `samples` samples."""
        return [count / len(source) for count, source in zip(self._order.counts(samples), self.sources, strict=True)]

    @property
    def fingerprint(self) -> str:
        """Changes when the order or the contents do (as far as the sidecars and the sizes show it). A position in the
        order means the same samples under the same fingerprint only."""
        parts: list[object] = [self._seed, self._weights]
        for source in self.sources:
            parts += [len(source), source.index, source.sidecar.bin.sha256 if source.sidecar else ""]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def open_blend(
    sources: Sequence[DataSource], *, sequence_length: int, vocab_size: int, seed: int, tokenizer: Path | None = None
) -> BlendedDataset:
    """Open the datasets of a blend for reading.

    Does the checks that do not read the tokens: structure and sizes, counts against the sidecar, vocabulary, and that
    all were made with one tokenizer, which is `tokenizer` (a `tokenizer.json`) where given. Raises DataError.
    """
    if not sources:
        raise DataError("data.train, data.valid: no sources; a blend has at least one; add one with its prefix")
    windows = [
        TokenWindows(source.prefix, sequence_length=sequence_length, vocab_size=vocab_size) for source in sources
    ]
    _check_tokenizers(windows, tokenizer)
    return BlendedDataset(windows, weights=[source.weight for source in sources], seed=seed)


def _check_tokenizers(windows: Sequence[TokenWindows], tokenizer: Path | None) -> None:
    made_with = {window.prefix: window.sidecar.tokenizer.sha256 for window in windows if window.sidecar}
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise DataError(f"data.tokenizer = {tokenizer}: no such file; give the tokenizer.json of the datasets")
        made_with = {tokenizer: sha256_of(tokenizer), **made_with}
    if not made_with:
        return  # datasets of Megatron's own tools do not say
    reference, expected = next(iter(made_with.items()))
    for prefix, sha256 in made_with.items():
        if sha256 != expected:
            raise DataError(
                f"{sidecar_path(prefix)}: tokenizer.sha256 = {sha256[:12]}...; must be that of {reference}, "
                f"{expected[:12]}...; set data.tokenizer to the datasets' tokenizer.json, or prepare them with one"
            )
