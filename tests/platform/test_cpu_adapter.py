"""Every patch of the CPU adapter is needed and sufficient; with CUDA there are none."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from pretrain.platform import cpu_adapter

ROOT = Path(__file__).parents[2]

# What removing a patch must fail with, and the case that shows it.
FAILURES = {
    "current_device-train_one_step": "Torch not compiled with CUDA enabled",
    "streams-train_one_step": "torch.cuda.Stream requires CUDA support",
    "device_literals-train_one_step": "Torch not compiled with CUDA enabled",
    "device_literals-masks": "Torch not compiled with CUDA enabled",
    "device_literals-auxiliary_loss_log": "Torch not compiled with CUDA enabled",
    "random_state-train_one_step": "Torch not compiled with CUDA enabled",
    "router_gemm-train_one_step": "name 'te_general_gemm' is not defined",
    "compiled_helpers-swiglu_without_compiler": "InvalidCxxCompiler",
    "split_sizes-split_sizes_to_numpy": "AssertionError",
}


def run_python(*arguments: str) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str]]:
    """Error, or nothing, of every case of patch_cases with and without its patch."""
    return json.loads(run_python("-m", "tests.platform.patch_cases"))


@pytest.mark.parametrize("case", FAILURES)
def test_patch_is_needed_and_suffices(case: str, outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes[case]["with"] == ""
    assert FAILURES[case] in outcomes[case]["without"]


def test_every_patch_says_what_it_stands_in_for_and_has_a_case() -> None:
    elsewhere = {"tensor_cuda", "pipeline_sends", "uneven_gather"}  # test_cpu_pipeline, test_cpu_experts
    names = [patch.__name__ for patch in cpu_adapter.PATCHES]
    assert {case.split("-")[0] for case in FAILURES} | elsewhere == set(names)
    assert all((patch.__doc__ or "").startswith("Stands in for ") for patch in cpu_adapter.PATCHES)


INERT = """
import sys, torch
cuda = sys.argv[1] == "cuda"
torch.cuda.is_available = lambda: cuda
from pretrain.platform import cpu_adapter
before = dict(vars(torch.cuda)), torch.Tensor.cuda, dict(vars(torch))
first = cpu_adapter.apply()
after = dict(vars(torch.cuda)), torch.Tensor.cuda, dict(vars(torch))
imported = any(name.startswith("megatron") for name in sys.modules)
second = cpu_adapter.apply()
again = dict(vars(torch.cuda)), torch.Tensor.cuda, dict(vars(torch))
changed = [name for name in before[0] if before[0][name] is not after[0][name]]
print(len(first), first == second, before == after, after == again, imported, *sorted(changed))
"""


def test_nothing_is_touched_with_cuda() -> None:
    assert run_python("-c", INERT, "cuda").split() == ["0", "True", "True", "True", "False"]


def test_without_cuda_only_what_would_raise_is_touched_and_only_once() -> None:
    count, same, untouched, once, imported, *changed = run_python("-c", INERT, "cpu").split()
    assert (int(count), same, untouched, once, imported) == (len(cpu_adapter.PATCHES), "True", "False", "True", "True")
    assert changed == ["Stream", "current_device", "current_stream", "default_stream", "stream", "synchronize"]


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "1.16.1"])
def test_another_megatron_core_is_refused(version: str) -> None:
    with pytest.raises(UserError, match=rf"megatron-core {version} .* fits 0\.16\.x; pip install"):
        cpu_adapter.check_version(version)


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2rc0"])
def test_the_pinned_megatron_core_is_accepted(version: str) -> None:
    cpu_adapter.check_version(version)


@pytest.fixture
def tracker():
    """A tracker of two random states on the CPU, over a default generator seeded with 0."""
    if torch.cuda.is_available():
        pytest.skip("the adapter is for machines without CUDA")
    cpu_adapter.apply()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(0)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    return tracker


def draws(seed: int, count: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_forked_random_states_are_isolated(tracker) -> None:
    seen = {"default": [], "a": [], "b": []}

    def draw(name: str) -> None:
        seen[name].append(torch.rand(()).item())

    draw("default")
    with tracker.fork("a"):
        draw("a")
        with tracker.fork("b"):
            draw("b")
        draw("a")
        with tracker.fork("a"):  # nested in itself: one stream
            draw("a")
        draw("a")
    draw("default")
    with tracker.fork("b"):
        draw("b")
    draw("default")
    assert seen == {"default": draws(0, 3), "a": draws(1, 4), "b": draws(2, 2)}


def test_a_failing_fork_restores_the_outer_state(tracker) -> None:
    def fail() -> None:
        with tracker.fork("a"):
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.rand(2).tolist() == draws(0, 2)


def test_an_unknown_random_state_is_named(tracker) -> None:
    with pytest.raises(KeyError, match=r"'c' is not tracked; known: \['a', 'b'\]"), tracker.fork("c"):
        pass


def test_forks_do_not_warn_of_the_cpu_generator(tracker, caplog) -> None:
    with caplog.at_level(logging.WARNING), tracker.fork("a"):
        torch.rand(1)
    assert caplog.records == []
    # Megatron-core's own fork on the CPU generator, from a second, unpatched copy of its module.
    spec = importlib.util.find_spec("megatron.core.tensor_parallel.random")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    original._get_cuda_rng_state = lambda **_: torch.get_rng_state()
    original._set_cuda_rng_state = lambda state, **_: torch.set_rng_state(state)
    with caplog.at_level(logging.WARNING), original.CudaRNGStatesTracker.fork(tracker, "a"):
        torch.rand(1)
    assert [record.message for record in caplog.records] == ["CPU RNG state changed within GPU RNG context"]


def test_other_code_sees_plain_torch(tracker) -> None:
    """Factory functions and seeding outside megatron-core are torch's own."""
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    state = torch.get_rng_state()
    torch.cuda.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
