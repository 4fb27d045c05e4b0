"""The command line: help, every command on small inputs, exit codes, and how errors are said."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import __version__, cli
from pretrain.config.load import dump_config
from pretrain.errors import DataError
from tests.helpers.commands import CommandProcess, command_process
from tests.helpers.runs import make_corpus, tiny_config

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "train",
    "plan",
    "coordinator",
    "demo",
    "data prepare",
    "data verify",
    "ckpt ls",
    "ckpt verify",
    "ckpt join",
    "ckpt split",
    "report",
]
GROUPS = ["", "data", "ckpt"]


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and group of commands by its words, the whole program as ""."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from parsers(sub, f"{name} {word}".strip())


def test_the_commands_are_those_of_the_contract() -> None:
    assert {name for name, _ in parsers(cli._parser())} >= {*COMMANDS, *GROUPS}


@pytest.mark.parametrize(("name", "parser"), parsers(cli._parser()))
def test_help_shows_an_example_that_parses(
    name: str, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    text, _, example = capsys.readouterr().out.rpartition("example:\n  ")
    assert text.startswith(f"usage: {f'pretrain {name}'.strip()}")
    words = shlex.split(example)
    arguments = words[words.index("pretrain") + 1 :]
    options = cli._parser().parse_args(arguments)
    assert callable(options.run)
    if name not in GROUPS:
        assert arguments[: len(name.split())] == name.split()
    if "config" in options:
        assert (ROOT / options.config).is_file()
    with pytest.raises(SystemExit):  # the check tells a wrong example
        cli._parser().parse_args([*arguments, "--no-such-option"])


def test_help_needs_no_torch() -> None:
    """What makes it quick, in a fresh interpreter; a command that trains is the negative control."""
    program = "import sys, pretrain.cli{also}; sys.exit(3 if 'torch' in sys.modules else 0)"
    codes = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", program.format(also=also)]).returncode
        for also in ("", ", pretrain.signals")
    ]
    assert codes == [0, 3]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"meristem {__version__}\n"


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "models" / "sparkling-small.toml")
    assert cli.main(["plan", config]) == 0
    text = capsys.readouterr().out
    assert cli.main(["plan", config, "--json", "--world-size", "16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 16
    assert f"{plan['stages'][0]['parameters']['total']:,}" in text
    assert cli.main(["plan", config, "--world-size", "3"]) == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m pretrain plan configs/models/sparkling-small.toml --json | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pretrain() -> Iterator[CommandProcess]:
    with command_process() as run:
        yield run


def test_data_prepare_and_verify(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data"
    arguments = ["data", "prepare", str(corpus.parent / "text"), "--output", str(output), "--vocab-size", "300"]
    assert cli.main([*arguments, "--valid-fraction", "0.2", "--suffixes", ".py,.md", "--eod-token", "</s>"]) == 0
    assert '"</s>"' in (output / "tokenizer.json").read_text()
    assert re.search(rf"{output}/train\.bin: \d+ documents, [\d,]+ tokens, [\d,]+ bytes", capsys.readouterr().out)

    prefixes = [str(output / split) for split in ("train", "valid")]
    assert cli.main(["data", "verify", *prefixes]) == 0
    assert capsys.readouterr().out == "".join(f"{prefix}: ok\n" for prefix in prefixes)
    with (output / "valid.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    assert cli.main(["data", "verify", *prefixes]) == 1
    ok, *findings = capsys.readouterr().out.splitlines()
    assert ok == f"{prefixes[0]}: ok"
    assert all(line.startswith(f"error: {prefixes[1]}.bin: ") for line in findings)
    assert any("token 65535 at position 0" in line for line in findings)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--vocab-size", "10", "--vocab-size 10: must be greater than or equal to 257; give another value"),
        ("--valid-fraction", "1.5", "--valid-fraction 1.5: must be less than or equal to 1; give another value"),
        ("--tokenizer", "absent.json", "absent.json: no such file; a tokenizer is"),
    ],
)
def test_options_of_data_prepare_are_checked(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    arguments = ["data", "prepare", str(corpus.parent / "text"), "--output", str(tmp_path / "data"), option, value]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_training_to_report(pretrain: CommandProcess, corpus: Path, tmp_path: Path) -> None:
    directory, config = tmp_path / "run", tmp_path / "config.toml"
    config.write_text(dump_config(tiny_config(corpus, directory)))
    trained = pretrain("train", config, "--set", "budget.steps=4")
    assert (trained.code, trained.err.count("\n")) == (0, 1), trained.err
    assert "4 steps of 256 tokens" in trained.out
    again = pretrain("train", config, "--set", "budget.steps=5")
    assert f"resumed from {directory}/checkpoints/step_00000004 at step 4 of 5" in again.out
    assert "changed since: budget.steps: 4 -> 5" in again.out

    listed = pretrain("ckpt", "ls", directory, COLUMNS="120")
    assert listed.code == 0
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in listed.out.splitlines()]
    rows = [row for row in cells if row and row[0].isdecimal()]
    assert [row[:2] for row in rows] == [["3", "768"], ["4", "1,024"], ["5", "1,280"]]
    assert [row[4:] for row in rows] == [["1 rank", "yes"]] * 3

    paths = [f"{directory}/checkpoints/step_0000000{step}" for step in (3, 4, 5)]
    assert pretrain("ckpt", "verify", directory).out == "".join(f"{path}: ok\n" for path in paths)
    report = pretrain("report", directory, "--out", tmp_path / "pictures")
    assert (report.code, report.err) == (0, "")
    assert re.search(r"steps +5\n", report.out)
    assert report.out.endswith(f"pictures: {tmp_path / 'pictures'}\n")
    assert {"loss.png", "report.md"} <= {path.name for path in (tmp_path / "pictures").iterdir()}

    shard = next(Path(paths[1]).glob("shard_*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x00")
    damaged = pretrain("ckpt", "verify", directory)
    assert damaged.code == 1
    assert [line.partition(": ")[0] for line in damaged.out.splitlines() if not line.endswith(": ok")] == [paths[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt", "ls", "{here}"], "holds no checkpoints"),
        (["ckpt", "verify", "{here}/absent"], "holds no checkpoints"),
        (["report", "{here}"], "metrics.jsonl"),
        (["report", "{here}/absent"], "absent"),
        (["plan", "{here}/absent.toml"], "absent.toml:\n  cannot be read: No such file or directory; check the path"),
        (["data", "prepare", "{here}/absent", "--output", "{here}/data"], "absent"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([argument.format(here=tmp_path) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1 + message.count("\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_world_size_is_a_positive_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "config.toml", f"--world-size={text}"])
    assert ended.value.code == 2
    assert f"argument --world-size: {text}: must be a whole number, at least 1" in capsys.readouterr().err


class Failing:
    """A command that raises, run through `main`; remembers how long `main` waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.waited = 0.0

    def __call__(self, error: BaseException, **environment: str) -> int:
        def fail(options: argparse.Namespace) -> int:
            raise error

        def sleep(seconds: float) -> None:
            self.waited += seconds

        with self._monkeypatch.context() as patch:
            patch.setattr(cli, "_report", fail)
            patch.setattr(time, "sleep", sleep)
            for name in ("RANK", "SLURM_PROCID"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            return cli.main(["report", "run"])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


def test_rank_0_tells_a_user_error_at_once(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(DataError("x: short; copy it"), RANK="0") == 2
    assert capsys.readouterr().err == "error: x: short; copy it\n"
    assert failing.waited == 0


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_tell_it_when_rank_0_did_not(
    failing: Failing, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    assert failing(DataError("x: short; copy it"), **{variable: "3"}) == 2
    assert capsys.readouterr().err == "error on rank 3: x: short; copy it\n"
    assert failing.waited == cli.SPEAK_AFTER_SECONDS


def test_a_rank_that_lost_another_lets_it_speak_first(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234\nmore")
    assert failing(error, RANK="0") == 1
    assert failing.waited > cli.SPEAK_AFTER_SECONDS
    assert capsys.readouterr().err.startswith("error: another rank has ended, look for its message ([pair.cc")


def test_ctrl_c_leaves_no_traceback(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), AssertionError(), KeyError("x")])
def test_faults_of_ours_keep_their_traceback(failing: Failing, error: Exception) -> None:
    with pytest.raises(type(error)):
        failing(error)
