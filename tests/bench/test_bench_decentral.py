"""The benchmark of synchronisation on a tiny model: it runs, counts what is planned, and its slow link is slow."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.bench import decentral_report, network
from pretrain.bench.decentral import SLOW_LINK, Share, SyncResult, training_shares
from pretrain.bench.network import Link, NetworkError, pass_on
from pretrain.bench.site import GLOO, OURS, SOCKETS, Parts, TimedRound, pass_around
from pretrain.decentral.meetings import Meeting
from tests.bench.test_bench import tiny
from tests.helpers.distributed import run_ranks

PARTS = Parts(meeting=0.5, collectives=2.0, staging=0.25, vote=0.125, applying=0.0625, checking=1.0)
RESULT = SyncResult(
    workload=tiny(),
    sites=2,
    link=SLOW_LINK,
    sent_bytes=10_000_000,
    planned_bytes=10_000_000,
    hops=3,
    parts=[PARTS] * 3,
    seconds={OURS: [2.25] * 3, GLOO: [1.5] * 3, SOCKETS: [0.75] * 3},
)


def run_bench(json_file: str) -> str:
    """`pretrain bench decentral --quick` on the tiny model where no slow network can be made; what it printed."""
    from pretrain.bench import command, decentral

    decentral.SMALL = tiny()
    network.TUN_DEVICE = Path("/dev/net/there-is-none")
    network.os.geteuid = lambda: 0
    network.shutil.which = lambda name: name
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert command.bench("decentral", rounds=1, quick=True, json_file=Path(json_file)) == 0
    return out.getvalue()


def test_a_synchronisation_sends_what_is_planned(tmp_path: Path) -> None:
    (printed,) = run_ranks(run_bench, 1, str(tmp_path / "bench.json"))
    (result,) = json.loads((tmp_path / "bench.json").read_text())["decentral"]
    assert result["sent_bytes"] == pytest.approx(result["planned_bytes"], rel=0.01)
    assert result["sent_bytes"] > 0
    assert (result["sites"], result["link"], result["hops"]) == (2, None, 3)
    (parts,) = result["parts"]
    assert all(seconds >= 0 for seconds in parts.values())
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {OURS: 1, GLOO: 1, SOCKETS: 1}
    assert "no figures over 100 Mbit/s, 50 ms: there is no /dev/net/there-is-none" in printed
    assert "loopback, 2 sites: sent 1.0000 of the bytes planned, target 1.00 +- 0.01: holds" in printed
    assert "| spes        | 15.0    | 1,201 s, 14.39% | 120 s, 1.65%" in printed


def test_what_is_said_of_a_result() -> None:
    # 80 Mbit over 100 Mbit/s, and three times 25 ms.
    assert RESULT.link_seconds == pytest.approx(0.875)
    assert replace(RESULT, link=None).link_seconds is None
    assert (PARTS.exchange, PARTS.total) == (2.25, 3.9375)
    lines = decentral_report.tables([RESULT]).splitlines()
    row, spent = lines[4], lines[8]
    assert "| 1.50, 1.50      | 3.00, 3.00         | 0.88                  | 2.57" in row
    assert "| 3.94    | 0.500   | 2.000       | 0.250   | 0.125 | 0.062    | 1.000" in spent
    assert "bytes / rate" not in decentral_report.tables([replace(RESULT, link=None)])


def test_other_bytes_than_planned_are_told() -> None:
    judged = decentral_report.verdict([RESULT, replace(RESULT, sent_bytes=10_200_000)]).splitlines()
    assert [line.rpartition(" ")[2] for line in judged] == ["holds", "MISSED"]


def test_share_of_training() -> None:
    share = Share("spes", sent_bytes=1, seconds={"slow": 300.0, "fast": 3.0}, training_seconds=900.0)
    assert share.of("slow") == 0.25
    assert share.of("fast") == pytest.approx(3 / 903)
    spes, diloco = training_shares()
    assert spes.training_seconds == pytest.approx(100 * 1024 * 2048 / (8 * 3670))
    assert (round(spes.sent_bytes / 1e9, 1), round(diloco.sent_bytes / 1e9, 1)) == (15.0, 44.0)
    assert spes.of("1 Gbit/s") < diloco.of("1 Gbit/s")


def test_a_timed_round_counts_messages_that_wait_for_each_other() -> None:
    round_ = TimedRound(Meeting("name", {0: {}, 1: {}, 2: {}, 3: {}}), 0, None, lambda name, ok: ok)
    round_._wait = lambda start: time.sleep(0.01)
    round_.sum_(torch.zeros(4))
    assert round_.hops == 6
    round_.all_gather(torch.zeros(4))
    assert round_.hops == 9
    assert round_.seconds >= 0.02


def packet(target: str, size: int = 1000) -> bytes:
    """An IPv4 packet, as far as the wire looks."""
    return struct.pack("!B15x4s", 0x45, socket.inet_aton(target)) + bytes(size - 20)


@pytest.mark.parametrize("link", [Link(8e5, 0.2), Link(8e9, 0.0)])
def test_packets_take_their_time(link: Link) -> None:
    """Five packets of 10 ms each, and a delay of 100 ms; on a fast link they come in less."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for _, inner in pairs:
        inner.setblocking(False)
    (one, _), (other, _) = pairs
    ended = threading.Event()
    ends = {f"10.0.0.{i}": inner.fileno() for i, (_, inner) in enumerate(pairs)}
    wire = threading.Thread(target=pass_on, args=(ends, link, ended))
    wire.start()
    try:
        started = time.monotonic()
        one.send(packet("10.9.9.9"))  # to nobody
        one.send(b"\x60" + bytes(999))  # not IPv4
        for size in range(1000, 1005):
            one.send(packet("10.0.0.1", size))
        other.settimeout(60)
        assert [len(other.recv(9000)) for _ in range(5)] == [*range(1000, 1005)], "all, in order"
        assert time.monotonic() - started >= 5 * 8000 / link.bits_per_second + link.round_trip_seconds / 2
    finally:
        ended.set()
        wire.join()
        for outer, inner in pairs:
            outer.close()
            inner.close()


def test_a_full_queue_loses_packets() -> None:
    outer, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inner.setblocking(False)
    ended = threading.Event()
    for _ in range(30):
        outer.send(packet("10.0.0.0"))
    # 30 x 8,000 bits at this rate are 300 ms, and 100 ms of them may wait.
    wire = threading.Thread(target=pass_on, args=({"10.0.0.0": inner.fileno()}, Link(8e5, 0.0), ended))
    wire.start()
    arrived = 0
    outer.settimeout(2.0)
    with contextlib.suppress(TimeoutError):
        while outer.recv(9000):
            arrived += 1
    ended.set()
    wire.join()
    outer.close()
    inner.close()
    assert 10 <= arrived < 30


def test_pass_around_notices_a_site_that_has_gone() -> None:
    (ahead, far), (behind, sender) = socket.socketpair(), socket.socketpair()
    with ahead, far, behind, sender:
        sender.sendall(bytes(300))
        pass_around(ahead, behind, 300)
        assert len(far.recv(1000)) == 300
        sender.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="has gone"):
            pass_around(ahead, behind, 300)
        assert len(far.recv(1000)) == 300


@pytest.mark.parametrize(
    ("user", "program", "expected"), [(1000, "ip", "need root"), (0, None, r"need `ip` \(Debian: iproute2\)")]
)
def test_why_there_can_be_no_slow_network(
    monkeypatch: pytest.MonkeyPatch, user: int, program: str | None, expected: str
) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: user)
    monkeypatch.setattr(network.shutil, "which", lambda name: program)
    with pytest.raises(NetworkError, match=expected), network.slow_network(2, SLOW_LINK):
        pass


LISTENING = """
import sys, time
from pretrain.bench.network import Link, NetworkError, slow_network
try:
    with slow_network(2, Link(1e8, 0.05)) as places:
        print(*(place.namespace for place in places), flush=True)
        time.sleep(60)
except NetworkError as error:
    sys.exit(f"none: {error}")
"""


def namespaces() -> set[str]:
    """Names of those that there are on this machine."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_slow_network_goes_with_who_made_it(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", LISTENING], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        names = set(process.stdout.readline().decode().split())
        if not names and (why := process.stderr.read().decode()).startswith("none: "):
            pytest.skip(why)
        assert names <= namespaces()
        process.send_signal(number)
    assert process.returncode
    assert len(names) == 2
    assert names.isdisjoint(namespaces())
