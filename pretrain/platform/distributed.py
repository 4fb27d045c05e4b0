"""Who this process is among those of its run, and the default process group that joins them.

A run is started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), by srun, or alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.platform.device import Device, setup

logger = logging.getLogger(__name__)

JOIN_SECONDS = 300
"""How long processes wait for each other at the start: nodes of a large job can take minutes to boot their Python."""
COLLECTIVE_SECONDS = 600
"""How long a collective may take before the run fails; the slowest wait is for one rank writing files."""


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


def world_size() -> int:
    """Processes of this run, known before they have joined."""
    return dist.get_world_size() if dist.is_initialized() else find_launch().world_size


@contextmanager
def joined() -> Iterator[torch.device]:
    """This process's prepared device, with the default process group of the run joined for the time of a `with` block.

    A group that exists already is used, and stays.
    """
    if dist.is_initialized():
        yield setup(_integer(os.environ, "LOCAL_RANK", default=0)).device
        return
    launch = find_launch()
    device = setup(launch.local_rank, local_world_size=launch.local_world_size)
    init_process_group(device, launch)
    if launch.rank == 0:
        count = "1 process" if launch.world_size == 1 else f"{launch.world_size} processes, each"
        logger.info("%s on %s; launcher: %s", count, device.describe(), launch.launcher)
    clean = False
    try:
        yield device.device
        clean = True
    finally:
        # After an error the other ranks may be in any collective, and NCCL would wait for its own to end.
        if clean or device.backend == "gloo":
            shutdown()


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
    rank, world_size = _integer(environment, "RANK"), _integer(environment, "WORLD_SIZE")
    return Launch(
        rank=rank,
        world_size=world_size,
        # Set by hand, the ranks of one machine are what people start.
        local_rank=_integer(environment, "LOCAL_RANK", default=rank),
        local_world_size=_integer(environment, "LOCAL_WORLD_SIZE", default=world_size),
        host=environment["MASTER_ADDR"],
        port=_integer(environment, "MASTER_PORT"),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
    )


def _from_srun(environment: Mapping[str, str]) -> Launch:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UserError("SLURM_STEP_NODELIST is empty: start with srun, or set MASTER_ADDR to the host of rank 0")
    node = _integer(environment, "SLURM_NODEID", default=0)
    tasks = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    # Different for the jobs that share a node, and below the ports that systems hand out by themselves (from 32768).
    port = 20000 + _integer(environment, "SLURM_JOB_ID", default=0) % 10000
    return Launch(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=_integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_world_size=tasks[node] if node < len(tasks) else tasks[-1],
        host=host,
        port=_integer(environment, "MASTER_PORT", default=port),
        launcher="srun",
    )


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
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


def init_process_group(
    device: Device,
    launch: Launch,
    *,
    join_seconds: float = JOIN_SECONDS,
    collective_seconds: float = COLLECTIVE_SECONDS,
) -> None:
    """Join the default process group of the run.

    Raises:
        UserError: rank 0's port is taken, its host does not answer, or not all processes came in time.
    """
    store = _store(launch, timedelta(seconds=join_seconds))
    dist.init_process_group(
        device.backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=collective_seconds),
        # Binding NCCL to its GPU now makes a wrong placement fail here, and lets groups share its connections.
        device_id=device.device if device.backend == "nccl" else None,
    )


def _store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The key-value store through which processes find each other."""
    if launch.launcher == "alone":
        return dist.HashStore()  # in this process: no port that could be taken
    if launch.launcher == "torchrun":
        # Its agent already keeps a store, and has seen every process start.
        store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
        if launch.local_world_size < launch.world_size:
            return store  # agents count restarts each for themselves; launch/env.sh has them make a new store
        # Since torch 2.5 the store outlives restarts (pytorch/pytorch#135712): without a name of their own, processes
        # would find the addresses of those before them, and wait for ever.
        return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    where = f"{launch.host}:{launch.port}"
    try:
        return dist.TCPStore(launch.host, launch.port, launch.world_size, is_master=launch.rank == 0, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT={launch.port} is taken on {launch.host}: another run or program listens there; "
                "set MASTER_PORT to a free port on every process, or start with torchrun --standalone"
            ) from error
        raise UserError(
            f"rank {launch.rank} of {launch.world_size} cannot reach rank 0 at {where} within "
            f"{timeout.total_seconds():.0f} s: check MASTER_ADDR, MASTER_PORT and that rank 0 is running"
        ) from error
    except dist.DistStoreError as error:
        raise UserError(
            f"not all of WORLD_SIZE={launch.world_size} processes reached {where} within "
            f"{timeout.total_seconds():.0f} s: start every rank, with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from error


def shutdown() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
