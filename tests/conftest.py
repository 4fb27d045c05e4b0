"""The suite runs on the CPU, over gloo, also where there are GPUs: they are hidden before torch looks for them.

Tests marked `gpu` start processes of their own that see the GPUs again, and are skipped where there are none.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess

import pytest


def _gpus() -> int:
    """NVIDIA GPUs of this machine, counted without torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


GPUS = _gpus()
# The workers of pytest-xdist are children of a process that has hidden the GPUs already, and inherit what it saw.
SEEN = "PRETRAIN_TESTS_SEE_GPUS"
EVERY = "every"
os.environ.setdefault(SEEN, os.environ.get("CUDA_VISIBLE_DEVICES", EVERY))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")


def with_gpus() -> dict[str, str]:
    """This environment, with the GPUs that were there before they were hidden."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ[SEEN]
    return environment if visible == EVERY else environment | {"CUDA_VISIBLE_DEVICES": visible}


@pytest.fixture
def gpu_environment() -> dict[str, str]:
    """Environment for a process that may use the GPUs."""
    return with_gpus()


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if not GPUS:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.hookimpl
def pytest_collection_finish() -> None:
    """What is loaded by now stays: with torch and megatron-core in memory a collection takes a second to look at it."""
    gc.freeze()


@pytest.hookimpl
def pytest_unconfigure() -> None:
    """What is never collected, extensions report as leaked."""
    gc.unfreeze()
