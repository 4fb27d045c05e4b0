"""Both transports when nothing fails: collectives, headers, transactions, bytes, sockets, and no pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decentral.sites import Here, Sites, sites_of

TRANSPORTS = ["torchft", "fixed"]


def exchange(here: Here, commits: list[bool]) -> dict[str, Any]:
    """One round with every collective, and so many transactions."""
    transport = here.transport()
    round_ = transport.open({"site": here.site, "rank": here.rank})
    number = 10 * here.site + here.rank
    total = torch.full((1001,), float(number))
    round_.sum_(total)
    parts = round_.all_gather(torch.full((3, 2), number, dtype=torch.bfloat16))
    value = torch.tensor(number, dtype=torch.float64)
    round_.broadcast_(value, 1)
    committed = [round_.commit(ok) for ok in commits]
    result = {
        "members": round_.members,
        "headers": round_.headers,
        "total": total.unique().tolist(),
        "parts": [part.unique().tolist() for part in parts],
        "value": value.item(),
        "committed": committed,
        "sent": round_.sent_bytes,
    }
    transport.close()
    return result


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("sites", "ranks"), [(2, 2), (3, 1)])
def test_exchange(tmp_path: Path, transport: str, sites: int, ranks: int) -> None:
    with sites_of(tmp_path, transport, sites, ranks) as all_sites:
        all_sites.start_all(exchange, [True, True])
        for site in range(sites):
            for rank, result in enumerate(all_sites.results(site)):
                assert result["members"] == tuple(range(sites)), result
