"""Small datasets for the tests of this folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core says at import that TE and apex are missing
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pretrain.data.prepare import PrepareOptions, prepare

WORDS = ["model", "data", "token", "expert", "layer", "gradient", "learning", "rate", "return", "while", "for", "class"]


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> Path:
    """A dataset as Megatron's own tools write it: no sidecar."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def counting_dataset(prefix: Path, tokens: int, *, start: int = 0, seed: int = 0) -> Path:
    """Token ids start, start + 1, ..., cut into documents of random lengths: a token tells its position."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, tokens), size=tokens // 20, replace=False))
    return write_dataset(prefix, np.split(np.arange(start, start + tokens), cuts), np.int32)


def write_corpus(folder: Path, *, modules: int = 12, seed: int = 0) -> Path:
    """Folders mod0, mod1, ... with small text files, two of which are difficult."""
    rng = np.random.default_rng(seed)
    for module in range(modules):
        for file in range(3):
            path = folder / f"mod{module}" / f"part{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Mostly the next word of the list, so that a word says something about the one after it.
            steps = np.where(rng.random(200) < 0.7, 1, rng.integers(len(WORDS), size=200))
            words = np.array(WORDS)[np.cumsum(steps) % len(WORDS)]
            path.write_text("\n".join(" ".join(words[i : i + 8]) for i in range(0, 200, 8)), encoding="utf-8")
    difficult = "caf\u00e9 \u4f60\u597d \U0001f600\r\n\ttabs  and   spaces \x00 <|endoftext|> not the end \n\n\n"
    (folder / "mod0" / "difficult.py").write_bytes(difficult.encode())
    (folder / "mod1" / "bom.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    return folder


def corpus_options(folder: Path, output: Path, **changes: object) -> PrepareOptions:
    values: dict[str, object] = {"inputs": (str(folder),), "output": output, "vocab_size": 320, "valid_fraction": 0.3}
    return PrepareOptions.model_validate(values | changes)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a prepared corpus. Tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(corpus_options(corpus, output))
    return output
