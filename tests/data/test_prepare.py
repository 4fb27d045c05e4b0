"""Preparation: what is written decodes to what was read, the same way every time, all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from pretrain.data import prepare as prepare_module
from pretrain.data.files import read_sidecar
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.sources import Corpus, held_out
from pretrain.data.tokenizer import load_tokenizer, token_byte_lengths
from pretrain.errors import DataError
from tests.data.conftest import WORDS, corpus_options, write_corpus


def read_documents(folder: Path, split: str) -> tuple[list[str], list[np.ndarray]]:
    """Decoded text and tokens of every document, read by megatron-core."""
    dataset = IndexedDataset(str(folder / split))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids = [np.array(dataset[number]) for number in range(len(dataset))]
    return [tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) for document in ids], ids


def documents_of(corpus: Path, *, valid: bool) -> list[str]:
    found = Corpus.find([str(corpus)], suffixes=[".py"], text_key="text").documents()
    return [document.text for document in found if held_out(document, 0.3) == valid]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_documents_decode_to_their_text(corpus: Path, prepared: Path, split: str) -> None:
    texts, ids = read_documents(prepared, split)
    expected = documents_of(corpus, valid=split == "valid")
    assert texts == expected
    assert len(texts) > 3
    sidecar = read_sidecar(prepared / split)
    assert sidecar is not None
    eod = sidecar.tokenizer.eod_id
    assert all(document[-1] == eod and eod not in document[:-1] for document in ids)
    assert (sidecar.documents, sidecar.tokens) == (len(ids), sum(map(len, ids)))
    assert sidecar.text_bytes == sum(len(text.encode()) for text in expected)


def test_name_of_the_end_token_in_a_text_is_text(corpus: Path, prepared: Path) -> None:
    """The control of the check above: encoded the ordinary way, the text would hold an end-of-document token."""
    text = (corpus / "mod0" / "difficult.py").read_bytes().decode()
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    assert 0 in tokenizer.encode(text).ids
    texts, _ = read_documents(prepared, "train")
    others, _ = read_documents(prepared, "valid")
    assert text in texts + others


def test_byte_lengths_add_up_to_the_text(prepared: Path) -> None:
    lengths = token_byte_lengths(load_tokenizer(prepared / "tokenizer.json"))
    for split in ("train", "valid"):
        sidecar = read_sidecar(prepared / split)
        assert sidecar is not None
        _, ids = read_documents(prepared, split)
        assert lengths[np.concatenate(ids)].sum() == sidecar.text_bytes


def test_byte_lengths_of_a_sentencepiece_style_tokenizer(tmp_path: Path) -> None:
    vocab = {"<0xE4>": 0, "\u2581the": 1, "\u00e9": 2}
    lengths = token_byte_lengths(Tokenizer(models.BPE(vocab, [], byte_fallback=True)))
    np.testing.assert_array_equal(lengths, [1, 4, 2])


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_input_gives_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(corpus_options(corpus, tmp_path / "again"))
    assert file_hashes(tmp_path / "again") == file_hashes(prepared)
    other = write_corpus(tmp_path / "other", seed=1)
    prepare(corpus_options(other, tmp_path / "changed"))
    differing = [name for name, sha in file_hashes(tmp_path / "changed").items() if sha != file_hashes(prepared)[name]]
    assert "train.bin" in differing
    assert "tokenizer.json" in differing


def test_training_the_tokenizer_does_not_depend_on_hash_seed_or_threads(corpus: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from pretrain.data.tokenizer import train_tokenizer\n"
        "texts = [p.read_bytes().decode() for p in sorted(pathlib.Path(sys.argv[1]).rglob('*.py'))]\n"
        "print(train_tokenizer(texts, vocab_size=int(sys.argv[2]), eod_token='<eod>').to_str())"
    )

    def train(seed: int, threads: int, vocab_size: int = 330) -> str:
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", script, str(corpus), str(vocab_size)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = train(1, 1)
    assert first == train(2, 4)
    assert len(json.loads(first)["model"]["vocab"]) == 330
    assert first != train(1, 1, vocab_size=329)


def test_split_keeps_groups_together_and_others_in_place(tmp_path: Path) -> None:
    def split(folder: Path) -> dict[str, bool]:
        found = Corpus.find([str(folder)], suffixes=[".py"], text_key="text").documents()
        return {document.name: held_out(document, 0.3) for document in found}

    before = split(write_corpus(tmp_path / "text"))
    for module in range(12):
        assert len({valid for name, valid in before.items() if name.startswith(f"mod{module}/")}) == 1
    assert 0 < sum(before.values()) < len(before)
    (tmp_path / "text" / "another.py").write_text("x = 1")
    (tmp_path / "text" / "mod3.py").write_text("x = 1")
    after = split(tmp_path / "text")
    assert {name: after[name] for name in before} == before
    assert after["mod3.py"] == before["mod3/part0.py"]  # a module's file and folder are one group


def test_jsonl_is_read_by_line_and_split_by_text(tmp_path: Path) -> None:
    texts = [f"{word} {number} line\nnext" for number, word in enumerate(WORDS * 4)]
    lines = [json.dumps({"body": text}) for text in [*texts, texts[0], ""]] + ["", '{"body": "\\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = PrepareOptions(
        inputs=(str(tmp_path / "a.jsonl"),),
        output=tmp_path / "out",
        text_key="body",
        vocab_size=300,
        valid_fraction=0.3,
    )
    sidecars = prepare(options)
    train, _ = read_documents(tmp_path / "out", "train")
    valid, _ = read_documents(tmp_path / "out", "valid")
    assert sorted(train + valid) == sorted([*texts, texts[0]])
    assert not set(train) & set(valid)
    assert sidecars["train"].source.skipped == (f"a.jsonl:{len(lines)}",)


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": "a"', "a.jsonl:2: .*JSON object"), ('{"txt": "a"}', "a.jsonl:2: no text"), ('["a"]', "no text")],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare(PrepareOptions(inputs=(str(tmp_path / "a.jsonl"),), output=tmp_path / "out", valid_fraction=0))
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_utf8_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text", modules=2)
    (folder / "latin.py").write_bytes(b"caf\xe9")
    sidecars = prepare(corpus_options(folder, tmp_path / "out", valid_fraction=0))
    assert sidecars["train"].source.skipped == ("latin.py",)
    assert sidecars["train"].documents == len(list(folder.rglob("*.py"))) - 1


def test_tokenizer_does_not_see_held_out_text(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    held = next(
        d.name for d in Corpus.find([str(folder)], suffixes=[".py"], text_key="").documents() if held_out(d, 0.3)
    )
    (folder / held).write_text("zyzzyva " * 500)

    def knows_word(valid_fraction: float) -> bool:
        output = tmp_path / f"out{valid_fraction}"
        prepare(corpus_options(folder, output, valid_fraction=valid_fraction))
        return "zyzzyva" in load_tokenizer(output / "tokenizer.json").get_vocab()

    assert not knows_word(0.3)
    assert knows_word(0.0)  # when nothing is held out, it does


def test_tokenizer_is_trained_on_a_bounded_sample(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train_tokenizer = prepare_module.train_tokenizer

    def counting(texts, **options):
        pieces = list(texts)
        seen.append(sum(map(len, pieces)))
        return train_tokenizer(pieces, **options)

    monkeypatch.setattr(prepare_module, "train_tokenizer", counting)
    for name, limit in (("all", 1 << 20), ("some", 12_000)):
        prepare(corpus_options(corpus, tmp_path / name, tokenizer_sample_bytes=limit, valid_fraction=0))
    assert seen[0] == sum(len(text) for text in documents_of(corpus, valid=True) + documents_of(corpus, valid=False))
    assert 6_000 < seen[1] < 18_000


def test_given_tokenizer_is_used_as_it_is(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=5)
    given = prepared / "tokenizer.json"
    prepare(corpus_options(other, tmp_path / "out", tokenizer=given))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()
    texts, _ = read_documents(tmp_path / "out", "train")
    assert texts == documents_of(other, valid=False)

    with pytest.raises(DataError, match="has no token '<eos>'"):
        prepare(corpus_options(other, tmp_path / "out2", tokenizer=given, eod_token="<eos>"))
    with pytest.raises(DataError, match="no such file"):
        prepare(corpus_options(other, tmp_path / "out2", tokenizer=tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"must be a tokenizer\.json"):
        prepare(corpus_options(other, tmp_path / "out2", tokenizer=prepared / "train.json"))


def test_truncation_asked_for_by_a_given_tokenizer_is_ignored(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "short.json"))
    assert len(tokenizer.encode("word " * 200).ids) != len(
        load_tokenizer(prepared / "tokenizer.json").encode("word " * 200).ids
    )
    prepare(corpus_options(corpus, tmp_path / "out", tokenizer=tmp_path / "short.json"))
    assert file_hashes(tmp_path / "out")["train.bin"] == file_hashes(prepared)["train.bin"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(320, np.uint16), (70_000, np.int32)])
def test_token_ids_take_two_bytes_when_they_fit(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"unused{number}" for number in range(vocab_size - len(alphabet) - 1)), "<eod>"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("some text")
    options = PrepareOptions(
        inputs=(str(tmp_path / "a.txt"),),
        output=tmp_path / "out",
        tokenizer=tmp_path / "tokenizer.json",
        eod_token="<eod>",
        valid_fraction=0,
    )
    assert prepare(options)["train"].tokenizer.vocab_size == vocab_size
    dataset = IndexedDataset(str(tmp_path / "out" / "train"))
    assert dataset.index.dtype is dtype
    assert dataset[0][-1] == vocab_size - 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failed_preparation(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(folder: Path) -> None:
        assert len(list(folder.iterdir())) == 7  # all is written, but not under its name
        assert not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(prepare_module, "_sync", fail)
    with pytest.raises((DataError, KeyboardInterrupt)) as caught:
        prepare(corpus_options(corpus, tmp_path / "out"))
    if isinstance(error, OSError):
        assert "out: No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs_are_refused(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"output": prepared}, "exists"),
        ({"inputs": (str(tmp_path / "none"),)}, "no such file or folder"),
        ({"inputs": ()}, "none given"),
        ({"suffixes": (".xyz",)}, r"no file with suffix \.xyz"),
        ({"valid_fraction": 1e-9}, "leaves the valid split without a document"),
        ({"valid_fraction": 1.0}, "leaves the train split without a document"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            prepare(corpus_options(corpus, tmp_path / "out").model_copy(update=changes))
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_standard_library_is_found_without_its_tests() -> None:
    corpus = Corpus.find(["stdlib"], suffixes=[".txt"], text_key="text")
    names = {file.name for file in corpus.files}
    assert {"json/decoder.py", "dataclasses.py", "asyncio/tasks.py"} <= names
    assert not any("test" in name.split("/") or "site-packages" in name or "_sysconfigdata" in name for name in names)
    folder = next(file.path for file in corpus.files if file.name == "json/decoder.py").parent.parent
    assert (folder / "site-packages").exists() or (folder / "test").exists()  # there was something to leave out
    assert corpus.python == ".".join(map(str, sys.version_info[:3]))
    assert Corpus.find([str(folder / "json")], suffixes=[".py"], text_key="text").python is None
