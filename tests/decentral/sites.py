"""Sites as processes on this machine, with a coordinator that can be killed; what tests of the transports start."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.decentral import DecentralConfig
from pretrain.decentral import presence, torchft_transport
from pretrain.decentral.coordinator import coordinate
from pretrain.decentral.transport import Transport, open_transport
from tests.helpers.forks import forks
from tests.helpers.sites import free_port

PATIENCE_SECONDS = 120
"""Catches a hang; nothing takes nearly as long."""


def hurry() -> None:
    """Shorter times than a real run's, with room for a busy machine. In every process of a test."""
    torchft_transport.HEARTBEAT_SECONDS = 0.5
    torchft_transport.DEAD_SECONDS = presence.GONE_SECONDS = 5.0
    torchft_transport.SETTLE_SECONDS = 2.0


class Here:
    """What a scenario sees: its site and rank, and marks that it shares with the test."""

    def __init__(self, config: DecentralConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ranks = Ranks()
        self.rank, self.site = self.ranks.rank, config.site

    def transport(self, stopping: Callable[[], bool] = lambda: False) -> Transport:
        return open_transport(self.config, self.ranks, stopping)

    def mark(self, name: str) -> None:
        (self.folder / name).touch()

    def wait(self, name: str) -> None:
        wait_until((self.folder / name).exists)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


Scenario = Callable[..., Any]


class Sites:
    """Starts sites; `results` has what their ranks returned, or how they failed."""

    def __init__(self, folder: Path, transport: str, sites: int, ranks: int = 1, **keys: Any) -> None:
        self.folder, self.ranks = folder, ranks
        host = keys.get("bind", "127.0.0.1")
        times: dict[str, Any] = {"join_seconds": 10.0, "wait_seconds": 60.0, "timeout_seconds": 10.0}
        self.config = DecentralConfig(
            kind="spes", sites=sites, transport=transport, coordinator=f"{host}:{free_port()}", **(times | keys)
        )
        self.processes: dict[int, list[BaseProcess]] = {}
        self._starts = 0
        self.coordinator: BaseProcess | None = None

    def start(self, site: int, scenario: Scenario, *arguments: Any, ranks: int = 0, **keys: Any) -> None:
        """Start a site, or start it again; `keys` are its own of [decentral]."""
        self._starts += 1
        config = self.config.model_copy(update={"site": site} | keys)
        self.processes[site] = [
            forks().Process(
                target=_rank_main,
                args=(scenario, arguments, config, self.folder, self._starts, rank, ranks or self.ranks),
                daemon=True,
            )
            for rank in range(ranks or self.ranks)
        ]
        for process in self.processes[site]:
            process.start()

    def start_all(self, scenario: Scenario, *arguments: Any) -> None:
        for site in range(self.config.sites):
            self.start(site, scenario, *arguments)

    def results(self, site: int) -> list[Any]:
        """What the ranks of a site returned, once they have ended. A string is the error of a rank that failed."""
        return self.results_of(self.processes[site])

    def results_of(self, processes: Sequence[BaseProcess]) -> list[Any]:
        """The same for a start of a site that is not its last."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"{process} hangs:\n{self.logs()}"
        assert [process.exitcode for process in processes] == [0] * len(processes)
        return [torch.load(_result(self.folder, process), weights_only=False) for process in processes]

    def kill(self, site: int) -> None:
        for process in self.processes[site]:
            process.kill()
            process.join()

    def signal(self, site: int, number: signal.Signals) -> None:
        for process in self.processes[site]:
            assert process.pid
            os.kill(process.pid, number)

    def logs(self) -> str:
        """What all ranks wrote."""
        return "".join(f"{path.name}:\n{path.read_text()}\n" for path in sorted(self.folder.glob("log_*")))

    def wait(self, mark: str) -> None:
        wait_until((self.folder / mark).exists)

    def appears(self, mark: str, seconds: float) -> bool:
        """Whether a mark is there within so many seconds."""
        late = time.monotonic() + seconds
        while not (found := (self.folder / mark).exists()) and time.monotonic() < late:
            time.sleep(0.02)
        return found

    def mark(self, name: str) -> None:
        (self.folder / name).touch()

    def start_coordinator(self) -> None:
        if self.config.transport != "torchft":
            return
        self.coordinator = forks().Process(target=_coordinator_main, args=(self.config, self.folder), daemon=True)
        self.coordinator.start()

    def kill_coordinator(self) -> None:
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.join()

    def said(self) -> str:
        """What the coordinator wrote."""
        return (self.folder / "coordinator").read_text()

    def end(self) -> None:
        for process in [p for group in self.processes.values() for p in group] + [self.coordinator]:
            if process is not None and process.is_alive():
                process.kill()
                process.join()


@contextmanager
def sites_of(
    folder: Path, transport: str, sites: int, ranks: int = 1, *, coordinator: bool = True, **keys: Any
) -> Iterator[Sites]:
    """Sites with a coordinator, for the time of a `with` block."""
    found = Sites(folder, transport, sites, ranks, **keys)
    if coordinator:
        found.start_coordinator()
    try:
        yield found
    finally:
        found.end()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _result(folder: Path, process: BaseProcess) -> Path:
    return folder / f"result_{process.pid}"


def _rank_main(
    scenario: Scenario,
    arguments: tuple[Any, ...],
    config: DecentralConfig,
    folder: Path,
    start: int,
    rank: int,
    ranks: int,
) -> None:
    torch.set_num_threads(1)
    hurry()
    sys.stderr = (folder / f"log_{config.site}_{start}_{rank}").open("w")
    if ranks > 1:
        store = dist.FileStore(str(folder / f"store_{start}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        result = scenario(Here(config, folder), *arguments)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    sys.stderr.flush()
    torch.save(result, folder / f"result_{os.getpid()}")
    # A thread of a meeting that was given up may still wait for an answer.
    os._exit(0)


def _coordinator_main(config: DecentralConfig, folder: Path) -> None:
    hurry()
    sys.stdout = (folder / "coordinator").open("a", buffering=1)
    sys.exit(coordinate(config))
