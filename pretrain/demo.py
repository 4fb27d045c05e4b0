"""The demonstration: from nothing to a trained mixture of experts and a picture, on any laptop.

Every step is a command a user could give; the demo gives them one after another and adds the baselines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.config.load import load_config
from pretrain.config.rules import smallest_world_size
from pretrain.config.schema import Config
from pretrain.data.baselines import Baselines, ngram_baselines
from pretrain.data.files import read_sidecar
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.errors import UserError
from pretrain.metrics.jsonl import JsonlWriter, read_jsonl
from pretrain.metrics.recorder import EVENTS_FILE, METRICS_FILE
from pretrain.metrics.report import write_report
from pretrain.run_directory import CHECKPOINTS

# The sources of the Python standard library come with every Python.
SOURCE = "stdlib"


def demo(config_file: Path, overrides: Sequence[str] = ()) -> int:
    """Prepare data, compute baselines, train on the fewest processes the layout takes, report; returns the exit code."""
    config = load_config(config_file, overrides)
    directory = config.run.directory
    _prepare_corpus(config)
    baselines = _baselines(config)
    print(
        f"3/4 training; to beat: unigram {baselines.unigram_bits_per_byte:.3f}, bigram "
        f"{baselines.bigram_bits_per_byte:.3f} bits per byte",
        flush=True,
    )
    code = _train(config_file, config, overrides)
    if code:
        return code
    print("4/4 report", flush=True)
    folder = write_report([directory])
    best = min(row["valid_bits_per_byte"] for row in read_jsonl(directory / METRICS_FILE) if row["kind"] == "valid")
    print(
        f"\nlearned: {best:.3f} bits per byte on held-out modules (bigram {baselines.bigram_bits_per_byte:.3f}, "
        f"unigram {baselines.unigram_bits_per_byte:.3f}; lower is better)\n"
        f"see:     {folder / 'loss.png'}  (checkpoints in {directory / CHECKPOINTS})\n"
        f"next:    pretrain train {config_file} --set budget.steps={2 * config.total_steps}  goes on training; "
        f"pretrain plan configs/models/sparkling-small.toml  plans a large one"
    )
    return 0


def _prepare_corpus(config: Config) -> None:
    """Make the datasets the configuration names, unless they are there."""
    (train,), (valid,) = config.data.train, config.data.valid
    folder = train.prefix.parent
    if valid.prefix.parent != folder or (train.prefix.name, valid.prefix.name) != ("train", "valid"):
        raise UserError(
            f"data.train, data.valid: {train.prefix}, {valid.prefix}; the demo makes FOLDER/train and FOLDER/valid"
        )
    if read_sidecar(train.prefix) and read_sidecar(valid.prefix):
        print(f"1/4 corpus: {folder} is there already", flush=True)
        return
    print("1/4 corpus: the sources of Python's standard library, a fresh tokenizer", flush=True)
    options = PrepareOptions(inputs=(SOURCE,), output=folder, vocab_size=config.model.vocab_size)
    for split, sidecar in prepare(options, show_progress=True).items():
        print(f"    {split}: {sidecar.documents:,} modules, {sidecar.tokens:,} tokens, {sidecar.text_bytes:,} bytes")


def _baselines(config: Config) -> Baselines:
    """n-gram models of the same tokens, noted in the run's events, where the report finds them."""
    print("2/4 baselines: unigram and bigram models of the training tokens, on the validation samples", flush=True)
    (train,), (valid,) = config.data.train, config.data.valid
    baselines = ngram_baselines(
        train.prefix,
        valid.prefix,
        sequence_length=config.batch.sequence_length,
        num_samples=config.eval.batches * config.batch.global_batch_size,
    )
    config.run.directory.mkdir(parents=True, exist_ok=True)
    events = config.run.directory / EVENTS_FILE
    if not (events.exists() and any(row["event"] == "baselines" for row in read_jsonl(events))):
        writer = JsonlWriter(events)
        writer.write(
            {
                "event": "baselines",
                "step": 0,
                "unigram_bits_per_byte": baselines.unigram_bits_per_byte,
                "bigram_bits_per_byte": baselines.bigram_bits_per_byte,
            }
        )
        writer.close()
    return baselines


def _train(config_file: Path, config: Config, overrides: Sequence[str]) -> int:
    """`pretrain train` under torchrun, on the fewest processes the layout fits on; returns its exit code."""
    processes = smallest_world_size(config.parallel)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "pretrain", "train", str(config_file)]
    command += [f"--set={override}" for override in overrides]
    cores = os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    return subprocess.run(command, check=False, env=environment).returncode
