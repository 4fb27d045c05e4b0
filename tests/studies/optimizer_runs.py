"""Runs of the study of optimizers without training: made-up losses that follow what arXiv 2509.02046 found."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.studies.optimizers.cases import MUON_ROUTER

STEPS_PER_FIRST = 320
SIZE = 32
"""Hidden size of the first cell."""

RATES = {"adamw": 16e-3, "nadamw": 16e-3, "lion": 2e-3, "muon": 64e-3, "soap": 32e-3}
"""Best learning rates in the first cell; they fall with the square root of size and of data."""
LEAD = {"adamw": 0.0, "nadamw": 0.01, "lion": -0.03, "muon": 0.25, "soap": 0.22, MUON_ROUTER: 0.2501}
"""Nats below AdamW in the first cell."""
HALVED = {"muon": 0.6, MUON_ROUTER: 0.6, "soap": 0.9}
"""What is left of the lead with each doubling of the tokens."""


def rate_of(config: Config) -> float:
    """Learning rate of the hidden matrices."""
    return config.optim.muon.lr or config.optim.lr if config.optim.kind == "muon" else config.optim.lr


def name_of(config: Config) -> str:
    """Optimizer, the route of routers included."""
    return MUON_ROUTER if config.optim.routes else config.optim.kind


def made_up_loss(config: Config) -> float:
    """Final loss: a curve of data, a lead over AdamW, and a parabola in the learning rate and a step in the decay."""
    name, kind = name_of(config), config.optim.kind
    doublings = math.log2(config.total_steps * SIZE**2 / (STEPS_PER_FIRST * config.model.hidden_size**2))
    best = RATES[kind] * 2 ** (-0.5 * doublings) * SIZE / config.model.hidden_size
    decay = 0.05 * (config.optim.weight_decay != (0.7 if kind == "lion" else 0.1))
    data = 3 + 0.8 * 2 ** (-0.5 * doublings)
    lead = LEAD[name] * HALVED.get(name, 1.0) ** max(0.0, doublings)
    seed = 0.1 * (config.run.seed % 3) + 0.004 * ((config.run.seed * (len(name) + 1)) % 3)
    return data - lead + 0.02 * math.log2(rate_of(config) / best) ** 2 + decay + seed


def on_the_way(config: Config, share: float) -> float:
    """Loss before the end: Muon falls late."""
    late = 1.0 if config.optim.kind == "muon" else 0.4
    return made_up_loss(config) + late * (1 - share)


class Trainer:
    """Stands in for the process that trains: leaves what a finished run leaves."""

    def __init__(self, *, stop_after: float = math.inf) -> None:
        self.trained: list[str] = []
        """Names of run directories, in order."""
        self.stop_after = stop_after
        """Runs after which every further one ends as if asked to stop."""

    def __call__(self, config_file: Path, log_file: Path) -> int:
        config = load_config(config_file)
        if len(self.trained) >= self.stop_after:
            return 75
        self.trained.append(config.run.directory.name)
        finish(config)
        return 0


def finish(config: Config) -> None:
    """Leave what a run of this configuration leaves at its end."""
    directory, last = config.run.directory, config.total_steps
    (directory / "config.toml").write_text((directory / "trial.toml").read_text())
    start = {"time": "2026-01-01T00:00", "device": "cpu", "python": "3", "versions": {"torch": "2"}}
    (directory / "manifest.json").write_text(json.dumps({"starts": [start]}))
    steps = [*range(config.eval.every_steps, last, config.eval.every_steps), last]
    rows = [{"kind": "train", "step": last, "loss": 1.0}]
    rows += [{"kind": "valid", "step": step, "valid_loss": on_the_way(config, step / last)} for step in steps]
    write_lines(directory / "metrics.jsonl", rows)
    goodput = {"event": "goodput", "step": last, "wall_seconds": 2.0}
    write_lines(directory / "events.jsonl", [{"event": "finished", "step": last}, goodput])


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
