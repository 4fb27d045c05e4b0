"""Run `pretrain` commands as a user would, and see what they say and what they leave behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forks import forks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Result:
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


class CommandProcess:
    """One process that runs commands one after another: torch is imported once, and no state of theirs gets here."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, *arguments: str | Path, **environment: str) -> Result:
        """`pretrain *arguments`, with some environment variables."""
        return self._pool.submit(_run, [str(argument) for argument in arguments], _environment(environment)).result()


@contextmanager
def command_process() -> Iterator[CommandProcess]:
    """A CommandProcess for the time of a `with` block."""
    with ProcessPoolExecutor(max_workers=1, mp_context=forks()) as pool:
        yield CommandProcess(pool)


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a test without what a launcher left there, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return kept | {"OMP_NUM_THREADS": "1"} | dict(changes)


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> Result:
    from pretrain.cli import main

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        # File descriptors, not sys.stdout: what C++ writes counts, too.
        with _into_file(1) as out, _into_file(2) as err:
            code = main(arguments)
        return Result(code, Path(out).read_text(), Path(err).read_text())
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _into_file(descriptor: int) -> Iterator[str]:
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    kept = os.dup(descriptor)
    with tempfile.NamedTemporaryFile(delete=False) as file:
        stream.flush()
        os.dup2(file.fileno(), descriptor)
        try:
            yield file.name
        finally:
            stream.flush()
            os.dup2(kept, descriptor)
            os.close(kept)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file below, and "" for folders. The lock says who had it last, and is left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.name != "run.lock"
    }


def torchrun(
    *arguments: str | Path, ranks: int = 2, max_restarts: int = 0, cwd: Path | None = None, **environment: str
) -> Result:
    """`torchrun ... *arguments` on this machine, with some environment variables; the exit code is torchrun's."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr)
