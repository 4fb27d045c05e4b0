"""Both transports while nothing fails: collectives, headers, transactions, bytes, sockets, and no pickles."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from pretrain.decentral.transport import Round
from tests.decentral.sites import Here, sites_of

TRANSPORTS = ["torchft", "fixed"]


@contextmanager
def no_pickles() -> Iterator[None]:
    """Let this process load none."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle is loaded")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, forbidden)
        patch.setattr(dist.distributed_c10d, "_unpickler", forbidden)
        patch.setattr(torch, "load", forbidden)
        yield


def listening() -> set[str]:
    """The addresses that this process listens on."""
    return {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def use(round_: Round, number: int) -> dict[str, Any]:
    """Every collective, with tensors that tell who sent them, and three transactions."""
    total = torch.full((1001,), float(number))
    round_.sum_(total)
    parts = round_.all_gather(torch.full((3, 2), number, dtype=torch.bfloat16))
    value = torch.tensor(number, dtype=torch.float64)
    round_.broadcast_(value, round_.members[1])
    nothing = torch.empty(0, 3)
    round_.sum_(nothing)
    return {
        "total": total.unique().tolist(),
        "parts": [(part.dtype, part.shape, part.unique().tolist()) for part in parts],
        "value": value.item(),
        "committed": [round_.commit(True), round_.commit(number != 11), round_.commit(True)],
        "sent": round_.sent_bytes,
    }


def exchange(here: Here) -> list[Any]:
    """Two rounds; a second thread has collectives and transactions of its own in each."""
    with no_pickles(), ThreadPoolExecutor(1) as pool:
        transport = here.transport()
        results = []
        for turn in range(2):
            round_ = transport.open({"turn": turn, "said by": here.site})
            number = 10 * here.site + here.rank
            other = pool.submit(use, round_.background(), number)
            results.append((round_.members, dict(round_.headers), use(round_, number), other.result(), listening()))
        if here.ranks.size > 1:
            with pytest.raises(AssertionError, match="a pickle"):  # the check sees what torch would send
                dist.all_gather_object([None] * here.ranks.size, here.rank)
        transport.close()
    return results


def tree_bytes(site: int, sites: int, source: int, size: int) -> int:
    """What a site sends in a broadcast in which who has the value passes it on to the one 1, 2, 4, ... further on."""
    have, sent = [0], dict.fromkeys(range(sites), 0)
    step = 1
    while step < sites:
        for position in list(have):
            if position + step < sites and position < step:
                sent[position] += size
                have.append(position + step)
        step *= 2
    assert sorted(have) == list(range(sites)), "everybody has it"
    return sent[(site - source) % sites]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("sites", "ranks", "bind"), [(2, 2, "127.0.0.1"), (3, 1, "127.0.0.2")])
def test_exchange(tmp_path: Path, transport: str, sites: int, ranks: int, bind: str) -> None:
    with sites_of(tmp_path, transport, sites, ranks, bind=bind, expert_delay_steps=1) as all_sites:
        all_sites.start_all(exchange)
        for site in range(sites):
            for rank, turns in enumerate(all_sites.results(site)):
                assert isinstance(turns, list), turns
                for turn, (members, headers, *uses, addresses) in enumerate(turns):
                    assert members == tuple(range(sites))
                    assert headers == {other: {"turn": turn, "said by": other} for other in range(sites)}
                    if ranks == 1:  # torch's own group within a site listens where the name of the machine points
                        assert addresses == {bind}
                    for result in uses:
                        check_use(result, site, rank, sites, ranks)
        if all_sites.coordinator:
            process = psutil.Process(all_sites.coordinator.pid)
            assert {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN} == {bind}


def check_use(result: dict[str, Any], site: int, rank: int, sites: int, ranks: int) -> None:
    numbers = [10 * other + rank for other in range(sites)]
    assert result["total"] == [sum(numbers)]
    assert result["parts"] == [(torch.bfloat16, (3, 2), [number]) for number in numbers]
    assert result["value"] == numbers[1]
    # Rank 1 of site 1 alone said no to the second.
    assert result["committed"] == [True, ranks == 1, True]
    ring, gather = 2 * (sites - 1) * 4004 // sites, (sites - 1) * 12
    assert result["sent"] == ring + gather + tree_bytes(site, sites, 1, 8)


def test_listening_elsewhere_is_seen() -> None:
    with socket.create_server(("", 0)):
        assert "0.0.0.0" in listening()
