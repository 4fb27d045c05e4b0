"""What `pretrain ckpt ls` and `pretrain ckpt verify` show."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.format import CONFIG, STATE
from pretrain.checkpoint.steps import Moment, list_moments
from pretrain.checkpoint.verify import read_json, read_manifest, read_text, verify_checkpoint
from pretrain.errors import CheckpointError

LS_HEADER = ("step", "tokens", "size", "created", "written by", "valid")


@dataclass(frozen=True)
class CheckpointRow:
    """One line of `pretrain ckpt ls`."""

    moment: Moment
    tokens: int | None = None
    bytes: int | None = None
    created: str = ""
    layout: str = ""
    """Processes and parallel sizes that wrote it, such as `8 ranks, tensor 2, expert 4`."""
    problem: str = ""
    """First finding of the check; empty when valid."""

    def cells(self) -> tuple[str, ...]:
        """Texts in the order of LS_HEADER."""
        return (
            f"{self.moment.step} grown" if self.moment.grown else str(self.moment.step),
            "" if self.tokens is None else f"{self.tokens:,}",
            "" if self.bytes is None else f"{self.bytes / 2**20:,.1f} MiB",
            self.created,
            self.layout,
            f"no: {self.problem}" if self.problem else "yes",
        )


def list_checkpoints(run: Path, *, deep: bool = False) -> list[CheckpointRow]:
    """A row per checkpoint of a run directory, oldest first. Raises CheckpointError when there are none."""
    return [_row(moment, path, deep=deep) for moment, path in _checkpoints(run).items()]


def verify_checkpoints(run: Path, *, deep: bool = True) -> dict[Path, list[str]]:
    """Findings per checkpoint of a run directory, oldest first. Raises CheckpointError when there are none."""
    return {path: verify_checkpoint(path, deep=deep) for path in _checkpoints(run).values()}


def _checkpoints(run: Path) -> dict[Moment, Path]:
    found = list_moments(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoints (expected {run / 'checkpoints'}/step_*)")
    return found


def _row(moment: Moment, path: Path, *, deep: bool) -> CheckpointRow:
    if findings := verify_checkpoint(path, deep=deep):
        return CheckpointRow(moment, problem=findings[0])
    manifest = read_manifest(path)
    parallel = tomllib.loads(read_text(path, manifest, CONFIG).decode()).get("parallel", {})
    sizes = [f"{name} {size}" for name, size in parallel.items() if type(size) is int and size > 1]
    ranks = f"{manifest.world_size} rank{'s' if manifest.world_size > 1 else ''}"
    tokens = read_json(path, manifest, STATE).get("tokens")
    return CheckpointRow(
        moment,
        tokens=tokens if isinstance(tokens, int) else None,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        created=manifest.created,
        layout=", ".join([ranks, *sizes]),
    )
