"""What a unigram and a bigram model of the training tokens reach on the validation tokens.

A language model that has learned anything beyond word frequencies is below the first, and one that uses more than the
previous token is below the second. Letters: V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config.schema import DataSource
from pretrain.data.dataset import VALIDATION_SEED, open_blend
from pretrain.data.files import TokenizerRecord, bin_path, check_files, read_sidecar, sidecar_path
from pretrain.data.tokenizer import load_tokenizer, token_byte_lengths
from pretrain.errors import DataError

_ALPHA = 0.5  # pseudo-count of every token: Jeffreys' prior of a multinomial, so that nothing has probability 0
_CHUNK = 16 << 20  # tokens counted in one go; bounds the memory of sorting


@dataclass(frozen=True)
class Baselines:
    """Mean losses over the same predicted tokens."""

    unigram_nats_per_token: float
    bigram_nats_per_token: float
    bytes_per_token: float
    """UTF-8 bytes of text per predicted token; turns a model's loss on these tokens into bits per byte, too."""
    tokens: int
    """Tokens predicted."""

    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2) / self.bytes_per_token

    @property
    def unigram_bits_per_byte(self) -> float:
        return self.bits_per_byte(self.unigram_nats_per_token)

    @property
    def bigram_bits_per_byte(self) -> float:
        return self.bits_per_byte(self.bigram_nats_per_token)


class NgramModel:
    """Unigram and interpolated bigram probabilities from counts.

    unigram  p(w) = (c(w) + a) / (N + a V)
    bigram   p(w | h) = (c(h w) + t(h) p(w)) / (c(h) + t(h)),  t(h) = number of different tokens seen after h

    The second is Witten and Bell's estimate (IEEE Trans. Inf. Theory 37, 1991, method C, interpolated): how much the
    unigram counts follows from the training tokens alone, and both sum to one over V for every h, seen or not.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Count `tokens` [N], ids below `vocab_size`; documents run on into one another as in training samples."""
        assert len(tokens) > 1
        self.vocab_size = vocab_size
        counts = np.zeros(vocab_size, dtype=np.int64)
        pairs = np.empty(0, dtype=np.int64)
        pair_counts = np.empty(0, dtype=np.int64)
        for start in range(0, len(tokens), _CHUNK):
            block = tokens[start : start + _CHUNK + 1].astype(np.int64)  # one more: the pair across the border
            counts += np.bincount(block[:_CHUNK], minlength=vocab_size)
            keys, repeats = np.unique(block[:-1] * vocab_size + block[1:], return_counts=True)
            pairs, pair_counts = _add_counts(pairs, pair_counts, keys, repeats)
        self._unigram = (counts + _ALPHA) / (len(tokens) + _ALPHA * vocab_size)
        self._pairs, self._pair_counts = pairs, pair_counts
        self._history_counts = np.bincount(pairs // vocab_size, pair_counts, minlength=vocab_size)
        self._continuations = np.bincount(pairs // vocab_size, minlength=vocab_size)

    def unigram(self, tokens: np.ndarray) -> np.ndarray:
        """p(token), elementwise."""
        return self._unigram[tokens]

    def bigram(self, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """p(token | history), elementwise."""
        keys = history.astype(np.int64) * self.vocab_size + tokens
        place = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        pair = np.where(self._pairs[place] == keys, self._pair_counts[place], 0)
        seen, new = self._history_counts[history], self._continuations[history]
        unigram = self.unigram(tokens)
        return np.where(seen > 0, (pair + new * unigram) / np.maximum(seen + new, 1), unigram)


def ngram_baselines(
    train: Path, valid: Path, *, sequence_length: int | None = None, num_samples: int | None = None
) -> Baselines:
    """Baselines trained on all tokens of the dataset `train`, on the tokens of `valid` (both prefixes of prepared
    datasets).

    With `sequence_length` and `num_samples`, on the tokens that a model predicts in that many validation samples;
    otherwise on every token of `valid` but the first. Raises DataError.
    """
    tokenizer = _tokenizer_of(train, valid)
    model = NgramModel(_all_tokens(train), tokenizer.vocab_size)
    byte_lengths = token_byte_lengths(load_tokenizer(valid.with_name(tokenizer.file)))
    unigram = bigram = 0.0
    text_bytes = tokens = 0
    if sequence_length is None or num_samples is None:
        windows = iter([_all_tokens(valid).astype(np.int64)])
    else:
        windows = _validation_windows(valid, sequence_length, num_samples, tokenizer.vocab_size)
    for window in windows:
        history, token = window[:-1], window[1:]
        unigram -= float(np.log(model.unigram(token)).sum())
        bigram -= float(np.log(model.bigram(history, token)).sum())
        text_bytes += int(byte_lengths[token].sum())
        tokens += len(token)
    return Baselines(
        unigram_nats_per_token=unigram / tokens,
        bigram_nats_per_token=bigram / tokens,
        bytes_per_token=text_bytes / tokens,
        tokens=tokens,
    )


def _validation_windows(valid: Path, sequence_length: int, num_samples: int, vocab_size: int) -> Iterator[np.ndarray]:
    """The samples that validation reads: int64 [sequence_length + 1] each."""
    source = DataSource(prefix=valid)
    dataset = open_blend([source], sequence_length=sequence_length, vocab_size=vocab_size, seed=VALIDATION_SEED)
    return (dataset[sample].numpy() for sample in range(num_samples))


def _all_tokens(prefix: Path) -> np.ndarray:
    """All token ids of a dataset, mapped."""
    return np.memmap(bin_path(prefix), check_files(prefix).dtype, "r")


def _tokenizer_of(train: Path, valid: Path) -> TokenizerRecord:
    """The one tokenizer both datasets were made with."""
    records = []
    for prefix in (train, valid):
        sidecar = read_sidecar(prefix)
        if sidecar is None:
            raise DataError(f"{sidecar_path(prefix)}: no such file; baselines need the tokenizer it names; prepare it")
        records.append(sidecar.tokenizer)
    if records[0].sha256 != records[1].sha256:
        raise DataError(
            f"{sidecar_path(valid)}: tokenizer.sha256 = {records[1].sha256[:12]}...; must be that of {train}, "
            f"{records[0].sha256[:12]}...; prepare both with one tokenizer"
        )
    return records[1]


def _add_counts(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two lists of counts by key; keys come out sorted and unique."""
    merged, place = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    totals = np.bincount(place, np.concatenate([counts, more_counts]), minlength=len(merged))
    return merged, totals.astype(np.int64)
