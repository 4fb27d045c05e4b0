"""`pretrain data prepare`: text to Megatron datasets with a tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pydantic import Field
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from pretrain.config.base import Fraction, PositiveInt, Section
from pretrain.data.files import (
    FileRecord,
    Sidecar,
    SourceRecord,
    TokenizerRecord,
    bin_path,
    idx_path,
    sha256_of,
    sidecar_path,
)
from pretrain.data.sources import SPLIT_RULE, Corpus, Document, held_out, unit_hash
from pretrain.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, train_tokenizer, vocab_size_of
from pretrain.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
_ENCODE_CHARS = 4 << 20  # text per call of the encoder: enough to keep its threads busy, little enough to hold
_PIECE_CHARS = 1 << 16  # unit in which text is drawn for training the tokenizer

Split = Literal["train", "valid"]


class PrepareOptions(Section):
    """What to make of what."""

    inputs: tuple[str, ...]
    """Files, folders, or `stdlib` for the sources of the Python standard library. A .jsonl file is read as one
    document per line, any other file is one document."""
    output: Path
    """Folder to be made, with train.bin/.idx/.json, the same for valid, and tokenizer.json."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".jsonl")
    """Files that are read in folders."""
    text_key: str = "text"
    """Key of the text in JSONL."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to use (default: train one on the training split)."""
    vocab_size: int = Field(default=4096, ge=MIN_VOCAB_SIZE)
    """Size of the tokenizer that is trained; small corpora may give a smaller one."""
    tokenizer_sample_bytes: PositiveInt = 64 << 20
    """About how much text the tokenizer is trained on, drawn evenly from the training split."""
    eod_token: str = "<|endoftext|>"
    """Token that ends every document. A given tokenizer must have it."""
    valid_fraction: Fraction = 0.05
    """Share of files (by top-level name) or JSONL lines that is held out (0: no validation split)."""


def prepare(options: PrepareOptions, *, show_progress: bool = False) -> dict[Split, Sidecar]:
    """Make the folder `options.output`; returns the sidecar of each split.

    The folder appears complete or not at all. The same inputs and options give the same bytes. Raises DataError.
    """
    output = options.output
    if output.exists():
        raise DataError(f"{output}: exists; prepare makes a new folder; remove it or choose another")
    corpus = Corpus.find(options.inputs, suffixes=options.suffixes, text_key=options.text_key)
    aside = output.with_name(f".{output.name}.partial-{os.getpid()}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    try:
        aside.mkdir(parents=True)
        with Progress(*columns, TimeRemainingColumn(), disable=not show_progress) as progress:
            tokenizer, record = _make_tokenizer(corpus, options, aside / TOKENIZER_FILE, progress)
            sidecars = _write_datasets(
                corpus, options, folder=aside, tokenizer=tokenizer, record=record, progress=progress
            )
        _sync(aside)
        aside.rename(output)
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: {error.strerror}; inputs must be readable, and the output needs room and "
            f"write permission; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # nothing there after the rename
    return sidecars


def _make_tokenizer(
    corpus: Corpus, options: PrepareOptions, path: Path, progress: Progress
) -> tuple[Tokenizer, TokenizerRecord]:
    """Copy the given tokenizer to `path`, or train one and write it there."""
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        shutil.copyfile(options.tokenizer, path)
    else:
        total = corpus.size_bytes()
        task = progress.add_task("training the tokenizer", total=total)
        documents = _advancing(corpus.documents(), progress, task)
        pieces = _sample(documents, options.valid_fraction, share=options.tokenizer_sample_bytes / max(total, 1))
        tokenizer = train_tokenizer(pieces, vocab_size=options.vocab_size, eod_token=options.eod_token)
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        progress.update(task, completed=total)
    eod_id = tokenizer.token_to_id(options.eod_token)
    if eod_id is None:
        raise DataError(
            f"{options.tokenizer}: has no token {options.eod_token!r}; documents end with a token of the tokenizer; "
            f"name its end-of-document token (eod_token)"
        )
    # The name of a special token in a text is text: without this, a document could end another.
    tokenizer.encode_special_tokens = True
    # Files saved from a fine-tuning run may ask for these; they would cut documents short, or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    record = TokenizerRecord(
        file=TOKENIZER_FILE,
        sha256=sha256_of(path),
        vocab_size=vocab_size_of(tokenizer),
        eod_token=options.eod_token,
        eod_id=eod_id,
    )
    return tokenizer, record


def _sample(documents: Iterable[Document], valid_fraction: float, *, share: float) -> Iterator[str]:
    """Pieces of the documents that are not held out, about `share` of their text."""
    for document in documents:
        if held_out(document, valid_fraction):
            continue
        for start in range(0, len(document.text), _PIECE_CHARS):
            if share >= 1 or unit_hash(f"{document.name}:{start}") < share:
                yield document.text[start : start + _PIECE_CHARS]


def _advancing(documents: Iterable[Document], progress: Progress, task: TaskID) -> Iterator[Document]:
    for document in documents:
        yield document
        progress.advance(task, len(document.text))  # characters stand in for bytes


class _SplitWriter:
    """Writes one split's .bin and .idx, and counts."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.documents = self.tokens = self.text_bytes = 0
        self._builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=DType.optimal_dtype(vocab_size))

    def add(self, text: str, ids: list[int]) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += len(text.encode())

    def finish(self, tokenizer: TokenizerRecord, source: SourceRecord) -> Sidecar:
        self._builder.finalize(str(idx_path(self.prefix)))
        sidecar = Sidecar(
            tokenizer=tokenizer,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            bin=FileRecord.of(bin_path(self.prefix)),
            idx=FileRecord.of(idx_path(self.prefix)),
            source=source,
        )
        sidecar_path(self.prefix).write_text(sidecar.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return sidecar


def _write_datasets(
    corpus: Corpus,
    options: PrepareOptions,
    *,
    folder: Path,
    tokenizer: Tokenizer,
    record: TokenizerRecord,
    progress: Progress,
) -> dict[Split, Sidecar]:
    """Encode all documents into the folder's train and valid datasets."""
    splits: tuple[Split, ...] = ("train", "valid") if options.valid_fraction > 0 else ("train",)
    writers = {split: _SplitWriter(folder / split, record.vocab_size) for split in splits}
    total = corpus.size_bytes()
    task = progress.add_task("encoding", total=total)
    for documents in _batched(_advancing(corpus.documents(), progress, task)):
        encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
        for document, encoding in zip(documents, encodings, strict=True):
            writer = writers["valid" if held_out(document, options.valid_fraction) else "train"]
            writer.add(document.text, [*encoding.ids, record.eod_id])
    progress.update(task, completed=total)
    for split, writer in writers.items():
        if writer.documents == 0:
            raise DataError(
                f"valid_fraction = {options.valid_fraction}: leaves the {split} split without a document; documents "
                f"are split by the first name of their path below the input; change the fraction, or name a folder "
                f"with more files or subfolders"
            )
    return {split: writer.finish(record, _source(corpus, options, split)) for split, writer in writers.items()}


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups of documents of _ENCODE_CHARS or a little more."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _source(corpus: Corpus, options: PrepareOptions, split: Split) -> SourceRecord:
    return SourceRecord(
        inputs=corpus.inputs,
        files=len(corpus.files),
        skipped=tuple(sorted(corpus.skipped)),
        python=corpus.python,
        split=split,
        valid_fraction=options.valid_fraction,
        split_rule=SPLIT_RULE,
    )


def _sync(folder: Path) -> None:
    """Bring the folder and its files to the disk, so that after a power cut the renamed folder is not empty."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
