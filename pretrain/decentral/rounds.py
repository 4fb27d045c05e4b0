"""A round on one rank: collectives over gloo with bounded waits, and transactions.

Bytes sent are counted as gloo's algorithms send them. With m members and a tensor of n bytes: all-reduce is a ring of
reduce-scatter and all-gather, 2 (m - 1) / m n; all-gather is a ring that passes every part on, (m - 1) n; broadcast is
a binomial tree, in which the member at position v behind the source has as many children as there are powers of two
2^i > v with v + 2^i < m. Framing, votes and signs of life come on top; they do not grow with the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.decentral.board import Address, connect, within
from pretrain.decentral.meetings import Meeting
from pretrain.decentral.transport import Round, RoundError


class GlooRound:
    """`transport.Round` over gloo.

    Args:
        agree: whether all ranks of all members say ok, under this name.
        background: the round for another thread, if there is one.
    """

    def __init__(
        self,
        meeting: Meeting,
        site: int,
        group: dist.ProcessGroupGloo,
        agree: Callable[[str, bool], bool],
        *,
        background: GlooRound | None = None,
        name: str = "",
    ) -> None:
        self.members, self.headers = meeting.members, dict(meeting.headers)
        self.site = site
        self.sent_bytes = 0
        self.name = name or meeting.name
        """Of this round alone, and of this thread's part of it."""
        self._group: dist.ProcessGroupGloo | None = group
        self._agree, self._background = agree, background
        self._transactions = 0

    @property
    def group(self) -> dist.ProcessGroupGloo:
        """The outer group. Raises RoundError once a collective has failed, or the round has ended."""
        if self._group is None:
            raise RoundError(f"the connections of round {self.name} are closed")
        return self._group

    def sum_(self, tensor: torch.Tensor) -> None:
        """See `transport.Round`."""
        self._wait(lambda group: group.allreduce([tensor]))
        m = len(self.members)
        self.sent_bytes += 2 * (m - 1) * tensor.nbytes // m

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `transport.Round`."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.members]
        self._wait(lambda group: group.allgather([[_bytes(part) for part in parts]], [_bytes(tensor.contiguous())]))
        self.sent_bytes += (len(self.members) - 1) * tensor.nbytes
        return parts

    def broadcast_(self, tensor: torch.Tensor, source: int) -> None:
        """See `transport.Round`."""
        root = self.members.index(source)
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._wait(lambda group: group.broadcast([_bytes(tensor)], options))
        self.sent_bytes += children(self.members.index(self.site) - root, len(self.members)) * tensor.nbytes

    def commit(self, ok: bool) -> bool:
        """See `transport.Round`."""
        self._transactions += 1
        return self._agree(f"{self.name}/{self._transactions}", ok and self._group is not None)

    def background(self) -> Round:
        """See `transport.Round`."""
        assert self._background is not None, "decentral.expert_delay_steps is 0"
        return self._background

    def close(self) -> None:
        """Close the connections; members that are in a collective see it fail."""
        self._group = None
        if self._background is not None:
            self._background.close()

    def _wait(self, start: Callable[[Any], dist.Work]) -> None:
        work = start(self.group)
        try:
            work.wait()
        except RuntimeError as error:
            # gloo closes the connections with the last reference to the group: the others fail at once, too.
            self._group = None
            raise RoundError(str(error).splitlines()[0]) from error


def outer_group(
    board: Address, prefix: str, *, position: int, size: int, host: str, timeout_seconds: float
) -> dist.ProcessGroupGloo:
    """Connect the ranks that give the same prefix, and none else; every one listens on `host`.

    Raises:
        BoardError: the board is gone.
        RuntimeError: not all of them came in time.
    """

    def build() -> dist.ProcessGroupGloo:
        gloo: Any = dist.ProcessGroupGloo  # its stub knows nothing of its options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_seconds)
        return gloo(dist.PrefixStore(prefix, connect(board, timeout_seconds)), position, size, options)

    # gloo waits for the peers' addresses and then for their connections.
    return within(3 * timeout_seconds, build)


def children(position: int, size: int) -> int:
    """To how many others a member sends in gloo's broadcast; `position` is its distance from the source."""
    position %= size
    powers: Sequence[int] = [1 << i for i in range(size.bit_length())]
    return sum(power > position and position + power < size for power in powers)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor; gloo does not know every type."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8)
