"""What the ranks of one save or load tell each other: small JSON values, and whether all of them succeeded.

JSON rather than torch.distributed's object collectives, which pickle. Works without a process group, as one rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pretrain.errors import CheckpointError, UserError


class Ranks:
    """The processes that work on a checkpoint together. All methods are collective.

    `group` (default: the default group) has to take CPU tensors. One thread at a time may use it: a background
    save needs a group of its own, or its collectives would mix with the training step's.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if distributed else 0
        self.size = dist.get_world_size(group) if distributed else 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        data = _encode(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, group_dst=0, group=self.group)
        return [_decode(part[: int(n)]) for part, n in zip(parts or [], lengths, strict=False)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; the other ranks' argument is ignored."""
        if self.size == 1:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, group_src=0, group=self.group)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, group_src=0, group=self.group)
        return _decode(data)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that succeeds on all ranks or raises the same error on all of them; also a barrier.

        A UserError becomes a CheckpointError everywhere, anything else (a bug of ours) a RuntimeError. The body
        holds no collectives: a rank that leaves it early would not take part in them.
        """
        cause: Exception | None = None
        try:
            yield
        except Exception as error:
            cause = error
        failures = self.gather(None if cause is None else _failure(cause))
        first = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), None)
        verdict = self.broadcast(first)
        if verdict is None:
            return
        rank, (kind, text) = verdict
        where = f"rank {rank}: " if self.size > 1 else ""
        raise (CheckpointError if kind == "user" else RuntimeError)(where + text) from cause


def _failure(error: Exception) -> tuple[str, str]:
    return ("user", str(error)) if isinstance(error, UserError) else ("bug", f"{type(error).__name__}: {error}")


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
