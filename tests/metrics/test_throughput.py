"""Every second goes to one phase, over restarts too."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from pretrain.metrics.throughput import Interval, RunClock, memory_bytes, rates


class Time:
    """A clock that moves when told to; both of RunClock's clocks."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def new_clock(time, started_at=None):
    return RunClock(monotonic=time, wall=time, started_at=time.now if started_at is None else started_at)


def run_steps(clock, time, steps, *, data=1.0, compute=3.0):
    for _ in range(steps):
        with clock.phase("data"):
            time.pass_(data)
        time.pass_(compute)
        clock.end_step()


def test_interval_holds_steps_and_data_but_not_evaluation_saving_or_start():
    time = Time()
    clock = new_clock(time)
    time.pass_(50)
    clock.begin_steps()
    run_steps(clock, time, 2)
    with clock.phase("eval"):
        time.pass_(100)
        with clock.phase("save"):  # nested: charged once
            time.pass_(10)
        time.pass_(1)
    assert clock.take_interval() == Interval(steps=2, seconds=8.0, data_seconds=2.0)
    run_steps(clock, time, 1, data=0.5)
    assert clock.take_interval() == Interval(steps=1, seconds=3.5, data_seconds=0.5)
    seconds = clock.goodput()["seconds"]
    assert seconds == {"start": 50, "step": 9, "data": 2.5, "eval": 101, "save": 10}


def test_phase_ends_when_its_body_raises():
    time = Time()
    clock = new_clock(time)
    clock.begin_steps()

    def broken_evaluation():
        with clock.phase("eval"):
            time.pass_(2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken_evaluation()
    time.pass_(3)
    assert clock.goodput()["seconds"] == {"step": 3, "eval": 2}


def test_skipped_steps_are_not_goodput_but_take_time():
    time = Time()
    clock = new_clock(time)
    clock.begin_steps()
    run_steps(clock, time, 1)
    with clock.phase("data"):
        time.pass_(1)
    time.pass_(5)
    clock.end_step(kept=False)
    run_steps(clock, time, 1)
    figures = clock.goodput()
    assert figures["seconds"] == {"step": 6, "data": 3, "skipped": 5}
    assert figures["goodput"] == round(6 / 14, 4)
    assert clock.take_interval() == Interval(steps=3, seconds=14, data_seconds=3)


def test_goodput_counts_over_a_crash():
    time = Time()
    first = new_clock(time, started_at=990.0)  # ten seconds of imports
    first.begin_steps()
    run_steps(first, time, 5)
    state = first.state_dict()  # the checkpoint, at 1020
    run_steps(first, time, 2)  # lost, until 1028
    time.pass_(100)
    second = new_clock(time, started_at=time.now - 4)  # stood still for 96 s, imported for 4
    second.load_state_dict(state, last_alive=1028.0)
    time.pass_(6)
    second.begin_steps()
    run_steps(second, time, 2)
    figures = second.goodput()
    assert figures["seconds"] == {"start": 20, "step": 21, "data": 7, "lost": 8, "restart": 96}
    assert figures["wall_seconds"] == time.now - 990.0  # nothing is counted twice or left out
    assert figures["goodput"] == round(21 / 152, 4)
    assert second.take_interval() == Interval(steps=2, seconds=8, data_seconds=2)


def test_restart_from_a_clean_stop_loses_nothing():
    time = Time()
    first = new_clock(time)
    first.begin_steps()
    run_steps(first, time, 1)
    state = first.state_dict()
    time.pass_(30)
    second = new_clock(time)
    second.load_state_dict(state)
    assert second.goodput()["seconds"] == {"step": 3, "data": 1, "restart": 30}


def test_a_clock_set_back_gives_no_negative_times():
    time = Time()
    clock = new_clock(time, started_at=2000.0)
    clock.load_state_dict({"seconds": {"step": 5.0}, "saved_at": 3000.0}, last_alive=1500.0)
    assert clock.goodput()["seconds"] == {"step": 5}


def test_interval_needs_a_step():
    clock = RunClock()
    with pytest.raises(AssertionError, match="no step"):
        clock.take_interval()


def test_start_counts_from_the_birth_of_the_process():
    program = (
        "import time; time.sleep(0.5); from pretrain.metrics.throughput import RunClock;"
        "print(RunClock().goodput()['seconds']['start'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.5


def test_rates():
    interval = Interval(steps=4, seconds=2.0, data_seconds=0.2)
    figures = rates(interval, tokens_per_step=1000, flops_per_step=6e12, devices=3, peak_tflops=16.0)
    assert figures == pytest.approx(
        {"step_seconds": 0.5, "data_seconds": 0.05, "tokens_per_second": 2000, "model_tflops": 4.0, "mfu": 0.25}
    )
    assert "mfu" not in rates(interval, tokens_per_step=1000, flops_per_step=6e12, devices=3)


def test_memory_of_a_cpu_process_is_what_is_resident():
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 << 20, dtype=torch.uint8)
    grown = memory_bytes(torch.device("cpu")) - before
    assert grown > 0.9 * block.numel()
    assert before < psutil.Process(os.getpid()).memory_info().vms
