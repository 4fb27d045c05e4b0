"""N-gram baselines: proper distributions, equal to a literal computation, and not fooled by shuffled text."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain.config.schema import BatchConfig, DataSource
from pretrain.data import baselines
from pretrain.data.baselines import NgramModel, ngram_baselines
from pretrain.data.batches import validation_batches
from pretrain.data.dataset import VALIDATION_SEED, open_blend
from pretrain.data.files import read_sidecar
from pretrain.data.text_bytes import bytes_per_token
from pretrain.errors import DataError
from tests.data.conftest import write_dataset


def tokens_of(prefix: Path) -> np.ndarray:
    dataset = IndexedDataset(str(prefix))
    return np.concatenate([dataset[number] for number in range(len(dataset))]).astype(np.int64)


def literal_bigram(train: list[int], vocab_size: int, history: int, token: int) -> float:
    """The formula of NgramModel, in dictionaries."""
    counts = Counter(train)
    pairs = Counter(pairwise(train))
    unigram = (counts[token] + 0.5) / (len(train) + 0.5 * vocab_size)
    after = {pair: count for pair, count in pairs.items() if pair[0] == history}
    if not after:
        return unigram
    return (pairs[history, token] + len(after) * unigram) / (sum(after.values()) + len(after))


@pytest.mark.parametrize("chunk", [1 << 24, 7, 1])
def test_probabilities_are_those_of_the_formula_and_sum_to_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", chunk)
    V = 11
    train = np.random.default_rng(0).choice(8, size=60, p=np.arange(1, 9) / 36)  # 8, 9, 10 are never seen
    model = NgramModel(train.astype(np.uint16), V)
    everything = np.arange(V)
    assert model.unigram(everything).sum() == pytest.approx(1, abs=1e-12)
    for history in range(V):
        probabilities = model.bigram(np.full(V, history), everything)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert probabilities.min() > 0
        expected = [literal_bigram(train.tolist(), V, history, token) for token in range(V)]
        np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    # An unsmoothed estimate would not do: some pairs are unseen.
    assert len(set(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))) < V * V


def test_baselines_on_all_validation_tokens(prepared: Path) -> None:
    result = ngram_baselines(prepared / "train", prepared / "valid")
    train, valid = tokens_of(prepared / "train"), tokens_of(prepared / "valid")
    model = NgramModel(train, 320)
    assert result.tokens == len(valid) - 1
    assert result.unigram_nats_per_token == pytest.approx(-np.log(model.unigram(valid[1:])).mean(), rel=1e-12)
    assert result.bigram_nats_per_token == pytest.approx(-np.log(model.bigram(valid[:-1], valid[1:])).mean(), rel=1e-12)
    assert result.bigram_nats_per_token < result.unigram_nats_per_token < math.log(320)
    # The first token is not predicted; its text is one word at most.
    sidecar = read_sidecar(prepared / "valid")
    assert sidecar is not None
    text_bytes = result.bytes_per_token * result.tokens
    assert sidecar.text_bytes - 20 < text_bytes < sidecar.text_bytes
    total_bits = result.unigram_nats_per_token * result.tokens / math.log(2)
    assert result.unigram_bits_per_byte == pytest.approx(total_bits / text_bytes, rel=1e-12)


def test_shuffled_validation_tokens_take_the_bigram_s_advantage_away(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    real = ngram_baselines(tmp_path / "data" / "train", tmp_path / "data" / "valid")
    tokens = np.fromfile(tmp_path / "data" / "valid.bin", dtype=np.uint16)
    np.random.default_rng(0).shuffle(tokens)
    tokens.tofile(tmp_path / "data" / "valid.bin")
    shuffled = ngram_baselines(tmp_path / "data" / "train", tmp_path / "data" / "valid")
    assert real.bigram_nats_per_token < real.unigram_nats_per_token - 0.5
    assert shuffled.bigram_nats_per_token > shuffled.unigram_nats_per_token
    assert shuffled.unigram_nats_per_token == pytest.approx(real.unigram_nats_per_token, abs=0.02)


def test_baselines_predict_the_tokens_a_model_predicts(prepared: Path) -> None:
    S, samples = 16, 24
    result = ngram_baselines(prepared / "train", prepared / "valid", sequence_length=S, num_samples=samples)
    source = DataSource(prefix=prepared / "valid")
    dataset = open_blend([source], sequence_length=S, vocab_size=512, seed=VALIDATION_SEED)
    batch = BatchConfig(sequence_length=S, global_batch_size=8, micro_batch_size=4)
    model = NgramModel(tokens_of(prepared / "train"), 320)
    losses = [
        -np.log(model.bigram(micro["tokens"].numpy(), micro["labels"].numpy()))
        for micro in validation_batches(dataset, batch, batches=samples // 8)
    ]
    assert result.tokens == samples * S == sum(loss.size for loss in losses)
    assert result.bigram_nats_per_token == pytest.approx(np.mean(losses), rel=1e-12)
    assert result.bigram_nats_per_token != ngram_baselines(prepared / "train", prepared / "valid").bigram_nats_per_token


def test_datasets_of_different_tokenizers_are_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    valid = tmp_path / "data" / "valid"
    text = Path(f"{valid}.json").read_text()
    Path(f"{valid}.json").write_text(text.replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(DataError, match=r"valid\.json: tokenizer\.sha256 = 0.*must be that of"):
        ngram_baselines(prepared / "train", valid)
    Path(f"{valid}.json").unlink()
    with pytest.raises(DataError, match=r"valid\.json: no such file"):
        ngram_baselines(prepared / "train", valid)


def test_bytes_per_token_is_the_baselines_own(prepared: Path, tmp_path: Path) -> None:
    source = DataSource(prefix=prepared / "valid")
    dataset = open_blend([source], sequence_length=16, vocab_size=320, seed=VALIDATION_SEED)
    result = ngram_baselines(prepared / "train", prepared / "valid", sequence_length=16, num_samples=24)
    assert bytes_per_token(dataset, 24) == pytest.approx(result.bytes_per_token, rel=1e-12)
    assert bytes_per_token(dataset, 24) != bytes_per_token(dataset, 12)
    foreign = DataSource(prefix=write_dataset(tmp_path / "foreign", [range(1, 40)]))
    mixed = open_blend([source, foreign], sequence_length=16, vocab_size=320, seed=0)
    assert bytes_per_token(mixed, 4) is None
