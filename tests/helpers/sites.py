"""Several sites on this machine, each a set of processes with a process group of its own."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config.schema import Config
from tests.helpers.distributed import rank_main
from tests.helpers.forks import forks


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """The processes of one site, each calling `fn(*args)`."""

    def __init__(self, fn: Callable[..., Any], ranks: int, *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.ranks = ranks
        self.processes: list[BaseProcess] = [
            forks().Process(target=rank_main, args=(rank, fn, ranks, self._folder.name, args, dict(os.environ)))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """End all of its processes at once, as a power cut does."""
        for process in self.processes:
            process.kill()

    def results(self) -> list[Any]:
        """What each rank returned, when all have. Raises AssertionError with the first traceback of one that failed."""
        for process in self.processes:
            process.join()
        folder = Path(self._folder.name)
        errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
        assert not errors, f"{errors[0].stem} of {self.ranks}:\n{errors[0].read_text()}"
        assert [process.exitcode for process in self.processes] == [0] * self.ranks
        # Our own files, written a moment ago by our own processes.
        return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(self.ranks)]

    def close(self) -> None:
        """End what still runs, and clean up."""
        self.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


def run_sites(fn: Callable[..., Any], ranks: int, arguments: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Call the module-level `fn(*arguments[site])` on `ranks` fresh processes for each site at once.

    Returns every rank's return value, site by site. Raises as `Site.results`.
    """
    with ExitStack() as stack:
        sites = [Site(fn, ranks, *of_one) for of_one in arguments]
        for site in sites:
            stack.callback(site.close)
        return [site.results() for site in sites]


def at_site(config: Config, site: int) -> Config:
    """The configuration as site number `site` has it."""
    assert config.decentral
    return config.model_copy(update={"decentral": config.decentral.model_copy(update={"site": site})})


class GroupRound:
    """A round of sites that are the ranks of the default group, one each: for tests of what is exchanged."""

    def __init__(self) -> None:
        self.members = tuple(range(dist.get_world_size()))
        self.site = dist.get_rank()
        self.headers: Mapping[int, Any] = {}
        self.largest = 0
        """Bytes of the largest tensor that was given to a collective."""

    def sum_(self, tensor: torch.Tensor) -> None:
        self.largest = max(self.largest, tensor.nbytes)
        dist.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.largest = max(self.largest, tensor.nbytes)
        parts = [torch.empty_like(tensor) for _ in self.members]
        dist.all_gather(parts, tensor)
        return parts
