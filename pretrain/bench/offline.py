"""Growing checkpoints offline for the benchmark, in a process of its own, as `pretrain grow` is.

Inside a job, writing a checkpoint is for all ranks together. One process serves all requests: `CHECKPOINT<tab>OUT` on a
line of its input, the seconds of the growth on a line of its output.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.config.load import load_config
from pretrain.grow_checkpoint import grow_checkpoint
from pretrain.run_directory import CONFIG_FILE


@contextmanager
def offline_grower() -> Iterator[Callable[[Path, Path], float]]:
    """A function that grows a checkpoint by its own configuration into a new run directory -> seconds.

    The process has as many threads as this one.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pretrain.bench.offline"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        to_child, from_child = process.stdin, process.stdout
        assert to_child is not None
        assert from_child is not None

        def grow(checkpoint: Path, out: Path) -> float:
            print(checkpoint, out, sep="\t", file=to_child, flush=True)
            answer = from_child.readline()
            if not answer:
                raise RuntimeError(f"{checkpoint} was not grown; the reason is in the output above")
            return float(answer)

        yield grow  # leaving Popen's block ends its input, and with that the process


def serve() -> None:
    """Grow what the input names, until it ends."""
    for line in sys.stdin:
        checkpoint, out = map(Path, line.rstrip("\n").split("\t"))
        started = time.perf_counter()
        grow_checkpoint(checkpoint, load_config(checkpoint / CONFIG_FILE), out)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    serve()
