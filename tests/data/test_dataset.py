"""Reading: the samples are megatron-core's, and their order depends on nothing it should not depend on."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pretrain.config.schema import DataSource
from pretrain.data.dataset import BlendedDataset, TokenWindows, open_blend
from pretrain.data.files import check_files
from pretrain.errors import DataError
from tests.data.conftest import counting_dataset, write_dataset

VOCAB = 100_000


def blend(*sources: tuple[Path, float], sequence_length: int = 16, seed: int = 3) -> BlendedDataset:
    described = [DataSource(prefix=prefix, weight=weight) for prefix, weight in sources]
    return open_blend(described, sequence_length=sequence_length, vocab_size=VOCAB, seed=seed)


def megatron_dataset(prefix: Path, *, sequence_length: int, num_samples: int | None, cache: Path):
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(vocab_size=VOCAB, eod=0, pad=-1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix))
    indices = np.arange(len(indexed), dtype=np.int32)
    return gpt_dataset.GPTDataset(indexed, str(prefix), indices, num_samples, Split.train, config)


@pytest.mark.parametrize("tokens", [161, 320, 1000, 1025])
def test_samples_are_those_of_gpt_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    prefix = counting_dataset(tmp_path / "a", tokens, seed=tokens)
    monkeypatch.setattr(np.random, "RandomState", lambda seed: SimpleNamespace(shuffle=lambda array: None))
    oracle = megatron_dataset(prefix, sequence_length=16, num_samples=None, cache=tmp_path / "cache")
    windows = TokenWindows(prefix, sequence_length=16, vocab_size=VOCAB)
    assert len(windows) == len(oracle)
    for number in range(len(oracle)):
        np.testing.assert_array_equal(windows[number][:-1], oracle[number]["tokens"])
        np.testing.assert_array_equal(windows[number][1:], oracle[number]["labels"])
    # The check can fail: another sequence length gives other samples.
    other = TokenWindows(prefix, sequence_length=15, vocab_size=VOCAB)
    assert not np.array_equal(other[1], windows[1][:-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_every_dtype_of_megatron_is_read(tmp_path: Path, dtype: type) -> None:
    documents = [[1, 2, 3], [], [4], [100, 5, 6, 7]]
    prefix = write_dataset(tmp_path / "a", documents, dtype)
    windows = TokenWindows(prefix, sequence_length=3, vocab_size=101)
    reader = IndexedDataset(str(prefix))
    stream = np.concatenate([reader.get(number) for number in range(len(reader))])
    index = check_files(prefix)
    assert (index.documents, index.tokens, index.dtype) == (4, 8, np.dtype(dtype))
    for number in range(2):
        np.testing.assert_array_equal(windows[number], stream[3 * number : 3 * number + 4])
        assert windows[number].dtype == np.int64


def test_each_pass_is_a_permutation_of_its_own(tmp_path: Path) -> None:
    dataset = blend((counting_dataset(tmp_path / "a", 1601), 1.0))
    passes = [[int(dataset[sample][0]) for sample in range(100 * e, 100 * (e + 1))] for e in range(3)]
    for order in passes:
        assert sorted(order) == list(range(0, 1600, 16))
    assert passes[0] != passes[1] != passes[2]
    assert dataset.epochs(150) == [1.5]


def test_blend_draws_by_weight_and_repeats_small_sources(tmp_path: Path) -> None:
    small = counting_dataset(tmp_path / "small", 161)
    large = counting_dataset(tmp_path / "large", 16001, start=50_000)
    dataset = blend((small, 1), (large, 3))
    firsts = [int(dataset[sample][0]) for sample in range(80)]
    from_small = [first for first in firsts if first < 50_000]
    assert len(from_small) == 20
    assert set(Counter(from_small).values()) == {2}  # ten samples, each twice
    assert dataset.epochs(80) == [2.0, 0.06]
    # What a source gives does not depend on the others' weights.
    other = blend((small, 3), (large, 1))
    again = [int(other[sample][0]) for sample in range(80)]
    assert [first for first in again if first < 50_000][:20] == from_small


def test_order_depends_on_the_seed_only(tmp_path: Path) -> None:
    prefix = counting_dataset(tmp_path / "a", 1601)

    def order(seed: int) -> list[int]:
        return [int(blend((prefix, 1), seed=seed)[sample][0]) for sample in range(100)]

    assert order(3) == order(3) != order(4)


def test_megatron_reorders_with_the_budget_and_we_do_not(tmp_path: Path) -> None:
    """Control: why the order is not left to GPTDataset, whose first samples change with the number of samples."""
    prefix = counting_dataset(tmp_path / "a", 1601)
    short = megatron_dataset(prefix, sequence_length=16, num_samples=90, cache=tmp_path / "cache")
    long = megatron_dataset(prefix, sequence_length=16, num_samples=190, cache=tmp_path / "cache")
    assert not all(torch.equal(short[i]["tokens"], long[i]["tokens"]) for i in range(10))
    forward, backward = blend((prefix, 1)), blend((prefix, 1))
    read_backward = {sample: backward[sample] for sample in reversed(range(190))}
    assert all(torch.equal(forward[sample], read_backward[sample]) for sample in range(190))


def test_fingerprint_changes_with_order_and_contents(tmp_path: Path, prepared: Path) -> None:
    a = counting_dataset(tmp_path / "a", 1601)
    b = counting_dataset(tmp_path / "b", 1701)
    fingerprints = {
        blend((a, 1), (b, 1)).fingerprint,
        blend((b, 1), (a, 1)).fingerprint,
        blend((a, 2), (b, 1)).fingerprint,
        blend((a, 1), (b, 1), seed=9).fingerprint,
        blend((a, 1), (b, 1), sequence_length=15).fingerprint,
        blend((a, 1)).fingerprint,
        blend((prepared / "train", 1)).fingerprint,
    }
    assert len(fingerprints) == 7
    assert blend((a, 1), (b, 1)).fingerprint in fingerprints


def test_token_beyond_the_model_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "a", [[1, 2, 3, 4, 5, 64, 7, 8, 9]])
    assert TokenWindows(prefix, sequence_length=4, vocab_size=65)[1].tolist() == [5, 64, 7, 8, 9]
    windows = TokenWindows(prefix, sequence_length=4, vocab_size=64)
    assert windows[0].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"a\.bin: token 64 between positions 4 and 9.*model\.vocab_size = 64"):
        windows[1]
    negative = write_dataset(tmp_path / "b", [[1, -2, 3, 4, 5]], np.int32)
    with pytest.raises(DataError, match="token -2"):
        TokenWindows(negative, sequence_length=4, vocab_size=64)[0]


def test_opening_refuses_what_does_not_fit(tmp_path: Path, prepared: Path) -> None:
    train = DataSource(prefix=prepared / "train")
    foreign = DataSource(prefix=write_dataset(tmp_path / "short", [[1, 2, 3]]))
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    text = (other / "train.json").read_text()
    (other / "train.json").write_text(text.replace('"sha256": "', '"sha256": "0', 1))
    (tmp_path / "tokenizer.json").write_text("{}")

    def open_(*sources: DataSource, sequence_length: int = 8, vocab_size: int = VOCAB, tokenizer: Path | None = None):
        return open_blend(sources, sequence_length=sequence_length, vocab_size=vocab_size, seed=0, tokenizer=tokenizer)

    good = prepared / "tokenizer.json"
    assert len(open_(train, DataSource(prefix=prepared / "valid"), vocab_size=320, tokenizer=good).sources) == 2
    for arguments, options, message in (
        ([], {}, "no sources"),
        ([train], {"vocab_size": 319}, r"train\.json: tokenizer\.vocab_size = 320; must be <= model\.vocab_size = 319"),
        ([foreign], {}, r"short\.bin: 3 tokens; one sample takes .* 9"),
        ([train, DataSource(prefix=other / "train")], {}, r"tokenizer\.sha256 = 0.*must be that of"),
        ([train], {"tokenizer": tmp_path / "tokenizer.json"}, r"tokenizer\.sha256 = .*must be that of"),
        ([train], {"tokenizer": tmp_path / "none.json"}, r"none\.json: no such file"),
        ([DataSource(prefix=tmp_path / "none")], {}, r"none\.idx: no such file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_(*arguments, **options)
        assert "\n" not in str(caught.value)


def test_a_process_group_changes_nothing(tmp_path: Path) -> None:
    prefix = counting_dataset(tmp_path / "a", 1601)
    alone = [blend((prefix, 1))[sample].tolist() for sample in range(8)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert [blend((prefix, 1))[sample].tolist() for sample in range(8)] == alone
    finally:
        dist.destroy_process_group()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]  # and nothing is written
