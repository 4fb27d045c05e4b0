"""What each site is in a round, from what the sites say of themselves when they meet.

A pure function of the headers, which all members have: all come to the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config.load import flat_keys
from pretrain.config.schema import Config
from pretrain.errors import ConfigError

LOCAL_KEYS = ("run.directory", "decentral.site", "decentral.bind", "decentral.coordinator")
LOCAL_SECTIONS = ("data.", "metrics.", "checkpoint.", "eval.")
"""What sites may differ in."""

Header = Mapping[str, Any]
"""What a site says of itself, JSON: among it `round` (synchronisations its weights have been through; -1: it has not
met the other sites yet), `step`, `due` (whether a synchronisation comes after this step), `late` (whether experts of
its last synchronisation have yet to come), and `config` (key -> value of what all sites must have in common)."""


@dataclass(frozen=True)
class Roles:
    """Who gives and who takes in a round. Site numbers."""

    averaging: bool
    """Whether this is a synchronisation; else sites only meet, at a start."""
    givers: tuple[int, ...]
    """Sites whose shared weights are averaged."""
    fresh: frozenset[int]
    """Sites that were in the last synchronisation: their experts and moments are up to date."""
    takers: frozenset[int]
    """Sites that take over the shared weights of this round."""
    stale: frozenset[int]
    """Sites that missed a synchronisation, or begin: they take over all weights, and their moments are void."""
    moved: frozenset[int]
    """Sites that take over the position, as they were at an earlier step than the givers."""
    behind: frozenset[int]
    """Those of `fresh` whose copies of others' experts are of the synchronisation before: they were restarted before
    the late ones had come."""

    @property
    def source(self) -> int:
        """The site that stands for all givers where they have the same."""
        return self.givers[0]

    @property
    def keeper(self) -> int:
        """The site that sends experts which their owners do not: the source, if one with newer copies is not there."""
        return self.source if self.source not in self.behind else min(self.fresh - self.behind, default=self.source)

    @property
    def moves_anything(self) -> bool:
        """Whether weights travel in this round."""
        return self.averaging or bool(self.stale)

    def publisher(self, owner: int) -> int | None:
        """Who sends the experts of a site; None: nobody, as all have them as they last were."""
        if self.averaging and owner in self.fresh:
            return owner
        return self.keeper if self.stale or self.behind else None


def roles_of(headers: Mapping[int, Header]) -> Roles:
    """The roles of the sites of a round. `headers`: site -> what it says.

    Those that are the furthest (in rounds, then in steps) give. When they have come for a synchronisation, their mean
    is what all take over. Else only sites that missed a round take anything, from the first giver. When all begin,
    every site takes what the first one has: they need not have drawn the same initial weights.
    """
    furthest = max((header["round"], header["step"]) for header in headers.values())
    at_front = sorted(site for site, header in headers.items() if (header["round"], header["step"]) == furthest)
    averaging = bool(headers[at_front[0]]["due"])
    fresh = frozenset(site for site, header in headers.items() if header["round"] == furthest[0])
    if furthest[0] < 0:
        fresh = frozenset(at_front[:1])
    stale = frozenset(headers) - fresh
    late = frozenset(site for site, header in headers.items() if header["late"])
    return Roles(
        averaging=averaging,
        givers=tuple(at_front if averaging else at_front[:1]),
        fresh=fresh,
        takers=frozenset(headers) if averaging else stale,
        stale=stale,
        moved=frozenset(headers) - frozenset(at_front),
        behind=fresh & late,
    )


def common_keys(config: Config) -> dict[str, Any]:
    """The keys that all sites of a run must have in common, with their values."""
    return {
        key: value
        for key, value in flat_keys(config).items()
        if key not in LOCAL_KEYS and not key.startswith(LOCAL_SECTIONS)
    }


def check_same_run(headers: Mapping[int, Header], *, site: int, source: int) -> None:
    """Raises ConfigError when a site differs from the one that gives in a key of `config`; others go on without it."""
    mine, theirs = headers[site]["config"], headers[source]["config"]
    problems = [
        f"{key} = {mine.get(key)}: site {source} has {theirs.get(key)}, and all sites run the same; give both the same "
        f"value"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]
    if problems:
        raise ConfigError(problems)
