"""Experts that a site does not train: copies in compute precision, which their owners publish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from pretrain.decentral.sending import from_publishers
from pretrain.decentral.transport import Round
from pretrain.model.shards import Shard
from pretrain.optim.exchange import spread


@dataclass(frozen=True)
class Item:
    """One expert's part of one tensor on this rank."""

    key: str
    expert: int
    """Its number in the whole model."""
    tensor: torch.Tensor
    """The live weight, in compute precision: a view, contiguous."""
    owner: int
    """The site that trains it."""
    carrier: int
    """Of the ranks of the site that hold copies, the one that sends or receives it (expert-data-parallel rank)."""


def expert_items(shards: Sequence[Shard], owner_of: Callable[[int], int], *, carriers: int) -> list[Item]:
    """This rank's experts, tensor by tensor, in an order that all sites share.

    carriers: expert-data-parallel size; the experts of each owner are dealt to these ranks in turn.
    """
    found: list[tuple[str, int, torch.Tensor]] = []
    for shard in shards:
        if shard.logical.is_expert:
            first, boxes = shard.offset[0], shard.view().detach()
            found += [(shard.key, first + i, box) for i, box in enumerate(boxes.unbind())]
    items, dealt = [], Counter[int]()
    # Shards come in the order of the model. Where a site's experts begin and end must not matter.
    order = {key: position for position, key in enumerate(dict.fromkeys(key for key, _, _ in found))}
    for key, expert, tensor in sorted(found, key=lambda entry: (order[entry[0]], entry[1])):
        owner = owner_of(expert)
        items.append(Item(key, expert, tensor, owner, dealt[owner] % carriers))
        dealt[owner] += 1
    return items


def stage_experts(
    round_: Round,
    items: Sequence[Item],
    publisher: Callable[[int], int | None],
    *,
    carrier: int,
    bucket_bytes: int,
) -> dict[tuple[str, int], torch.Tensor]:
    """What other sites publish of the items this rank carries: (key, expert) -> host tensor in compute precision.

    publisher: owner -> the member that sends its experts, or None. Raises RoundError when a member fails.
    """
    carried, publishers = [], []
    for item in items:
        sender = publisher(item.owner)
        if item.carrier == carrier and sender is not None:
            carried.append(item)
            publishers.append(sender)
    received = from_publishers(round_, [item.tensor for item in carried], publishers, bucket_bytes=bucket_bytes)
    return {
        (item.key, item.expert): tensor for item, tensor in zip(carried, received, strict=True) if tensor is not None
    }


@torch.no_grad()
def take_experts(
    items: Sequence[Item],
    staged: Mapping[tuple[str, int], torch.Tensor],
    publisher: Callable[[int], int | None],
    *,
    site: int,
    group: ProcessGroup,
) -> None:
    """Put staged experts in place and hand them to the other copies inside the site. Collective over `group`.

    publisher: as for `stage_experts`. site: this one. group: the expert-data-parallel one.
    """
    for item in items:
        if (item.key, item.expert) in staged:
            item.tensor.copy_(staged[item.key, item.expert])
    taken = [item for item in items if publisher(item.owner) not in (None, site)]
    spread([item.tensor for item in taken], [item.carrier for item in taken], group)
