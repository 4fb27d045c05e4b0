"""One training run as a process of its own, and whether it has been trained to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain.config.load import changed_keys, load_config
from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.metrics.jsonl import read_jsonl
from pretrain.metrics.recorder import EVENTS_FILE
from pretrain.run_directory import CONFIG_FILE

LOG_FILE = "output.txt"
Train = Callable[[Path, Path], int]
"""Trains a run: (file of its configuration, file for what it prints) -> exit code."""


def train_in_process(config_file: Path, log_file: Path) -> int:
    """`pretrain train` in a process of its own, on one thread of the CPU; returns the exit code, or minus the number of
    the signal that killed it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log_file.open("a") as log:
        command = [sys.executable, "-m", "pretrain", "train", str(config_file)]
        return subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def is_finished(config: Config) -> bool:
    """Whether a run of this configuration has been trained to its end. Raises UserError if another one lies there."""
    directory = config.run.directory
    if not (directory / CONFIG_FILE).exists():
        return False
    changes = changed_keys(load_config(directory / CONFIG_FILE), config)
    if changes:
        raise UserError(
            f"{directory}: holds a run of another configuration ({'; '.join(changes[:3])}); remove it, or choose "
            "another folder"
        )
    return any(row["event"] == "finished" and row["step"] == config.total_steps for row in events(config))


def events(config: Config) -> list[dict[str, object]]:
    """Everything that happened to a run so far, in order; nothing when it has not begun."""
    path = config.run.directory / EVENTS_FILE
    return read_jsonl(path) if path.exists() else []
