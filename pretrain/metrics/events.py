"""Which of a run's events still hold after its restarts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# End of a checkpoint's name when it holds the model that had grown after the checkpoint's step.
GROWN = "_grown"


def events_in_force(events: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Events of this name, in order, that no restart took back: a `restart` to step 40 undoes those of steps 41 and on
    that were written before it; and a growth at step 40, unless it went on from the checkpoint after that growth."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "restart":
            kept = [earlier for earlier in kept if _survives(earlier, event)]
        if event["event"] == name:
            kept.append(event)
    return kept


def _survives(event: Mapping[str, Any], restart: Mapping[str, Any]) -> bool:
    if event["event"] == "growth" and event["step"] == restart["step"]:
        return str(restart.get("checkpoint")).endswith(GROWN)
    return bool(event["step"] <= restart["step"])
