"""The bytes that a round says it sends are those that the network carries."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decentral.sites import Here, sites_of

ROOT = Path(__file__).parents[2]
COUNT = 4_000_000
SITES = 3
HEADERS = 14 + 20 + 32
"""Of a packet, in bytes: Ethernet's, IP's and TCP's with its timestamps. An acknowledgement is a packet, too."""
SHARE, FEW = 0.01, 100_000
"""What may come on top: gloo heads every message, of some hundred KiB or more here, with less than 100 bytes; TCP
sends again what it believes lost, when the machine is busy; sites say with few bytes a second that they live."""

COLLECTIVES = ("sum", "gather", "broadcast")


def carried() -> int:
    """Bytes that the loopback interface of this network namespace has carried, without headers of packets."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    received, packets = map(int, line.split(":")[1].split()[:2])
    return received - HEADERS * packets


def exchange(here: Here, collective: str) -> dict[str, Any]:
    """One large collective; what this rank says it sent, and what the interface carried meanwhile."""
    transport = here.transport()
    round_ = transport.open({})
    tensor = torch.ones(COUNT)
    wait_for_all(here, "begin")
    before = carried()
    wait_for_all(here, "counted")
    if collective == "sum":
        round_.sum_(tensor)
    elif collective == "gather":
        round_.all_gather(tensor)
    else:
        round_.broadcast_(tensor, 1)
    wait_for_all(here, "end")
    result = {"sent": round_.sent_bytes, "carried": carried() - before}
    wait_for_all(here, "read")
    transport.close()
    return result


def wait_for_all(here: Here, name: str) -> None:
    """A barrier that sends nothing."""
    here.mark(f"{name} {here.site}")
    for site in range(SITES):
        here.wait(f"{name} {site}")


def measure() -> dict[str, tuple[int, int]]:
    """What all sites say they sent, and what the interface carried, for every collective."""
    found = {}
    for collective in COLLECTIVES:
        with tempfile.TemporaryDirectory() as folder, sites_of(Path(folder), "fixed", SITES) as sites:
            sites.start_all(exchange, collective)
            results = [sites.results(site)[0] for site in range(SITES)]
            found[collective] = (sum(r["sent"] for r in results), max(r["carried"] for r in results))
    return found


def namespaces() -> bool:
    """Whether this user may have a network of their own."""
    try:
        return (
            subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="needs root, unshare and ip, for a network of its own")
def test_the_network_carries_what_is_counted() -> None:
    program = f"ip link set lo up && exec {sys.executable} -W ignore -m tests.decentral.test_bytes"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    tensor = 4 * COUNT
    ring = 2 * (SITES - 1) * tensor // SITES
    expected = {"sum": SITES * ring, "gather": SITES * (SITES - 1) * tensor, "broadcast": 2 * tensor}
    measured = json.loads(done.stdout.splitlines()[-1])
    assert {name: sent for name, (sent, _) in measured.items()} == expected
    fitting = {
        (name, other): abs(seen - sent) <= SHARE * sent + FEW
        for name, (_, seen) in measured.items()
        for other, (sent, _) in measured.items()
    }
    # The negative control: the count of another collective does not fit.
    assert fitting == {(name, other): name == other for name in COLLECTIVES for other in COLLECTIVES}, measured


if __name__ == "__main__":
    print(json.dumps(measure()))
