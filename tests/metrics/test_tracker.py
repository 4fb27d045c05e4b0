"""wandb: no secret leaves, nothing is asked, no wandb trouble stops training. With the real wandb in processes of
their own, as it starts services and reads the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.metrics.tracker import WandbTracker, redact, scalars

PLANTED = "planted" + "0123456789abcdef" * 2 + "x"  # 40 characters, as an API key has

PRELUDE = """
import logging, os, pathlib, sys, time, psutil
from pretrain.metrics.tracker import WandbTracker
logging.basicConfig(level=logging.WARNING, format="%(message)s")
def open_tracker(**options):
    config = {"model": {"hidden_size": 64}, "hub": {"hf_token": sys.argv[2]}}
    arguments = dict(project="test", name="run", config=config, finish_timeout_seconds=10.0) | options
    return WandbTracker(pathlib.Path(sys.argv[1]), **arguments)
def service():
    return next(child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core")
"""


def run_tracker(tmp_path, program, **environment):
    pytest.importorskip("wandb")
    (tmp_path / "home").mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(tmp_path / "home"), "PLANTED": PLANTED, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program, str(tmp_path), PLANTED],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


def files_with(tmp_path, text):
    """Files under `tmp_path` that hold `text`."""
    return [path for path in tmp_path.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def offline_files(tmp_path):
    return sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


LOG_TWO_STEPS = """
tracker = open_tracker()
tracker.log({"step": 1, "loss": 2.5, "moe": {"entropy_mean": 0.9}})
tracker.log({"step": 2, "loss": 2.25})
tracker.close()
"""


def test_offline_run_without_a_key_holds_no_secret(tmp_path):
    (tmp_path / "home").mkdir()
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {'n' * 40}\n")
    done = run_tracker(tmp_path, LOG_TWO_STEPS)
    (file,) = offline_files(tmp_path)  # offline, although netrc has a key
    assert b"entropy_mean" in file.read_bytes()
    assert b"hidden_size" in file.read_bytes()
    assert files_with(tmp_path, PLANTED) == []
    assert files_with(tmp_path, "n" * 40) == [netrc]
    assert done.stdout == done.stderr == ""  # and it is silent


def test_without_our_settings_wandb_writes_the_command_line_down(tmp_path):
    """The negative control: what the test above looks for is found when it is there."""
    program = "import pretrain.metrics.tracker as module\nmodule.PRIVACY_SETTINGS = {}\n" + LOG_TWO_STEPS
    run_tracker(tmp_path, program)
    assert files_with(tmp_path, PLANTED) != []


def test_unreachable_server_falls_back_to_offline_and_keeps_the_key_to_itself(tmp_path):
    # Port 9 of this machine: nobody listens there.
    program = LOG_TWO_STEPS.replace("open_tracker()", "open_tracker(init_timeout_seconds=1.0)")
    done = run_tracker(tmp_path, program, WANDB_API_KEY=PLANTED, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "wandb cannot be reached" in done.stderr
    assert "logging offline" in done.stderr
    assert len(offline_files(tmp_path)) == 1
    assert files_with(tmp_path, PLANTED) == []
    assert not (tmp_path / "home" / ".netrc").exists()


def test_dead_service_warns_once_and_training_goes_on(tmp_path):
    program = """
tracker = open_tracker()
tracker.log({"step": 1, "loss": 1.0})
service().kill()
for step in range(2, 2000):
    tracker.log({"step": step, "loss": 1.0})
tracker.close()
print("trained")
"""
    done = run_tracker(tmp_path, program)
    assert done.stdout == "trained\n"
    assert done.stderr.count("wandb stopped working") == 1


def test_stuck_service_delays_nothing_but_the_end(tmp_path):
    program = """
import pretrain.metrics.tracker as module
module.MAX_QUEUED_ROWS = 100
tracker = open_tracker(finish_timeout_seconds=1.0)
service().suspend()
for step in range(1, 3000):
    tracker.log({"step": step, **{f"value{i}": float(step) for i in range(30)}})
print("trained", flush=True)
tracker.close()
"""
    done = run_tracker(tmp_path, program)
    assert done.stdout == "trained\n"
    assert "wandb takes no more rows" in done.stderr
    assert "wandb did not finish within 1 s" in done.stderr


def test_restart_goes_on_with_the_same_run(tmp_path):
    program = """
tracker = open_tracker(run_id="abcd1234", logged_step=5)
for step in (4, 5, 6):
    tracker.log({"step": step, "loss": step / 8})
tracker.close()
print(tracker.run_id)
"""
    assert run_tracker(tmp_path, program).stdout == "abcd1234\n"
    (file,) = offline_files(tmp_path)
    assert file.name == "run-abcd1234.wandb"
    content = file.read_bytes()
    assert b"0.75" in content
    assert b"0.625" not in content  # step 5 was sent by the run before


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"metrics.wandb = true: .* pip install meristem\[wandb\]"):
        WandbTracker(tmp_path, project="test", name="run", config={})


@pytest.mark.parametrize(
    "name", ["api_key", "HF_TOKEN", "hfToken", "client-secret", "password", "db_passwd", "auth", "aws_credentials"]
)
def test_secret_names_are_redacted(name):
    assert redact({"a": {name: "hidden"}, "b": [{name: "hidden"}]}) == {
        "a": {name: "<redacted>"},
        "b": [{name: "<redacted>"}],
    }


def test_ordinary_names_are_not():
    config = {"tokens": 5, "tokenizer": "t.json", "at_tokens": 1, "keep": 3, "monkey": 1, "author": "me", "kind": None}
    assert redact(config) == config
    assert json.loads(json.dumps(redact(config))) == config


def test_scalars_are_flat_numbers():
    row = {"loss": 1.5, "skipped": True, "kind": "train", "mfu": None, "moe": {"entropy_mean": 1, "entropy": [1, 1]}}
    assert scalars(row) == {"loss": 1.5, "skipped": 1.0, "moe/entropy_mean": 1}


def test_only_one_file_imports_wandb():
    package = Path(__file__).parents[2] / "pretrain"
    importing = [path.name for path in package.rglob("*.py") if "import wandb" in path.read_text()]
    assert importing == ["tracker.py"]
