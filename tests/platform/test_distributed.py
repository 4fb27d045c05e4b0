"""Launchers are recognised, processes join, and what goes wrong is said in one line."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.platform import distributed
from pretrain.platform.device import Device
from pretrain.platform.distributed import init_process_group
from pretrain.platform.launcher import Launch, expand_counts, find_launch, first_host

ROOT = Path(__file__).parents[2]
CPU = Device(torch.device("cpu"), "gloo", 1, fp32_matmul="", allocator="")
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4,2",
}  # fmt: skip


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_torchrun_is_recognised() -> None:
    assert find_launch(TORCHRUN) == Launch(5, 8, 1, 4, "node1", 29500, "torchrun")


def test_torchrun_inside_of_a_slurm_job_is_torchrun() -> None:
    assert find_launch({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_variables_set_by_hand_are_recognised() -> None:
    environment = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert find_launch(environment) == Launch(5, 8, 5, 8, "node1", 29500, "environment")


def test_srun_is_recognised() -> None:
    assert find_launch(SRUN) == Launch(5, 6, 1, 2, "gpu03", 22345, "srun")


def test_srun_takes_the_address_of_the_launch_script() -> None:
    launch = find_launch({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert (launch.host, launch.port) == ("head", 4000)


def test_alone() -> None:
    assert find_launch({}) == Launch(0, 1, 0, 1, launcher="alone")


def test_a_batch_script_is_no_task_of_srun() -> None:
    assert find_launch(without(SRUN, "SLURM_STEP_NUM_TASKS")).launcher == "alone"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not: start with torchrun"),
        (without(TORCHRUN, "MASTER_ADDR"), "RANK=5 is set but MASTER_ADDR is not"),
        (without(TORCHRUN, "MASTER_PORT"), "RANK=5 is set but MASTER_PORT is not"),
        (without(TORCHRUN, "WORLD_SIZE"), "RANK=5 is set but WORLD_SIZE is not"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8 processes: ranks count from 0 to 7"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http' must be a whole number"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is empty"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID=None must be a whole number"),
    ],
)
def test_incomplete_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        find_launch(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login", "login"),
        ("a1,b2", "a1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("n[7,9]", "n7"),
        ("rack[1-2]n[10-12]-ib", "rack1n10-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(("counts", "expanded"), [("4", [4]), ("4(x2),1", [4, 4, 1]), ("2,3(x1)", [2, 3])])
def test_expand_counts(counts: str, expanded: list[int]) -> None:
    assert expand_counts(counts) == expanded


@pytest.fixture
def no_group() -> Iterator[None]:
    assert not dist.is_initialized()
    yield
    distributed.shutdown()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_alone_needs_no_port(no_group: None) -> None:
    init_process_group(CPU, find_launch({}))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert (dist.get_world_size(), total.item()) == (1, 1.0)
    assert distributed.world_size() == 1
    distributed.shutdown()
    distributed.shutdown()  # leaving twice is no error
    assert not dist.is_initialized()


def test_a_free_port_is_used(no_group: None, free_port: int) -> None:
    init_process_group(CPU, Launch(0, 1, 0, 1, "127.0.0.1", free_port, "environment"))
    assert dist.get_world_size() == 1


def test_a_taken_port_is_named(no_group: None, taken_port: int) -> None:
    launch = Launch(0, 1, 0, 1, "127.0.0.1", taken_port, "environment")
    with pytest.raises(UserError, match=f"MASTER_PORT={taken_port} is taken on 127.0.0.1: .* free port"):
        init_process_group(CPU, launch, join_seconds=5)


def test_missing_processes_are_said(no_group: None, free_port: int) -> None:
    launch = Launch(0, 2, 0, 2, "127.0.0.1", free_port, "environment")
    with pytest.raises(UserError, match=f"not all of WORLD_SIZE=2 processes reached 127.0.0.1:{free_port} within 1 s"):
        init_process_group(CPU, launch, join_seconds=1)


def test_a_missing_rank_0_is_said(no_group: None, free_port: int) -> None:
    launch = Launch(1, 2, 1, 2, "127.0.0.1", free_port, "environment")
    with pytest.raises(UserError, match=f"rank 1 of 2 cannot reach rank 0 at 127.0.0.1:{free_port} within 1 s"):
        init_process_group(CPU, launch, join_seconds=1)


JOIN = """
import os, torch, torch.distributed as dist
from pretrain.platform import device, distributed
cpu = device.Device(torch.device("cpu"), "gloo", 1, fp32_matmul="", allocator="")
distributed.setup = lambda local_rank, local_world_size=1: cpu
expected = distributed.world_size()
with distributed.joined() as where:
    total = torch.ones(1)
    dist.all_reduce(total)
    with distributed.joined() as again:  # an existing group is used, and stays
        assert again == where
    assert dist.is_initialized()
line = f"{total.item():.0f} of {expected} on {where}; left: {not dist.is_initialized()}\\n"
os.write(1, line.encode())  # at once: the two processes share a pipe, and print writes the newline by itself
"""


def launched(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("SLURM_")}
    return subprocess.Popen(
        command, cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return "\n".join(line for line in output.splitlines() if "[Gloo]" not in line)


def test_processes_join_under_srun(free_port: int) -> None:
    """Two tasks with the variables srun sets, on the port of the launch script."""
    common = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port),
    }  # fmt: skip
    tasks = [
        launched([sys.executable, "-c", JOIN], {**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    assert [said(task) for task in tasks] == ["2 of 2 on cpu; left: True"] * 2


def test_processes_join_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    assert said(launched(command, {})).splitlines() == ["2 of 2 on cpu; left: True"] * 2
