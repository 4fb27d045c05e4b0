"""Whether the sites really have the same after a round, and after what comes late of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from pretrain.decentral.transport import Round, RoundError


def compare(round_: Round, tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Compare the bytes of tensors with the ranks of this number at the other members; returns what to note of it.

    Raises RuntimeError where they differ. When a member has failed meanwhile, the round stands: the note says that
    nothing was compared, and the member takes over what it missed when it comes back.
    """
    try:
        check_same(round_, digest(tensors))
    except RoundError as error:
        return {"unchecked": str(error)}
    return {}


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Hash of the bytes of contiguous tensors, in order: uint8 [32] on the host."""
    found = hashlib.blake2b(digest_size=32)
    for tensor in tensors:
        found.update(tensor.detach().view(-1).view(torch.uint8).cpu().numpy().data)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def check_same(round_: Round, mine: torch.Tensor) -> None:
    """Compare digests with the ranks of this number at the other members.

    Raises RuntimeError, naming the sites that differ from the first, and RoundError when a member has failed meanwhile.
    """
    digests = round_.all_gather(mine)
    differing = [
        site for site, other in zip(round_.members, digests, strict=True) if not torch.equal(other, digests[0])
    ]
    if differing:
        raise RuntimeError(
            f"after the round, site {', '.join(map(str, differing))} has other weights than site {round_.members[0]}"
        )
