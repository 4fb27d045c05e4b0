"""How fast the demonstration trains: a few steps of its configuration under torchrun, on made-up tokens."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pretrain.bench.workloads import write_tokens
from pretrain.config.load import dump_config, load_config
from pretrain.config.rules import smallest_world_size
from pretrain.config.schema import Config
from pretrain.metrics.jsonl import read_jsonl
from pretrain.metrics.recorder import METRICS_FILE
from pretrain.platform.device import thread_count

CONFIG_FILE = Path("configs/demo.toml")
WARMUP_STEPS, STEPS = 3, 15
CONFIG_NAME = "config.toml"


@dataclass(frozen=True)
class DemoSpeed:
    """Tokens per second over all processes, by the wall clock, as the run's own rows have it."""

    processes: int
    threads: int
    """Of each process."""
    tokens_per_second: float
    """Median over steps."""
    slowest: float
    fastest: float


def demo_speed(config_file: Path = CONFIG_FILE) -> DemoSpeed:
    """Train some steps of the demonstration on CPUs, on as many processes as it takes."""
    demo = load_config(config_file)
    processes = smallest_world_size(demo)
    threads = thread_count(processes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _shortened(demo, folder)
        tokens = config.total_steps * config.batch.tokens_per_step
        write_tokens(folder / "tokens", vocab_size=config.model.vocab_size, tokens=tokens)
        (folder / CONFIG_NAME).write_text(dump_config(config))
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "pretrain", "train"]
        subprocess.run(
            [sys.executable, "-m", *command, str(folder / CONFIG_NAME)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows = read_jsonl(config.run.directory / METRICS_FILE)
    speeds = [row["tokens_per_second"] for row in rows[WARMUP_STEPS:]]
    return DemoSpeed(processes, threads, statistics.median(speeds), min(speeds), max(speeds))


def _shortened(demo: Config, folder: Path) -> Config:
    """The demonstration's model, batch and layout without validation and checkpoints on the way."""
    values = demo.model_dump(mode="json", exclude_none=True)
    values["run"]["directory"] = str(folder / "run")
    values["data"] = {"train": [{"prefix": str(folder / "tokens")}]}
    values["budget"] = {"steps": STEPS}
    values["schedule"]["warmup_steps"] = 0
    values["eval"]["every_steps"] = values["checkpoint"]["every_steps"] = 0
    return Config.model_validate(values)
