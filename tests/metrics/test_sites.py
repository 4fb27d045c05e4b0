"""Reports of runs with sites, made up: who was there, what it cost, and what a restart took back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.schema import MetricsConfig
from pretrain.errors import RunDirectoryError
from pretrain.metrics.history import read_histories
from pretrain.metrics.plot_sites import ROLES, common_losses, draw_sites
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.report import summary, write_report
from pretrain.metrics.sites import SiteRun, role, sent_bytes, site_runs, with_sites
from tests.metrics.synthetic import train_row, valid_row, write_run

EVERY = 4
"""Steps from round to round, small as every row goes to the disk."""
SITES = 3
# Of eight rounds, site 2 misses the third to the sixth, comes back with the seventh; the fifth hands its experts over.
AWAY = range(3, 7)


def sync_event(number: int, **fields: Any) -> dict[str, Any]:
    absent = [2] if number in AWAY else []
    return {
        "round": number,
        "members": [site for site in range(SITES) if site not in absent],
        "absent": absent,
        "losses": {},
        "sent_bytes": 1_000_000,
        "wait_seconds": 3.0,
        "seconds": 1.0,
        "similarity": {"0": {"mean": 0.2 + number / 100, "largest": 0.5}, "1": {"mean": 0.1, "largest": 0.6}},
        **({"stale": [2], "moved": [2]} if number == max(AWAY) + 1 else {}),
        **fields,
    }


def write_site(run: Path, site: int, *, rounds: int = 8, **fields: Any) -> Path:
    """Validated after each round and between them; site 2 leaves after the second and is back for the seventh."""
    directory = run / f"site_{site}"
    directory.mkdir(parents=True)
    recorder = Recorder(directory, metrics=MetricsConfig(), config={}, total_steps=rounds * EVERY)
    recorder.event("joined", step=0, round=0, members=[0, 1, 2], absent=[], sent_bytes=500_000, stale=[1, 2])
    for step in range(1, rounds * EVERY + 1):
        number, is_round = step // EVERY, step % EVERY == 0
        if site == 2 and 2 * EVERY + 1 < step <= 7 * EVERY:
            if number == 7:
                recorder.event("restart", step=2 * EVERY, checkpoint="step_00000008")
                recorder.event("sync", step=step, **sync_event(number, **fields))
            continue
        recorder.train(train_row(step, loss=3 + math.exp(-step / 30) + 0.05 * site))
        if is_round:
            merged = {"merged": number == 4} if number % 2 == 0 else {}
            recorder.event("sync", step=step, **sync_event(number, **merged, **fields))
            if number == 5:
                recorder.event("handover", step=step, dropped=[2], experts=[2, 5])
        if step % (EVERY // 2) == 0:
            recorder.valid(valid_row(step, 3 + math.exp(-step / 30) + (0 if is_round else 0.01 * site)))
    recorder.close()
    return directory


def write_sites(run: Path, sites: range = range(SITES), **fields: Any) -> Path:
    for site in sites:
        write_site(run, site, **fields)
    return run


def site_run(run: Path) -> SiteRun:
    (found,) = site_runs(read_histories(with_sites([run])))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SiteRun:
    """To be read only."""
    return site_run(write_sites(tmp_path_factory.mktemp("run")))


def table_of(run: Path) -> dict[str, list[str]]:
    """Cells by name of the line."""
    lines = [line.split(" | ") for line in (run / "report" / "report.md").read_text().splitlines() if " | " in line]
    return {line[0].removeprefix("| "): [cell.removesuffix(" |") for cell in line[1:]] for line in lines}


def test_a_directory_of_sites_is_reported_by_site(tmp_path: Path) -> None:
    run = write_sites(tmp_path / "run")
    folder = write_report([run])
    assert folder == run / "report"
    assert (folder / "sites.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "![sites](sites.png)" in (folder / "report.md").read_text()
    table = table_of(run)
    assert table[""] == ["site_0", "site_1", "site_2"]
    assert table["rounds"] == ["8", "8", "4"]
    assert table["rounds missed"] == ["0", "0", "4"]
    assert table["bytes sent by rank 0"] == ["8.5 MB", "8.5 MB", "4.5 MB"]
    assert table["- of it waiting for others"] == ["75.0%"] * 3
    assert [cell.split()[0] for cell in table["time in synchronisation"]] == ["32s", "32s", "16s"]
    assert table["handovers of experts"] == ["1", "1", "0"]
    assert any(line.split() == ["rounds", "missed", "0", "0", "4"] for line in summary([run]).splitlines())


def test_a_run_without_sites_has_no_such_lines(tmp_path: Path) -> None:
    run, plain = write_sites(tmp_path / "run"), write_run(tmp_path / "plain")
    folder = write_report([plain])
    assert not (folder / "sites.png").exists()
    assert "rounds" not in summary([plain])
    # Beside one with sites, its cells are empty.
    write_report([plain, run], run / "report")
    assert table_of(run)["rounds"] == ["-", "8", "8", "4"]
    # A folder of that name that has met nobody is no site, either.
    alone = write_run(tmp_path / "alone" / "site_0")
    assert site_runs(read_histories([alone])) == []


def test_two_runs_with_sites_have_a_picture_each(tmp_path: Path) -> None:
    runs = [write_sites(tmp_path / name, range(2), rounds=1) for name in ("first", "second")]
    folder = write_report(runs)
    assert {path.name for path in folder.glob("sites*")} == {"sites_1.png", "sites_2.png"}
    assert "first/site_0" in summary(runs)


def test_sites_come_by_number(tmp_path: Path) -> None:
    for site in (10, 2, 0):
        write_site(tmp_path, site, rounds=1)
    (tmp_path / "site_x").mkdir()
    assert [path.name for path in with_sites([tmp_path])] == ["site_0", "site_2", "site_10"]
    (tmp_path / "site_3").mkdir()
    with pytest.raises(RunDirectoryError, match=r"site_3: no metrics.jsonl in it yet"):
        with_sites([tmp_path])
    with pytest.raises(RunDirectoryError, match="missing: no such run directory"):
        summary([tmp_path / "missing"])


def test_roles() -> None:
    event = {"members": [0, 1, 3], "absent": [2], "stale": [1], "moved": [1, 3]}
    assert [role(site, event) for site in range(4)] == ["member", "stale", "absent", "moved"]


def test_rounds_that_one_site_has_gone_back_behind_stand_at_the_others(tmp_path: Path) -> None:
    """Site 2 was in the second round, and went back behind it when it came again."""
    history = site_run(write_sites(tmp_path)).sites[2]
    assert [event["round"] for event in history.events_in_force("sync")] == [1, 2, 7, 8]
    go_back(history.directory, EVERY)
    again = site_run(tmp_path)
    assert [event["round"] for event in again.sites[2].events_in_force("sync")] == [1]
    assert [event["round"] for event in again.rounds] == list(range(1, 9))
    assert role(2, again.rounds[1]) == "member"
    # The bytes were sent all the same.
    assert sent_bytes(again.sites[2])[-1] == (8 * EVERY, 4_500_000)
    # When all have gone back, there are no such rounds.
    for site in (0, 1):
        go_back(tmp_path / f"site_{site}", 3 * EVERY)
    assert [event["round"] for event in site_run(tmp_path).rounds] == [1, 2, 3]


def go_back(directory: Path, step: int) -> None:
    """As a restart from a checkpoint of this step notes it."""
    restart = {"event": "restart", "time": 0.0, "step": step, "checkpoint": f"step_{step:08}"}
    with (directory / "events.jsonl").open("a") as file:
        file.write(json.dumps(restart) + "\n")


def test_the_strip_shows_who_was_away(run: SiteRun) -> None:
    axes = draw_sites(run).axes
    strip = next(ax for ax in axes if ax.get_title(loc="left") == "Who was there")
    cells = strip.collections[0].get_array().reshape(SITES, 8)
    names = np.array(list(ROLES))[np.asarray(cells, dtype=int)]
    assert (names[:2] == "member").all()
    assert names[2].tolist() == ["member"] * 2 + ["absent"] * 4 + ["stale", "member"]
    assert [text.get_text() for text in strip.get_yticklabels()] == ["site 0", "site 1", "site 2"]
    assert strip.yaxis_inverted()
    (handover,) = [line for line in strip.lines if line.get_marker() == "^"]
    assert list(handover.get_xdata()) == [5 * EVERY]
    # Sites of which there is no history have a row, too.
    (alone,) = site_runs(read_histories([run.sites[0].directory]))
    assert alone.numbers == [0, 1, 2]


def test_common_losses_are_those_after_rounds(run: SiteRun) -> None:
    losses = common_losses(run)
    assert [step for step, _ in losses] == [EVERY * number for number in range(1, 9)], "none of those between rounds"
    np.testing.assert_allclose([loss for _, loss in losses], [3 + math.exp(-step / 30) for step, _ in losses])


def test_panels(run: SiteRun, tmp_path: Path) -> None:
    by_title = {ax.get_title(loc="left"): ax for ax in draw_sites(run).axes}
    assert len(by_title) == 5
    similar = by_title["Cosine of the gate matrices of two experts, before a merge"]
    largest, mean, merged, given_up = similar.lines
    np.testing.assert_allclose(largest.get_ydata(), 0.6)
    np.testing.assert_allclose(mean.get_ydata(), [0.15 + number / 200 for number in range(1, 9)])
    assert (list(merged.get_xdata()), list(given_up.get_xdata())) == ([4 * EVERY], [2 * EVERY, 6 * EVERY, 8 * EVERY])
    seconds = by_title["Time of each round"].lines
    assert [set(line.get_ydata()) for line in seconds[:2]] == [{1.0}, {3.0}]
    assert np.isnan(seconds[4].get_ydata()).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    losses = by_title["Training loss of each site, and of what they have in common"]
    for site, is_broken in ((0, False), (2, True)):
        (curve,) = [line for line in losses.lines if line.get_label() == f"site {site}"]
        assert np.isnan(curve.get_ydata()).any() == is_broken
    sent = by_title["Sent to other sites so far, by rank 0 of each site"].lines
    assert list(sent[0].get_ydata()) == [500_000 + 1_000_000 * n for n in range(9)]
    # Without similarities, as under diloco, there is no panel for them.
    write_site(tmp_path, 0, rounds=2, similarity={})
    assert len(draw_sites(site_run(tmp_path)).axes) == 4
