"""The default process group that joins the processes of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.platform.device import Device, setup
from pretrain.platform.launcher import Launch, find_launch, integer

logger = logging.getLogger(__name__)

JOIN_SECONDS = 300
"""How long processes wait for each other at the start: nodes of a large job can take minutes to boot their Python."""
COLLECTIVE_SECONDS = 600
"""How long a collective may take before the run fails; the slowest wait is for one rank writing files."""


def world_size() -> int:
    """Processes of this run, known before they have joined."""
    return dist.get_world_size() if dist.is_initialized() else find_launch().world_size


@contextmanager
def joined() -> Iterator[torch.device]:
    """This process's prepared device, with the default process group of the run joined for the time of a `with` block.

    A group that exists already is used, and stays.
    """
    if dist.is_initialized():
        yield setup(integer(os.environ, "LOCAL_RANK", default=0)).device
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
