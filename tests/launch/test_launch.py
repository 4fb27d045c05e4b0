"""The launch scripts: what they start, with which arguments and environment, and when a job comes back.

`srun`, `scontrol`, `squeue`, `nvidia-smi` and `pretrain` are stand-ins on PATH that write down how they were called.
Every path and several arguments contain spaces and characters that a shell would take apart.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ["launch/env.sh", "launch/sites.sh", "launch/slurm.sbatch", "launch/torchrun.sh", ".ci/make-venv", ".ci/run"]
ARGUMENTS = ["configs/my run.toml", "--set", 'run.directory="a b/$HOME/*"', "--set", "batch.global_batch_size=8"]
PATIENCE_SECONDS = 120
RECORDED = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK"]

RECORD = f"""#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
call = dict(argv=sys.argv[1:], cwd=os.getcwd(), env={{key: os.environ.get(key) for key in {RECORDED!r}}})
Path(os.environ["RECORDS"], f"{{name}}-{{os.getpid()}}").write_text(json.dumps(call))
"""
# A training step that ends with 75 when it gets SIGUSR1, after it was seen to be running, and with 3 if it never does.
SAVES_ON_SIGNAL = f"""
import signal, time
def save(number, frame):
    time.sleep(0.5)
    Path(os.environ["RECORDS"], f"saved-{{os.getpid()}}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
Path(os.environ["RECORDS"], f"running-{{os.getpid()}}").touch()
time.sleep({PATIENCE_SECONDS})
sys.exit(3)
"""


class Workplace:
    """A folder with the launch scripts, stand-ins for the commands they call, and the record of those calls."""

    def __init__(self, root: Path) -> None:
        self.root = root / "my repository"
        self.bin = self.root / "the bin"
        self.records = self.root / "the records"
        self.bin.mkdir(parents=True)
        self.records.mkdir()
        shutil.copytree(LAUNCH, self.root / "launch")
        self.environment = {
            "HOME": os.environ.get("HOME", "/"),
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "RECORDS": str(self.records),
        }

    def stand_in(self, name: str, body: str = "") -> None:
        """Put the command `name` on PATH; it records its call, then runs `body`."""
        path = self.bin / name
        path.write_text(RECORD + body)
        path.chmod(0o755)

    def calls(self, name: str) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.records.glob(f"{name}-*")) if path.stat().st_size]

    def marks(self, name: str) -> int:
        return len(list(self.records.glob(f"{name}-*")))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["/bin/bash", f"launch/{script}", *arguments],
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a launch script."""
        process = self.start(script, *arguments, **environment)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# Static checks


def shellcheck(*paths: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "shellcheck"), *map(str, paths)]
    return subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True, check=False)


def test_scripts_pass_shellcheck() -> None:
    result = shellcheck(*SCRIPTS)
    assert result.returncode == 0, result.stdout


def test_shellcheck_sees_a_missing_quote(tmp_path: Path) -> None:
    text = (LAUNCH / "torchrun.sh").read_text()
    broken = tmp_path / "torchrun.sh"
    broken.write_text(text.replace('pretrain train "$@"', "pretrain train $@"))
    assert broken.read_text() != text
    result = shellcheck(broken)
    assert result.returncode == 1
    assert "SC2068" in result.stdout


def test_every_script_is_in_the_lists() -> None:
    scripts = {f"launch/{path.name}" for path in LAUNCH.iterdir() if path.suffix in {".sh", ".sbatch"}}
    assert scripts <= set(SCRIPTS)
    makefile = (LAUNCH.parent / "Makefile").read_text()
    listed = next(line for line in makefile.splitlines() if line.startswith("SCRIPTS :="))
    assert set(listed.split(":=")[1].split()) == set(SCRIPTS)


# torchrun


def options_and_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """torchrun's options, and the command it is to start."""
    cut = argv.index("--no-python")
    return argv[:cut], argv[cut + 1 :]


def test_torchrun_one_node(workplace: Workplace) -> None:
    workplace.stand_in("torchrun")
    workplace.stand_in("nvidia-smi", "sys.exit(9)")
    assert workplace.run("torchrun.sh", *ARGUMENTS) == (0, "")
    (call,) = workplace.calls("torchrun")
    options, command = options_and_command(call["argv"])
    assert command == ["pretrain", "train", *ARGUMENTS]
    assert options == [
        "--standalone",
        "--nproc-per-node=1",
        "--max-restarts=0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    ]
    assert call["env"]["OMP_NUM_THREADS"] == "1"


def test_torchrun_takes_every_gpu(workplace: Workplace) -> None:
    workplace.stand_in("torchrun")
    workplace.stand_in("nvidia-smi")
    workplace.run("torchrun.sh", "c.toml")
    assert "--nproc-per-node=gpu" in workplace.calls("torchrun")[0]["argv"]


def test_torchrun_several_nodes(workplace: Workplace) -> None:
    workplace.stand_in("torchrun")
    settings = {"NPROC": "4", "NNODES": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29511", "RUN_ID": "my run"}
    assert workplace.run("torchrun.sh", "c.toml", MAX_RESTARTS="3", OMP_NUM_THREADS="7", **settings) == (0, "")
    (call,) = workplace.calls("torchrun")
    options, _ = options_and_command(call["argv"])
    assert options[:6] == [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-a:29511",
        "--rdzv-id=my run",
        "--nproc-per-node=4",
        "--max-restarts=3",
    ]
    assert call["env"]["OMP_NUM_THREADS"] == "7", "what is set already stays"


def test_torchrun_several_nodes_need_an_address(workplace: Workplace) -> None:
    workplace.stand_in("torchrun")
    code, output = workplace.run("torchrun.sh", "c.toml", NNODES="2")
    assert code != 0
    assert "MASTER_ADDR" in output
    assert workplace.calls("torchrun") == []


def test_torchrun_without_a_config_says_how(workplace: Workplace) -> None:
    workplace.stand_in("torchrun")
    code, output = workplace.run("torchrun.sh")
    assert code == 2
    assert output.startswith("usage: ")
    assert workplace.calls("torchrun") == []


def test_real_torchrun_starts_the_ranks_and_passes_the_signal_on(workplace: Workplace) -> None:
    workplace.stand_in("pretrain", SAVES_ON_SIGNAL)
    process = workplace.start("torchrun.sh", *ARGUMENTS, NPROC="2", MAX_RESTARTS="2")
    try:
        wait_until(lambda: workplace.marks("running") == 2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 1, output  # as the scripts' README says
    assert workplace.marks("saved") == 2, output
    calls = workplace.calls("pretrain")
    assert [call["argv"] for call in calls] == [["train", *ARGUMENTS]] * 2, "two ranks, and no restart after the signal"
    assert {(call["env"]["RANK"], call["env"]["WORLD_SIZE"]) for call in calls} == {("0", "2"), ("1", "2")}


# SLURM


@pytest.fixture
def cluster(workplace: Workplace) -> Workplace:
    """A workplace inside a two-node job: `srun` runs the command once, `scontrol` lists the nodes or requeues, and
    `squeue` tells the state of the job."""
    workplace.stand_in("srun", 'os.execvp("pretrain", sys.argv[sys.argv.index("pretrain"):])')
    workplace.stand_in("scontrol", 'if sys.argv[1] == "show": print("node-a\\nnode-b")')
    workplace.stand_in("squeue", 'print("RUNNING")')
    workplace.stand_in("pretrain")
    workplace.environment |= {
        "SLURM_JOB_ID": "4321987",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_SUBMIT_DIR": str(workplace.root),
        "SLURM_CPUS_PER_TASK": "6",
    }
    return workplace


def requeues(cluster: Workplace) -> list[list[str]]:
    return [call["argv"] for call in cluster.calls("scontrol") if call["argv"][0] == "requeue"]


def interrupt(cluster: Workplace, number: signal.Signals, **environment: str) -> tuple[int, str]:
    """Run the batch script with a training step that saves on SIGUSR1, and send the script a signal."""
    cluster.stand_in("pretrain", SAVES_ON_SIGNAL)
    process = cluster.start("slurm.sbatch", "c.toml", **environment)
    try:
        wait_until(lambda: cluster.marks("running") == 1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert cluster.marks("saved") == 1, output
    return process.returncode, output


def test_slurm_step(cluster: Workplace) -> None:
    assert cluster.run("slurm.sbatch", *ARGUMENTS) == (0, "")
    (step,) = cluster.calls("srun")
    assert step["argv"] == ["--kill-on-bad-exit=0", "--wait=60", "pretrain", "train", *ARGUMENTS]
    assert step["cwd"] == str(cluster.root)
    assert step["env"] == {
        "RANK": None,
        "WORLD_SIZE": None,
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": "21987",
        "OMP_NUM_THREADS": "1",
        "SRUN_CPUS_PER_TASK": "6",
    }
    (call,) = cluster.calls("pretrain")
    assert call["argv"] == ["train", *ARGUMENTS]
    assert requeues(cluster) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saved_run_is_requeued_once(cluster: Workplace, number: signal.Signals) -> None:
    code, output = interrupt(cluster, number, SLURM_RESTART_COUNT="1", MAX_REQUEUES="2")
    assert code == 75, output
    assert requeues(cluster) == [["requeue", "4321987"]]


def test_slurm_cancelled_run_stays_away(cluster: Workplace) -> None:
    # What a real slurmctld says while a job that got `scancel` winds down.
    cluster.stand_in("squeue", 'print("COMPLETING")')
    code, output = interrupt(cluster, signal.SIGTERM)
    assert code == 75
    assert "not requeued, as the job is COMPLETING" in output
    assert requeues(cluster) == []


def test_slurm_requeues_are_bounded(cluster: Workplace) -> None:
    code, output = interrupt(cluster, signal.SIGUSR1, SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    assert code == 75
    assert "not requeued after 2 restarts" in output
    assert requeues(cluster) == []


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_slurm_other_exit_codes_are_not_requeued(cluster: Workplace, code: int) -> None:
    cluster.stand_in("pretrain", f"sys.exit({code})")
    assert cluster.run("slurm.sbatch", "c.toml")[0] == code
    assert requeues(cluster) == []


def test_slurm_says_where_to_submit_from(cluster: Workplace, tmp_path: Path) -> None:
    code, output = cluster.run("slurm.sbatch", "c.toml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2
    assert "submit from the root of the repository" in output
    assert cluster.calls("srun") == []


# Several sites


PLAN = """
if sys.argv[1] == "plan":
    print(json.dumps({"decentral": DECENTRAL}, indent=2))
    sys.exit(0)
if sys.argv[1] == "coordinator":
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("listening", flush=True)
    time.sleep(120)
    sys.exit(9)
site = int(sys.argv[-1].removeprefix("decentral.site="))
starts = len(list(Path(os.environ["RECORDS"]).glob(f"start-{site}-*")))
Path(os.environ["RECORDS"], f"start-{site}-{os.getpid()}").touch()
print(f"site {site} writes", flush=True)
"""


@pytest.fixture
def sites(workplace: Workplace) -> Callable[..., None]:
    """Put a `pretrain` on PATH that plans two sites, coordinates, and trains by running a body: it knows its `site`,
    and how often that was started before, `starts`."""

    def stand_in(body: str = "", **changes: object) -> None:
        decentral = {"sites": 2, "transport": "torchft", "directory": str(workplace.root / "the runs")} | changes
        workplace.stand_in("pretrain", PLAN.replace("DECENTRAL", repr(decentral)) + body)

    return stand_in


def commands(workplace: Workplace) -> dict[str, list[list[str]]]:
    """The arguments of all calls of `pretrain`, by command."""
    found: dict[str, list[list[str]]] = {}
    for call in workplace.calls("pretrain"):
        found.setdefault(call["argv"][0], []).append(call["argv"][1:])
    return {name: sorted(calls) for name, calls in found.items()}


def test_sites_and_their_coordinator(workplace: Workplace, sites: Callable[..., None]) -> None:
    sites()
    code, output = workplace.run("sites.sh", *ARGUMENTS)
    assert code == 0, output
    assert commands(workplace) == {
        "plan": [[*ARGUMENTS, "--world-size", "1", "--json"]],
        "coordinator": [ARGUMENTS],
        "train": [[*ARGUMENTS, "--set", f"decentral.site={site}"] for site in range(2)],
    }
    runs = workplace.root / "the runs"
    assert [(runs / f"site_{site}" / "log.txt").read_text() for site in range(2)] == [
        "site 0 writes\n",
        "site 1 writes\n",
    ]
    assert output.count("done") == 2
    assert workplace.calls("pretrain")[0]["env"]["OMP_NUM_THREADS"] == "1"


def test_sites_of_several_processes(workplace: Workplace, sites: Callable[..., None]) -> None:
    sites(transport="fixed", sites=3)
    workplace.stand_in("torchrun")
    code, output = workplace.run("sites.sh", *ARGUMENTS, NPROC="2")
    assert code == 0, output
    started = [options_and_command(call["argv"]) for call in workplace.calls("torchrun")]
    assert sorted(command for _, command in started) == [
        ["pretrain", "train", *ARGUMENTS, "--set", f"decentral.site={site}"] for site in range(3)
    ]
    assert all(options[:2] == ["--standalone", "--nproc-per-node=2"] for options, _ in started)
    assert commands(workplace) == {"plan": [[*ARGUMENTS, "--world-size", "2", "--json"]]}, "nobody needs a coordinator"


def test_a_failed_site_is_started_again(workplace: Workplace, sites: Callable[..., None]) -> None:
    sites("sys.exit(9 if site == 1 and starts < 2 else 0)")
    code, output = workplace.run("sites.sh", "c.toml", RESTARTS="2")
    assert code == 0, output
    assert (workplace.marks("start-0"), workplace.marks("start-1")) == (1, 3)
    assert output.count("site 1: failed with 9, starting it again") == 2


@pytest.mark.parametrize(("code", "starts"), [(9, 2), (2, 1)])
def test_the_first_real_failure_ends_all_sites(
    workplace: Workplace, sites: Callable[..., None], code: int, starts: int
) -> None:
    """A mistake of the user's is not tried again."""
    waits = SAVES_ON_SIGNAL.replace("SIGUSR1", "SIGTERM")
    fails = f"""
if site == 1:
    import time
    while not list(Path(os.environ["RECORDS"]).glob("running-*")): time.sleep(0.1)
    sys.exit({code})
"""
    sites(fails + waits)
    found, output = workplace.run("sites.sh", "c.toml", RESTARTS="1")
    assert found == code, output
    assert workplace.marks("start-1") == starts
    assert workplace.marks("saved") == 1
    assert f"site 1: failed with {code}, ending the others: see " in output
    assert "site 0: ended with 75" in output


@pytest.mark.parametrize(
    ("number", "passed"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGTERM")]
)
def test_sites_are_told_to_save(
    workplace: Workplace, sites: Callable[..., None], number: signal.Signals, passed: str
) -> None:
    sites(SAVES_ON_SIGNAL.replace("SIGUSR1", passed))
    process = workplace.start("sites.sh", "c.toml", RESTARTS="3")
    try:
        wait_until(lambda: workplace.marks("running") == 2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert (workplace.marks("saved"), workplace.marks("start")) == (2, 2)


def test_a_coordinator_is_started_again(workplace: Workplace, sites: Callable[..., None]) -> None:
    sites('import time\nwhile len(list(Path(os.environ["RECORDS"]).glob("pretrain-*"))) < 5: time.sleep(0.1)')
    process = workplace.start("sites.sh", "c.toml")
    try:
        wait_until(lambda: "coordinator" in commands(workplace) and workplace.marks("start") == 2)
        log = workplace.root / "the runs" / "coordinator.txt"
        wait_until(lambda: log.exists() and "listening" in log.read_text())
        (first,) = [
            path.name.rpartition("-")[2]
            for path in workplace.records.glob("pretrain-*")
            if json.loads(path.read_text())["argv"][0] == "coordinator"
        ]
        os.kill(int(first), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "coordinator: ended with 137, starting it again" in output
    assert len(commands(workplace)["coordinator"]) == 2


def test_sites_need_a_plan(workplace: Workplace) -> None:
    workplace.stand_in("pretrain", 'print("error: c.toml: bad", file=sys.stderr)\nsys.exit(2)')
    code, output = workplace.run("sites.sh", "c.toml")
    assert code == 2
    assert output == "error: c.toml: bad\n"
    workplace.stand_in("pretrain", "print('{\"decentral\": null}')")
    code, output = workplace.run("sites.sh", "c.toml")
    assert code == 1
    assert output == "launch/sites.sh: the configuration has no section [decentral]\n"
    assert workplace.run("sites.sh")[0] == 2
    assert set(commands(workplace)) == {"plan"}
