"""Byte-level BPE tokenizers: train one, load one, and how many bytes of text each token stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.errors import DataError

MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-document token."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, eod_token: str) -> Tokenizer:
    """Byte-level BPE (GPT-2's splitting into words) of at most `vocab_size` tokens; id 0 ends a document.

    The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises DataError when it is missing or not one."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; a tokenizer is a tokenizer.json of Hugging Face; check the path")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises plain Exception for anything it cannot parse
        raise DataError(f"{path}: {error}; must be a tokenizer.json of Hugging Face; copy it again") from error


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for: int64 [vocab size], 0 for special tokens and unused ids.

    Exact for byte-level BPE, where every character of a token's name is one byte. For other tokenizers, the bytes of
    the name, with SentencePiece's mark for a space as a space and its byte tokens as one byte.
    """
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    lengths = np.zeros(vocab_size_of(tokenizer), dtype=np.int64)
    for name, token in tokenizer.get_vocab(with_added_tokens=False).items():
        is_byte = len(name) == len("<0xFF>") and name.startswith("<0x")
        if byte_level or is_byte:
            lengths[token] = 1 if is_byte and not byte_level else len(name)
        else:
            lengths[token] = len(name.replace("\u2581", " ").encode())
    for token, added in tokenizer.get_added_tokens_decoder().items():
        lengths[token] = 0 if added.special else len(added.content.encode())
    return lengths
