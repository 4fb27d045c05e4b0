"""What a synchronisation asks of the network between the sites, and how a run gets it.

A *site* is a job of its own, of several ranks; a *round* is one synchronisation; its *members* are the sites that take
part. Ranks that have the same number in their sites form an *outer group*. Every rank of a site makes the same calls.

    transport = open_transport(config.decentral, ranks)
    round = transport.open({"step": step})              # who is there, and what they say of themselves
    try:
        round.sum_(tensor)
        ok = True
    except RoundError:
        ok = False
    if not round.commit(ok):                            # all members or none
        ...                                             # discard what was received, and open again

Between `open` and `commit` come no collectives inside a site: a rank that fails leaves early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from pretrain.config.decentral import DecentralConfig
from pretrain.errors import UserError

if TYPE_CHECKING:  # it comes with all of megatron-core, which the coordinator does without
    from pretrain.checkpoint.ranks import Ranks

Header = dict[str, Any]
"""What a site says of itself when a round opens. JSON values."""


class RoundError(Exception):
    """A member failed or was late. What was received is worthless: go on to `commit(False)`."""


class SitesError(UserError):
    """Too few sites came in time, or this one does not fit the others: who is missing, and what to do."""


class StopWaitingError(Exception):
    """This site was asked to stop while it waited for others. Raised on all its ranks."""


class Round(Protocol):
    """One synchronisation, on this rank. For one thread at a time."""

    @property
    def members(self) -> tuple[int, ...]:
        """Site numbers, sorted."""

    @property
    def site(self) -> int:
        """This rank's own."""

    @property
    def headers(self) -> Mapping[int, Header]:
        """What every member said of itself, on every rank."""

    @property
    def group(self) -> dist.ProcessGroupGloo:
        """The outer group, in the order of `members`. Keep no reference: the connections would outlive the round."""

    @property
    def sent_bytes(self) -> int:
        """Payload that this rank has sent by the collectives below, as gloo's rings and trees do."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Add up a CPU tensor over the members, in place; the sum has the same bits on all. Raises RoundError."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The members' CPU tensors, of equal shape and type, in the order of `members`. Raises RoundError."""

    def broadcast_(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a contiguous CPU tensor with that of the site `source`. Raises RoundError."""

    def commit(self, ok: bool) -> bool:
        """Whether every rank of every member says ok. The same answer on all of them; never raises RoundError.

        May be called several times, a transaction each.

        Raises:
            SitesError: the answer cannot be had, as the coordinator is gone.
        """

    def background(self) -> Round:
        """The same members over connections and with transactions of its own, for use by one other thread.

        There is one when `decentral.expert_delay_steps` is not 0. It ends with the round, at the next `open`.
        """


class Transport(Protocol):
    """A site's connection to the others."""

    def open(self, header: Header) -> Round:
        """Meet the other sites for a round; ends the one before. Collective over the ranks of the site.

        `header` is that of the site's rank 0; the others' is ignored.

        Raises:
            SitesError: on all ranks of the site.
            StopWaitingError: on all ranks of the site.
        """

    def close(self) -> None:
        """Leave. The other sites notice within seconds."""


def open_transport(config: DecentralConfig, ranks: Ranks, stopping: Callable[[], bool] = lambda: False) -> Transport:
    """The transport that `decentral.transport` names. Collective over the ranks of the site.

    Args:
        config: section [decentral].
        ranks: those of this site, for the time of the transport.
        stopping: whether this rank was asked to stop; looked at now and then while `open` waits.

    Raises:
        UserError: torchft is not installed, or an address is none of this machine's.
    """
    # Here, as these modules import this one.
    from pretrain.decentral.fixed import FixedMeetings  # noqa: PLC0415
    from pretrain.decentral.site import SiteTransport  # noqa: PLC0415
    from pretrain.decentral.torchft_transport import LighthouseMeetings  # noqa: PLC0415

    make = FixedMeetings if config.transport == "fixed" else LighthouseMeetings
    return SiteTransport(config, ranks, stopping, make)
