"""Several sites on this machine, each a set of processes with a process group of its own."""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.ranks import Ranks
from pretrain.config.decentral import DecentralConfig
from pretrain.config.schema import Config
from tests.helpers.distributed import TIMEOUT, rank_main
from tests.helpers.forks import forks


def free_port() -> int:
    """The first of two ports that nobody listens at (a coordinator takes both), and that systems do not hand out."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


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

    @property
    def has_ended(self) -> bool:
        """Whether no process of it runs any more."""
        return not any(process.is_alive() for process in self.processes)

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


class ScriptedRound(GroupRound):
    """A round of the sites that a script names, over files of a folder; all of them are well-behaved."""

    def __init__(self, folder: Path, name: str, members: Sequence[int], site: int, ranks: Ranks) -> None:
        self.members, self.site, self._ranks = tuple(members), site, ranks
        self.headers, self.largest, self.sent_bytes = {}, 0, 0
        self._folder, self._name = folder, name
        store = dist.FileStore(str(folder / f"store_{name}"), len(self.members) * ranks.size)
        rank, size = self.members.index(site), len(self.members)
        self.group = dist.ProcessGroupGloo(dist.PrefixStore(str(ranks.rank), store), rank, size, TIMEOUT)
        self._everyone = dist.ProcessGroupGloo(
            dist.PrefixStore("all", store), rank * ranks.size + ranks.rank, size * ranks.size, TIMEOUT
        )

    def exchange(self, header: Mapping[str, Any]) -> None:
        """Give every member's header to all."""
        (self._folder / f"header_{self._name}_{self.site}").write_text(json.dumps(header))
        self._everyone.barrier().wait()
        for site in self.members:
            self.headers[site] = json.loads((self._folder / f"header_{self._name}_{site}").read_text())

    def sum_(self, tensor: torch.Tensor) -> None:
        self.largest = max(self.largest, tensor.nbytes)
        self.sent_bytes += tensor.nbytes
        self.group.allreduce([tensor]).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.largest = max(self.largest, tensor.nbytes)
        self.sent_bytes += tensor.nbytes
        parts = [torch.empty_like(tensor) for _ in self.members]
        self.group.allgather([parts], [tensor]).wait()
        return parts

    def commit(self, ok: bool) -> bool:
        votes = torch.tensor([int(ok)])
        self._everyone.allreduce([votes]).wait()
        return int(votes) == len(self.members) * self._ranks.size

    def background(self) -> ScriptedRound:
        return ScriptedRound(self._folder, f"{self._name}_background", self.members, self.site, self._ranks)


class ScriptedTransport:
    """Meetings whose members are known beforehand: those of the meeting after step s are `members[s]`, or all sites."""

    def __init__(
        self,
        folder: Path,
        config: DecentralConfig,
        ranks: Ranks,
        members: Mapping[int, Sequence[int]],
        first: int | None = None,
    ) -> None:
        """`first`: the step after which the others meet whom this site joins at its start, where it is behind."""
        self._folder, self._config, self._ranks, self._members = folder, config, ranks, members
        self._next = first
        self.rounds: list[ScriptedRound] = []

    def open(self, header: Mapping[str, Any]) -> ScriptedRound:
        step = int(header["step"]) if self._next is None else self._next
        self._next = None
        members = self._members.get(step, range(self._config.sites))
        name = f"{step}_{len(self.rounds) if step == 0 else ''}_{'_'.join(map(str, members))}"
        round_ = ScriptedRound(self._folder, name, members, self._config.site, self._ranks)
        round_.exchange(header)
        self.rounds.append(round_)
        return round_

    def close(self) -> None:
        """Nothing to end."""
