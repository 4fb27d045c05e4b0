"""What is shown: a live line on a terminal, few plain lines in a log, and a believable time left."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from pretrain.metrics.formats import count, duration, flop_count
from pretrain.metrics.progress import Eta, ProgressLine
from tests.metrics.test_throughput import Time


def log_lines(steps, step_seconds, **step_fields):
    time, output = Time(), io.StringIO()
    line = ProgressLine(total_steps=steps, console=Console(file=output, width=40), now=time)
    for step in range(1, steps + 1):
        time.pass_(step_seconds)
        line.step(step, loss=2.5, step_seconds=step_seconds, tokens_per_second=12_345, **step_fields)
    line.close()
    return output.getvalue().splitlines()


def test_log_lines_are_whole_and_plain():
    assert log_lines(3, 10.0) == [
        "step 1/3  loss 2.500  12.3k tokens/s",
        "step 2/3  loss 2.500  12.3k tokens/s  ETA 10s",
        "step 3/3  loss 2.500  12.3k tokens/s",
    ]


def test_log_gets_fewer_lines_as_time_goes_by():
    lines = log_lines(10_000, 1.0)
    assert lines[0].startswith("step 1/")
    assert lines[1].startswith("step 6/")  # 5 s later
    assert lines[-1].startswith("step 10000/")
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    gaps = [after - before for before, after in pairwise(shown)]
    assert gaps[:-1] == sorted(gaps[:-1])
    assert max(gaps) == 60
    assert len(lines) < 300


def test_validation_is_printed_at_once_and_stays():
    output = io.StringIO()
    line = ProgressLine(total_steps=10, console=Console(file=output), now=Time())
    line.valid(5, loss=2.0)
    line.step(10, loss=2.5, step_seconds=1, tokens_per_second=10)
    line.valid(10, loss=2.0, bits_per_byte=1.25)
    assert output.getvalue().splitlines() == [
        "step 5/10  valid 2.000",
        "step 10/10  loss 2.500  valid 2.000  10 tokens/s",
        "step 10/10  valid 1.250 bits/byte",
    ]


def test_skipped_step_shows_no_loss():
    assert log_lines(1, 1.0, skipped=True) == ["step 1/1  skipped  12.3k tokens/s"]


def test_terminal_gets_one_live_line():
    output = io.StringIO()
    line = ProgressLine(total_steps=20, console=Console(file=output, force_terminal=True, width=120))
    for step in range(1, 21):
        line.step(step, loss=2.5, step_seconds=0.1, tokens_per_second=999)
    line.close()
    text = output.getvalue()
    assert "step 20/20" in text
    assert "\x1b[" in text  # it moves the cursor
    assert text.count("\n") < 3  # and does not scroll


def test_eta_goes_by_recent_steps_and_not_by_the_start():
    time = Time()
    eta = Eta(time)
    assert eta.remaining_seconds(10) is None
    time.pass_(500)
    eta.step(500.0)  # compilation and the like
    assert eta.remaining_seconds(10) is None
    for _ in range(100):
        time.pass_(4)
        eta.step(4.0)
    for _ in range(50):
        time.pass_(1)
        eta.step(1.0)
    assert eta.remaining_seconds(10) == pytest.approx(10)


def test_eta_includes_evaluation_and_saving():
    time = Time()
    eta = Eta(time)
    for step in range(101):
        time.pass_(1)
        eta.step(1.0)
        if step % 10 == 9:
            time.pass_(5)
    assert eta.remaining_seconds(100) == pytest.approx(150)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (950, "950"), (999.7, "1000"), (12_345, "12.3k"), (4.567e9, "4.57B"), (1.5e13, "15T")],
)
def test_count(value, text):
    assert count(value) == text


def test_flop_count():
    assert [flop_count(value) for value in (0, 1.38e17, 3e21)] == ["0", "138P", "3Z"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (18_420, "5h07m"), (1_047_600, "12d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
