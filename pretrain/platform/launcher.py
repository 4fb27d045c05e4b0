"""Who this process is among those of its run, as its launcher says; torch is not needed to know.

A run is started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), by srun, or alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Place of this process among those of its run."""

    rank: int
    world_size: int
    local_rank: int
    """Index on this machine."""
    local_world_size: int
    """Processes on this machine."""
    host: str = ""
    """Where rank 0 listens; empty in a run of one process that nobody launched."""
    port: int = 0
    launcher: str = "alone"


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read from the environment how this process was started.

    Raises:
        UserError: the variables of the launcher are incomplete or contradict each other.
    """
    if "RANK" in environment:
        launch = _from_torchrun(environment)
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        # A step: a batch script has SLURM_PROCID, too, but is no task of srun.
        launch = _from_srun(environment)
    elif "WORLD_SIZE" in environment:
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set but RANK is not: start with torchrun or srun, which set "
            "both, or unset WORLD_SIZE to run alone"
        )
    else:
        return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    if not 0 <= launch.rank < launch.world_size:
        raise UserError(
            f"rank {launch.rank} of {launch.world_size} processes: ranks count from 0 to {launch.world_size - 1}; "
            "check RANK and WORLD_SIZE"
        )
    return launch


def _from_torchrun(environment: Mapping[str, str]) -> Launch:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(
                f"RANK={environment['RANK']} is set but {name} is not: start with torchrun, which sets both, or set "
                "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT on every process"
            )
    rank, world_size = integer(environment, "RANK"), integer(environment, "WORLD_SIZE")
    return Launch(
        rank=rank,
        world_size=world_size,
        # Set by hand, the ranks of one machine are what people start.
        local_rank=integer(environment, "LOCAL_RANK", default=rank),
        local_world_size=integer(environment, "LOCAL_WORLD_SIZE", default=world_size),
        host=environment["MASTER_ADDR"],
        port=integer(environment, "MASTER_PORT"),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
    )


def _from_srun(environment: Mapping[str, str]) -> Launch:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UserError("SLURM_STEP_NODELIST is empty: start with srun, or set MASTER_ADDR to the host of rank 0")
    node = integer(environment, "SLURM_NODEID", default=0)
    tasks = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    # Different for the jobs that share a node, and below the ports that systems hand out by themselves (from 32768).
    port = 20000 + integer(environment, "SLURM_JOB_ID", default=0) % 10000
    return Launch(
        rank=integer(environment, "SLURM_PROCID"),
        world_size=integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=integer(environment, "SLURM_LOCALID"),
        local_world_size=tasks[node] if node < len(tasks) else tasks[-1],
        host=host,
        port=integer(environment, "MASTER_PORT", default=port),
        launcher="srun",
    )


def integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number that the launcher has set. Raises UserError."""
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise UserError(f"{name}={value!r} must be a whole number: it is set by the launcher (torchrun, srun)")
    return int(value)


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: "gpu[03-05,9],login" -> "gpu03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # it matches the empty string
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def expand_counts(counts: str) -> list[int]:
    """SLURM's tasks per node, one number per node: "4(x2),1" -> [4, 4, 1]."""
    expanded = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        expanded += [int(count)] * int(times.rstrip(")") or 1)
    return expanded
