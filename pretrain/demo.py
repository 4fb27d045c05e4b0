"""The demonstration: from nothing to a trained mixture of experts and a picture, on any laptop.

Every step is a command a user could give; the demo gives them one after another and adds the baselines.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.config.load import load_config
from pretrain.config.rules import check, smallest_world_size
from pretrain.config.schema import Config
from pretrain.data.baselines import Baselines, ngram_baselines
from pretrain.data.files import read_sidecar
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokenizer import MIN_VOCAB_SIZE
from pretrain.errors import ConfigError
from pretrain.metrics.jsonl import JsonlWriter, read_jsonl
from pretrain.metrics.recorder import EVENTS_FILE, METRICS_FILE
from pretrain.metrics.report import write_report
from pretrain.platform.device import thread_count
from pretrain.run_directory import CHECKPOINTS, locked
from pretrain.signals import DONE, REQUEUE

# The sources of the Python standard library come with every Python.
SOURCE = "stdlib"


def demo(config_file: Path, overrides: Sequence[str] = ()) -> int:
    """Prepare data, compute baselines, train on the fewest processes the layout takes, report; returns the exit code.

    What an earlier demo with the same configuration has done is not done again.
    """
    config = load_config(config_file, overrides)
    processes = smallest_world_size(config)
    problems = [*check(config, processes), *_problems(config)]
    if problems:
        raise ConfigError(problems, str(config_file))
    directory = config.run.directory
    with locked(directory):
        prepare_corpus(config, "1/4")
        baselines = _baselines(config)
    print(
        f"3/4 training on {processes} processes; to beat: {baselines.unigram_bits_per_byte:.3f} (unigram) and "
        f"{baselines.bigram_bits_per_byte:.3f} (bigram) bits per byte",
        flush=True,
    )
    code = _train(config_file, overrides, processes=processes)
    if code == REQUEUE:
        print(f"stopped; to go on: {_command(config_file, overrides)}")
    if code != DONE:
        return code
    print("4/4 report", flush=True)
    folder = write_report([directory])
    rows = read_jsonl(directory / METRICS_FILE)
    best = min(row["valid_bits_per_byte"] for row in rows if row["kind"] == "valid")
    print(
        f"\nlearned: {best:.3f} bits per byte on held-out modules (bigram model {baselines.bigram_bits_per_byte:.3f}, "
        f"unigram model {baselines.unigram_bits_per_byte:.3f})\n"
        f"see:     {folder / 'loss.png'} (checkpoints: {directory / CHECKPOINTS})\n"
        f"next:    {_command(config_file, _twice_as_long(config, overrides))}  (goes on from here)"
    )
    return DONE


def _problems(config: Config) -> Iterator[str]:
    """What the demo asks of a configuration beside what every run does."""
    for name, sources in (("train", config.data.train), ("valid", config.data.valid)):
        prefixes = [str(source.prefix) for source in sources]
        if len(sources) != 1 or sources[0].prefix.name != name:
            yield f"data.{name} = {prefixes}: the demo prepares one dataset, named {name}; set prefix to FOLDER/{name}"
    if len({source.prefix.parent for source in config.data.train + config.data.valid}) > 1:
        yield "data.train, data.valid: the demo prepares both in one folder; give them the same one"
    if not config.eval.every_steps:
        yield "eval.every_steps = 0: the demo compares validation losses with its baselines; set it"
    if config.model.vocab_size < MIN_VOCAB_SIZE:
        yield f"model.vocab_size = {config.model.vocab_size}: a tokenizer needs {MIN_VOCAB_SIZE} or more; raise it"


def prepare_corpus(config: Config, progress: str) -> None:
    """Make the datasets the configuration names, a folder's `train` and `valid`, unless they are there. `progress`
    precedes what is said of it."""
    train, valid = config.data.train[0].prefix, config.data.valid[0].prefix
    folder = train.parent
    if read_sidecar(train) and read_sidecar(valid):
        print(f"{progress} corpus: {folder} is there already", flush=True)
        return
    print(f"{progress} corpus: the sources of Python's standard library, and a tokenizer trained on them", flush=True)
    options = PrepareOptions(inputs=(SOURCE,), output=folder, vocab_size=config.model.vocab_size)
    for split, sidecar in prepare(options, show_progress=True).items():
        print(f"    {split}: {sidecar.documents:,} modules, {sidecar.tokens:,} tokens, {sidecar.text_bytes:,} bytes")


def _baselines(config: Config) -> Baselines:
    """n-gram models of the same tokens, noted in the run's events, where the report finds them."""
    print("2/4 baselines: unigram and bigram models of the training tokens, on the validation samples", flush=True)
    baselines = ngram_baselines(
        config.data.train[0].prefix,
        config.data.valid[0].prefix,
        sequence_length=config.batch.sequence_length,
        num_samples=config.eval.batches * config.batch.global_batch_size,
    )
    figures = {
        "unigram_bits_per_byte": baselines.unigram_bits_per_byte,
        "bigram_bits_per_byte": baselines.bigram_bits_per_byte,
    }
    events = config.run.directory / EVENTS_FILE
    known = [row for row in read_jsonl(events) if row["event"] == "baselines"] if events.exists() else []
    if not known or any(known[-1].get(name) != value for name, value in figures.items()):
        writer = JsonlWriter(events)
        writer.write({"event": "baselines", "time": round(time.time(), 3), "step": 0, **figures})
        writer.close()
    return baselines


def _train(config_file: Path, overrides: Sequence[str], *, processes: int) -> int:
    """`pretrain train` on some processes of this machine; returns the exit code of the one that ended first.

    This is torchrun, called rather than started: it would turn every exit code into 1, and add a traceback of its own.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(thread_count(processes)))
    # The demo is a CPU's everywhere: a machine with one GPU has none for the second process.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from torch.distributed import run as torchrun  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415

    command = ["--standalone", f"--nproc-per-node={processes}", "-m", "pretrain", "train", str(config_file)]
    command += [f"--set={override}" for override in overrides]
    # torchrun's own log only repeats which process ended.
    logging.disable(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"process {rank} was ended by {name}; was there enough memory?", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        # torchrun has passed the signal on and waited; the processes have saved.
        return REQUEUE
    finally:
        logging.disable(logging.NOTSET)
    return DONE


def _twice_as_long(config: Config, overrides: Sequence[str]) -> list[str]:
    """The overrides for going on until twice the budget is used."""
    unit = "tokens" if config.budget.tokens else "steps"
    others = [text for text in overrides if not text.startswith("budget.")]
    return [*others, f"budget.{unit}={2 * getattr(config.budget, unit)}"]


def _command(config_file: Path, overrides: Sequence[str]) -> str:
    """The demo as a user types it here: with this Python where the shell would not find the command."""
    program = ["pretrain"] if shutil.which("pretrain") else [os.path.relpath(sys.executable), "-m", "pretrain"]
    return shlex.join([*program, "demo", str(config_file), *(f"--set={override}" for override in overrides)])
