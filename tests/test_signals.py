"""Requests to stop: heard by one rank, agreed on by all."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from pretrain.signals import SIGNALS, graceful_stop
from tests.helpers.distributed import run_ranks


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_process_lives(number: signal.Signals) -> None:
    with graceful_stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
        assert not stop.agreed, "only all ranks together agree"


def test_the_handlers_from_before_come_back() -> None:
    def before(number: int, frame: object) -> None:
        raise AssertionError

    original = signal.signal(signal.SIGUSR1, before)
    try:
        with graceful_stop():
            assert signal.getsignal(signal.SIGUSR1) is not before
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGUSR1, original)


def test_a_second_ctrl_c_ends_at_once() -> None:
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first Ctrl-C, whatever came before it
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def _agree_three_times() -> list[bool]:
    """Nobody is asked, then rank 1 alone, then it is remembered."""
    cpu = torch.device("cpu")
    with graceful_stop() as stop:
        agreed = [stop.agree(cpu)]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [*agreed, stop.agree(cpu), stop.agree(cpu)]


def test_ranks_agree() -> None:
    assert run_ranks(_agree_three_times, 2) == [[False, True, True]] * 2
