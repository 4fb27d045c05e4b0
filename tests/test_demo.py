"""`pretrain demo` from nothing to the picture, stopped on the way, and given again."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config.load import dump_config, load_config
from tests.helpers.commands import contents
from tests.helpers.runs import events, rows, tiny_config

ROOT = Path(__file__).parents[1]


def demo(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pretrain", "demo", str(config), *(f"--set={override}" for override in overrides)]
    # Nothing of the developer's: what a newcomer's shell has not set must not be missed.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str], *, code: int) -> list[str]:
    """Lines of a demo that ended as it should, and without a word on standard error that is not ours."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert re.fullmatch(r"[^\n]*\bgloo\b[^\n]*\n", err), err
    assert "Warning" not in out
    return out.splitlines()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A model that trains in seconds, on two processes."""
    file = tmp_path / "demo.toml"
    file.write_text(
        dump_config(
            tiny_config(
                tmp_path / "data",
                tmp_path / "run",
                budget={"steps": 4000},
                parallel={"expert": 2},
                batch={"sequence_length": 64},
            )
        )
    )
    return file


@pytest.mark.slow
def test_the_demo_stopped_finished_and_given_again(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = demo(config)
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len(rows(run, "train")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    lines = said(process, code=75)
    assert [line[:4] for line in lines if re.match(r"\d/4 ", line)] == ["1/4 ", "2/4 ", "3/4 "]
    assert lines[-1].startswith("stopped; to go on: ")
    assert lines[-1].endswith(f"demo {config}")
    (stopped,) = events(run, "stopped")
    assert stopped["signal"] == "SIGINT"

    steps = stopped["step"] + 2
    lines = said(demo(config, f"budget.steps={steps}"), code=0)
    assert [line for line in lines if re.match(r"\d/4 ", line)] == [
        f"1/4 corpus: {tmp_path / 'data'} is there already",
        "2/4 baselines: unigram and bigram models of the training tokens, on the validation samples",
        next(line for line in lines if line.startswith("3/4 training on 2 processes; to beat: ")),
        "4/4 report",
    ]
    learned, see, following = lines[-3:]
    (baseline,) = events(run, "baselines")
    bigram, unigram = (f"{baseline[f'{name}_bits_per_byte']:.3f}" for name in ("bigram", "unigram"))
    assert re.fullmatch(
        rf"learned: \d\.\d{{3}} bits per byte on held-out modules \(bigram model {bigram}, unigram model {unigram}\)",
        learned,
    )
    assert see == f"see:     {run}/report/loss.png (checkpoints: {run}/checkpoints)"
    assert (run / "report" / "loss.png").stat().st_size > 10_000
    words = shlex.split(following.removeprefix("next:    ").removesuffix("  (goes on from here)"))
    options = cli._parser().parse_args(words[words.index("demo") :])
    assert load_config(options.config, options.set).budget.steps == 2 * steps

    before = contents(run / "checkpoints"), rows(run, "train"), contents(tmp_path / "data")
    assert said(demo(config, f"budget.steps={steps}"), code=0)[-3:] == lines[-3:]
    assert before == (contents(run / "checkpoints"), rows(run, "train"), contents(tmp_path / "data"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("eval.every_steps=0", "eval.every_steps = 0: the demo compares validation losses with its baselines; set it"),
        ("model.vocab_size=100", "model.vocab_size = 100: a tokenizer needs 257 or more; raise it"),
        ("data.train=[]", "data.train = []: the demo prepares one dataset, named train; set prefix to FOLDER/train"),
        (
            'data.valid=[{prefix="elsewhere/valid"}]',
            "data.train, data.valid: the demo prepares both in one folder; give them the same one",
        ),
        ("batch.global_batch_size=7", "batch.global_batch_size = 7: must be a multiple of batch.micro_batch_size * "),
    ],
)
def test_what_the_demo_cannot_do_is_said_before_it_begins(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, problem: str
) -> None:
    assert cli.main(["demo", str(config), "--set", override]) == 2
    head, line = capsys.readouterr().err.splitlines()
    assert head == f"error: 1 problem in {config}:"
    assert line.startswith(f"  {problem}")
    assert [path.name for path in config.parent.iterdir()] == ["demo.toml"]
