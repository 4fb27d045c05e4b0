"""Runs of several sites: which of the histories belong together, their rounds, and the lines they have in the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import RunDirectoryError
from pretrain.metrics.formats import byte_count, duration
from pretrain.metrics.history import History
from pretrain.metrics.recorder import METRICS_FILE

SITE_FOLDER = re.compile(r"site_(\d+)")
"""Name of a site's folder in the directory of its run."""
NONE = "-"

Role = Literal["member", "moved", "stale", "absent"]
"""Of a site in a round. moved: it came from an earlier step; stale: it took over all weights, having missed a round."""


@dataclass
class SiteRun:
    """The sites of one run, as far as there are histories of them."""

    directory: Path
    sites: dict[int, History] = field(default_factory=dict)
    """By number."""

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A `sync` event for each round that one of the sites still has in force, by number of the round.

        What a restart took back at one site stands at those that went on.
        """
        found: dict[int, dict[str, Any]] = {}
        for history in self.sites.values():
            for event in history.events_in_force("sync"):
                found.setdefault(event["round"], event)
        return [found[number] for number in sorted(found)]

    @property
    def numbers(self) -> list[int]:
        """Of all sites, also of those without a history."""
        told = (site for event in self.rounds for site in (*event["members"], *event["absent"]))
        return sorted({*self.sites, *told})


def role(site: int, event: dict[str, Any]) -> Role:
    """What a site was in the round of a `sync` event."""
    if site in event["absent"]:
        return "absent"
    if site in event.get("stale", ()):
        return "stale"
    return "moved" if site in event.get("moved", ()) else "member"


def with_sites(run_dirs: Sequence[Path]) -> list[Path]:
    """The run directories, with those of its sites in place of one that has sites.

    Raises RunDirectoryError for a site that has written nothing yet.
    """
    found: list[Path] = []
    for directory in run_dirs:
        numbers = {} if (directory / METRICS_FILE).exists() else _site_folders(directory)
        found += [numbers[number] for number in sorted(numbers)] or [directory]
        if missing := [str(path) for path in numbers.values() if not (path / METRICS_FILE).exists()]:
            raise RunDirectoryError(
                f"{', '.join(missing)}: no {METRICS_FILE} in it yet: wait for the first step of this site, or give the "
                "folders of the other sites one by one"
            )
    return found


def _site_folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    matches = ((SITE_FOLDER.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def site_runs(histories: Sequence[History]) -> list[SiteRun]:
    """The runs of sites that have met in a round; histories without one are left out."""
    found: dict[Path, SiteRun] = {}
    for history in histories:
        if place := _place(history):
            directory, number = place
            found.setdefault(directory, SiteRun(directory)).sites[number] = history
    return [run for run in found.values() if run.rounds]


def _place(history: History) -> tuple[Path, int] | None:
    """Directory of the run, and number of the site; None for a run without sites."""
    full = history.directory.resolve()
    match = SITE_FOLDER.fullmatch(full.name)
    return (full.parent, int(match[1])) if match else None


def sent_bytes(history: History) -> list[tuple[int, int]]:
    """Step, and bytes that rank 0 of the site has sent by then to other sites, whatever a restart took back."""
    total, found = 0, []
    for event in history.events:
        if "sent_bytes" in event:
            total += event["sent_bytes"]
            found.append((event["step"], total))
    return found


def site_lines(histories: Sequence[History]) -> list[list[str]]:
    """Lines of the table on rounds, a cell for each history; none when no run has sites."""
    runs = site_runs(histories)
    if not runs:
        return []
    places = {run.directory: run for run in runs}
    lines = []
    for name, figure in SITE_FIELDS.items():
        cells = []
        for history in histories:
            place = _place(history)
            run = places.get(place[0]) if place else None
            cells.append(figure(run, place[1]) if run and place else NONE)
        lines.append([name, *cells])
    return lines


def _seconds(run: SiteRun, site: int) -> tuple[float, float]:
    """In rounds and waiting for late experts; part of it in waiting for others."""
    waited = worked = 0.0
    for event in run.sites[site].events:
        if event["event"] in ("sync", "experts"):
            waited += event["wait_seconds"]
            worked += event.get("seconds", 0.0)
    return waited + worked, waited


def _time(run: SiteRun, site: int) -> str:
    total, _ = _seconds(run, site)
    wall = run.sites[site].wall_seconds
    return duration(total) + (f" ({total / wall:.1%} of the wall time)" if wall else "")


def _waiting(run: SiteRun, site: int) -> str:
    total, waited = _seconds(run, site)
    return f"{waited / total:.1%}" if total else NONE


def _sent(run: SiteRun, site: int) -> str:
    sent = sent_bytes(run.sites[site])
    return byte_count(sent[-1][1]) if sent else NONE


def _rounds_as(run: SiteRun, site: int, *, absent: bool) -> str:
    return str(sum((role(site, event) == "absent") is absent for event in run.rounds))


SITE_FIELDS: dict[str, Callable[[SiteRun, int], str]] = {
    "rounds": lambda run, site: _rounds_as(run, site, absent=False),
    "rounds missed": lambda run, site: _rounds_as(run, site, absent=True),
    "bytes sent by rank 0": _sent,
    "time in synchronisation": _time,
    "- of it waiting for others": _waiting,
    "handovers of experts": lambda run, site: str(len(run.sites[site].events_in_force("handover"))),
}
