"""Sweeps without training: files of them, and a trainer that leaves what a run with a made-up loss would leave."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from tests.helpers.runs import VOCAB_SIZE

LR, DECAY = "optim.lr", "optim.weight_decay"
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
STEPS_TOKENS = 512
"""Tokens of a step."""
LAYERS = {"small": 2, "deep": 8, "deeper": 32}
"""Non-embedding parameters go with their number."""


def base_values(corpus: Path) -> dict[str, Any]:
    """A dense model of two layers, as a configuration's tables."""
    return {
        "run": {"directory": "unused", "precision": "fp32"},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "ffn_size": 32,
        },
        "data": {"train": [{"prefix": str(corpus / "train")}], "valid": [{"prefix": str(corpus / "valid")}]},
        "batch": {"sequence_length": 32, "global_batch_size": 16, "micro_batch_size": 16},
        "budget": {"tokens": 10 * STEPS_TOKENS},
        "eval": {"every_steps": 5, "batches": 1},
    }


def cell(name: str, phase: int, size: str = "small", *, steps: int = 10) -> dict[str, Any]:
    """A cell of a sweep's file."""
    return {
        "name": name,
        "phase": phase,
        "set": {"model.num_layers": LAYERS[size], "budget.tokens": steps * STEPS_TOKENS},
    }


ADAMW = {
    "set": {"optim": {"kind": "adamw"}},
    "start": {LR: 1e-3, DECAY: 0.0},
    "grid": {LR: RATES, DECAY: [0.0, 0.1, 0.2]},
}


def write_sweep(folder: Path, corpus: Path, *, base: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A sweep's file with its base beside it; `keys` replace those of one cell of phase 1, AdamW, one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.toml").write_text(tomli_w.dumps(base_values(corpus) | (base or {})))
    values = {
        "config": "base.toml",
        "directory": str(folder / "sweep"),
        "cell": [cell("one", 1)],
        "optimizer": {"adamw": ADAMW},
    }
    file = folder / "sweep.toml"
    file.write_text(tomli_w.dumps(values | keys))
    return file


def best_rate(config: Config) -> float:
    """Falls with size and with data, by powers: the law that the made-up losses follow."""
    return 8e-3 * (config.model.num_layers / 2 * config.total_steps / 10) ** -0.5


def made_up_loss(config: Config) -> float:
    """Lowest at `best_rate` and weight decay 0.1; seeds differ by 0.002."""
    off = math.log2(config.optim.lr / best_rate(config))
    return 3 + 0.05 * off**2 + (config.optim.weight_decay - 0.1) ** 2 + 0.002 * (config.run.seed - 1)


class Trainer:
    """Stands in for the process that trains: leaves what a finished run leaves."""

    def __init__(self, loss: Callable[[Config], float] = made_up_loss) -> None:
        self.loss = loss
        self.trained: list[str] = []
        """Names of the run directories, in order."""
        self._lock = threading.Lock()

    def __call__(self, config_file: Path, log_file: Path) -> int:
        config = load_config(config_file)
        with self._lock:
            self.trained.append(config.run.directory.name)
        finish(config, self.loss(config))
        return 0


def finish(config: Config, loss: float) -> None:
    """Leave what a run of this configuration leaves at its end."""
    directory, step = config.run.directory, config.total_steps
    (directory / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (directory / "config.toml").write_text((directory / "trial.toml").read_text())
    rows = [
        {"kind": "train", "step": step, "loss": 1.0},
        {"kind": "valid", "step": step, "valid_loss": loss if math.isfinite(loss) else None},
    ]
    write_lines(directory / "metrics.jsonl", rows)
    write_lines(
        directory / "events.jsonl",
        [{"event": "finished", "step": step}, {"event": "goodput", "step": step, "wall_seconds": 2.5}],
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
