"""Experts of a round that travel while training goes on.

Nothing trains a frozen expert, so its copy may be replaced after any step; what counts is that all sites do it after
the same one. The round's owners send their experts as they were when it opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Thread

import torch

from pretrain.decentral.experts import Item, stage_experts
from pretrain.decentral.transport import Round, RoundError


class LateExperts:
    """One exchange of experts in a thread of its own."""

    def __init__(
        self,
        round_: Round,
        items: Sequence[Item],
        publisher: Callable[[int], int | None],
        *,
        carrier: int,
        bucket_bytes: int,
        arrival_step: int,
    ) -> None:
        """Begins at once. `round_`: a background one, for this exchange alone; the rest as for `stage_experts`."""
        self.round = round_
        self.items, self.publisher, self.carrier = items, publisher, carrier
        self.arrival_step = arrival_step
        """The step after which they are put in place."""
        self._published = [
            replace(item, tensor=item.tensor.to("cpu", copy=True))
            if item.carrier == carrier and publisher(item.owner) == round_.site
            else item
            for item in items
        ]
        self._staged: dict[tuple[str, int], torch.Tensor] | None = None
        self._error: Exception | None = None
        self._thread = Thread(target=self._exchange, args=(bucket_bytes,), name="experts", daemon=True)
        self._thread.start()

    @property
    def carried(self) -> list[torch.Tensor]:
        """What this rank sends, as it was when the round opened, and its copies of what it receives.

        The same at all members once they are in place; who trains them has gone on from there.
        """
        return [item.tensor for item in self._published if item.carrier == self.carrier]

    def _exchange(self, bucket_bytes: int) -> None:
        try:
            self._staged = stage_experts(
                self.round, self._published, self.publisher, carrier=self.carrier, bucket_bytes=bucket_bytes
            )
        except Exception as error:
            self._error = error

    def arrived(self) -> dict[tuple[str, int], torch.Tensor] | None:
        """What `stage_experts` gives, when all members have theirs; None when one failed. Waits. Collective."""
        self._thread.join()
        if self._error and not isinstance(self._error, RoundError):
            raise self._error
        committed = self.round.commit(self._staged is not None)
        return self._staged if committed else None
