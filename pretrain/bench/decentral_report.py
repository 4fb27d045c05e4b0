"""What the benchmark prints of synchronisation: times beside the peers', where they go, and their share of training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from pretrain.bench.decentral import Share, SyncResult
from pretrain.bench.measure import ratio
from pretrain.bench.report import aligned
from pretrain.bench.site import GLOO, OURS, SOCKETS
from pretrain.model.counts import count_parameters
from pretrain.plan.decentral import LINKS

PARTS = ("meeting", "collectives", "staging", "vote", "applying", "checking")


def tables(results: Sequence[SyncResult]) -> str:
    """The results of one network: a heading, the exchange beside its peers, and the parts of a round."""
    first = results[0]
    millions = count_parameters(first.workload.model).total / 1e6
    heading = (
        f"synchronisation over {first.link or 'loopback'}: {first.workload.name}, {millions:.0f} M parameters, shared "
        "ones in fp32, experts in bf16; seconds by the wall clock, of the slowest site"
    )
    compared = ["sites", "sent MB", "exchange", "plain gloo", "raw sockets", "exchange / gloo", "exchange / sockets"]
    if first.link:
        compared += ["bytes / rate + delays", "exchange / that"]
    spent = ["sites", "a round", *PARTS]
    return "\n".join(
        [
            *[heading, "", *aligned([compared, ["---"] * len(compared), *map(_compared, results)])],
            *["", *aligned([spent, ["---"] * len(spent), *map(_spent, results)])],
        ]
    )


def _compared(result: SyncResult) -> list[str]:
    row = [str(result.sites), f"{result.sent_bytes / 1e6:.1f}"]
    row += [_seconds(result.seconds[name]) for name in (OURS, GLOO, SOCKETS)]
    for peer in (GLOO, SOCKETS):
        found = ratio(result.seconds[OURS], result.seconds[peer])
        row.append(f"{found.of_medians:.2f}, {found.per_round:.2f}")
    if result.link_seconds is not None:
        row += [f"{result.link_seconds:.2f}", f"{statistics.median(result.seconds[OURS]) / result.link_seconds:.2f}"]
    return row


def _spent(result: SyncResult) -> list[str]:
    medians = [statistics.median(asdict(parts)[name] for parts in result.parts) for name in PARTS]
    total = statistics.median(parts.total for parts in result.parts)
    return [str(result.sites), f"{total:.2f}", *(f"{seconds:.3f}" for seconds in medians)]


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def share_table(shares: Sequence[Share]) -> str:
    """Seconds of a round of the 7B, and its share of the time of training, by the link of a site."""
    header = ["7B, 4 sites", "sent GB", *LINKS]
    rows = [
        [
            share.kind,
            f"{share.sent_bytes / 1e9:.1f}",
            *(f"{share.seconds[link]:,.0f} s, {share.of(link):.2%}" for link in LINKS),
        ]
        for share in shares
    ]
    heading = (
        "share of training by calculation, a round's bytes over the rate of a site's link, without latency; "
        f"{shares[0].training_seconds:,.0f} s of training between rounds"
    )
    return "\n".join([heading, "", *aligned([header, ["---"] * len(header), *rows])])


def verdict(results: Sequence[SyncResult]) -> str:
    """Whether the bytes sent are those planned, a line per result."""
    return "\n".join(_judged(result) for result in results)


def _judged(result: SyncResult) -> str:
    share = result.sent_bytes / result.planned_bytes
    holds = "holds" if abs(share - 1) <= 0.01 else "MISSED"
    where = f"{result.link or 'loopback'}, {result.sites} sites"
    return f"{where}: sent {share:.4f} of the bytes planned, target 1.00 +- 0.01: {holds}"
