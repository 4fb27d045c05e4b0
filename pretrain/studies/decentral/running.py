"""Running the arms of the study: a process for the central run or for each site, none of which outlives its run.

Sites of which one is lost meet through a coordinator, so that the others go on. By what these write it is killed, and
started again: when they have been through a number of rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import torch

from pretrain.config.decentral import DecentralConfig
from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.decentral.coordinator import coordinate
from pretrain.errors import UserError
from pretrain.metrics.jsonl import read_jsonl
from pretrain.metrics.recorder import EVENTS_FILE
from pretrain.studies.decentral.arms import AWAY_SHARE, LOST_SHARE, Arm
from pretrain.tuning.running import LOG_FILE

CONFIG_FILE = "study.toml"
POLL_SECONDS = 0.1
RUN_SECONDS = 1800.0
"""A run that takes longer is stuck, and is ended."""
END_SECONDS = 10.0
"""What was asked to end is killed after so long."""

PRELOADED = ["pretrain.train", "pretrain.studies.decentral.running"]
"""Importing these takes longer than training has left when a lost site comes back: it is done once, and all processes
are forks of the one that has done it."""


class StoppedError(Exception):
    """The study was asked to stop; the run is trained anew when the study goes on."""


@dataclass(frozen=True)
class Task:
    """One run of the study."""

    arm: Arm
    seed: int
    key: str
    """Hash of everything that decides what it learns; names its directory."""
    config: Config

    @property
    def directory(self) -> Path:
        return self.config.run.directory

    @property
    def site_directories(self) -> list[Path]:
        """Where each site keeps its run; of the central run, its directory."""
        decentral = self.config.decentral
        if decentral is None:
            return [self.directory]
        sites = (decentral.model_copy(update={"site": site}) for site in range(decentral.sites))
        return [self.config.model_copy(update={"decentral": site}).site_directory for site in sites]

    @property
    def lost_site(self) -> int:
        return self.arm.sites - 1

    @property
    def label(self) -> str:
        """One line for people."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether all of its processes have come to their end."""
        files = [directory / EVENTS_FILE for directory in self.site_directories]
        return all(path.exists() and any(row["event"] == "finished" for row in read_jsonl(path)) for path in files)


Train = Callable[[Task, Callable[[], bool]], None]
"""Trains a run to its end: (run, whether the study was asked to stop). Raises UserError, or StoppedError."""


class Cores:
    """So many cores, of which each process of a run takes one. A run that wants more than there are takes all."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._changed = Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait for as many, and have them for the time of a `with` block."""
        count = min(count, self._count)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


def train_sites(task: Task, is_stopped: Callable[[], bool]) -> None:
    """Train a run in processes of its own, all of which have ended when this returns or raises.

    What an earlier attempt has left is removed: sites that go on from where they were cut off are no arm of the study.

    Raises:
        UserError: a process failed, or the run is stuck.
        StoppedError: the study was asked to stop.
    """
    shutil.rmtree(task.directory, ignore_errors=True)
    task.directory.mkdir(parents=True)
    (task.directory / CONFIG_FILE).write_text(dump_config(task.config))
    with ExitStack() as stack:
        run = _Processes(task, is_stopped, stack)
        decentral = task.config.decentral
        if decentral and decentral.transport == "torchft":
            run.start_coordinator(decentral)
        for site in range(task.arm.sites):
            run.start_site(site)
        if task.arm.loses_a_site:
            run.lose_a_site()
        run.wait(lambda: all(process.exitcode is not None for process in run.sites.values()))


_ports_given: set[int] = set()
_port_lock = Lock()


def free_ports() -> int:
    """A port of the loopback interface that nobody listens on now, nor on the next one: a coordinator takes both. No
    other call of this process has returned it: who asked for it may not listen yet."""
    while True:
        with _port_lock, socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            if _ports_given.isdisjoint((port, port + 1)):
                _ports_given.update((port, port + 1))
                return port


@dataclass
class _Processes:
    """The processes of a run."""

    task: Task
    is_stopped: Callable[[], bool]
    stack: ExitStack
    """Ends them when it is closed."""
    sites: dict[int, BaseProcess] = field(default_factory=dict)
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_ports()}")
    deadline: float = field(default_factory=lambda: time.monotonic() + RUN_SECONDS)

    def start_site(self, site: int) -> None:
        """Start the process of a site, instead of the one before."""
        words = ["train", str(self.task.directory / CONFIG_FILE)]
        if self.task.config.decentral:
            words += [f"--set=decentral.coordinator={self.address}", f"--set=decentral.site={site}"]
        self.sites[site] = self._start(_pretrain, words, _log(site))

    def start_coordinator(self, decentral: DecentralConfig) -> None:
        """Start what the sites meet through."""
        self._start(_coordinate, decentral.model_copy(update={"coordinator": self.address}), "coordinator.txt")

    def _start(self, run: Callable[[Any, Path], None], what: Any, log: str) -> BaseProcess:
        """Run something in a process of its own; what it prints goes to a file of the run."""
        process = _forks().Process(target=run, args=(what, self.task.directory / log))
        process.start()
        self.stack.callback(_end, process)
        return process

    def lose_a_site(self) -> None:
        """Kill a site after a share of the rounds, and let it go on from its checkpoint after some more.

        The others are paused until it has read its checkpoint: that takes longer than all that they have left to do.
        """
        site, rounds = self.task.lost_site, self.task.config.total_steps // self.task.arm.interval
        killed_after = max(1, round(LOST_SHARE * rounds))
        self.wait(lambda: self._count(0, "sync") >= killed_after)
        lost = self.sites.pop(site)
        lost.kill()
        lost.join()
        self.wait(lambda: self._count(0, "sync") >= killed_after + max(1, round(AWAY_SHARE * rounds)))
        with self._paused(*self.sites.values()):
            self.start_site(site)
            self.wait(lambda: self._count(site, "restart") > 0)

    @contextmanager
    def _paused(self, *processes: BaseProcess) -> Iterator[None]:
        try:
            for process in processes:
                _signal(process, signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                _signal(process, signal.SIGCONT)

    def _count(self, site: int, event: str) -> int:
        """Events of this name that a site has written."""
        path = self.task.site_directories[site] / EVENTS_FILE
        return sum(row["event"] == event for row in read_jsonl(path)) if path.exists() else 0

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Wait for something, as long as all goes well. Raises UserError or StoppedError."""
        while True:
            over = is_over()
            if self.is_stopped():
                raise StoppedError
            for site, process in self.sites.items():
                if process.exitcode:
                    raise UserError(
                        f"{self.task.directory / _log(site)}: the run {self.task.label} ended with code "
                        f"{process.exitcode}; see what it printed, and give the command again to go on"
                    )
            if over:
                return
            if time.monotonic() > self.deadline:
                raise UserError(
                    f"{self.task.directory}: the run {self.task.label} has not ended in {RUN_SECONDS:.0f} s; see what "
                    "its processes printed, and give the command again to go on"
                )
            time.sleep(POLL_SECONDS)


def _signal(process: BaseProcess, number: int) -> None:
    """Send a signal to a process of ours, unless it has ended."""
    if process.exitcode is None and process.pid:
        os.kill(process.pid, number)


def _log(site: int) -> str:
    return f"site_{site}_{LOG_FILE}"


def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _pretrain(words: Sequence[str], log: Path) -> None:
    """The command with these words, as a process of its own."""
    _settle(log)
    sys.argv = ["pretrain", *words]
    runpy.run_module("pretrain", run_name="__main__", alter_sys=True)


def _coordinate(decentral: DecentralConfig, log: Path) -> None:
    _settle(log)
    sys.exit(coordinate(decentral))


def _settle(log: Path) -> None:
    """Keep this process to one thread of the CPU, and write what it prints to a file."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    with log.open("ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)


def _end(process: BaseProcess) -> None:
    """End a process that may have ended already."""
    if process.exitcode is None:
        process.terminate()
        process.join(END_SECONDS)
    process.kill()
    process.join()
