"""Run a function on several gloo processes; the one way multi-process tests are written."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.forks import forks

# Long enough for two busy cores, short enough that a hang fails a test and not the suite.
TIMEOUT = timedelta(seconds=120)


def rank_main(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    directory: str,
    args: tuple[Any, ...],
    environment: Mapping[str, str],
) -> None:
    """A process: join the group of `directory`, call `fn(*args)`, and leave its result or its traceback there."""
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    folder = Path(directory)
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        torch.save(fn(*args), folder / f"result_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc())
        # No collectives on the way out: the other ranks may be anywhere.
        os._exit(1)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call the module-level `fn(*args)` on `world_size` fresh processes with a gloo process group.

    Returns every rank's return value, in rank order. Raises AssertionError with the first failing rank's
    traceback if any rank fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            forks().Process(target=rank_main, args=(rank, fn, world_size, directory, args, dict(os.environ)))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = sorted(Path(directory).glob("error_*.txt"))
        if errors:
            # The earliest failure is the cause; the others are connections it broke.
            first = min(errors, key=lambda path: path.stat().st_mtime_ns)
            raise AssertionError(f"{first.stem} of {world_size}:\n{first.read_text()}")
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes {codes}"
        # Our own files, written a moment ago by our own processes.
        return [torch.load(Path(directory) / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]
