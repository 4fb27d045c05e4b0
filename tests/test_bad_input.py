"""Bad input gives one clear error, exit code 2, and leaves everything as it was."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain import cli
from pretrain.checkpoint import CheckpointReader, read_state
from pretrain.config.load import dump_config
from pretrain.config.optim import SECTIONS
from pretrain.config.schema import Config
from pretrain.run_directory import locked
from tests.helpers.commands import CommandProcess, Result, command_process, contents, torchrun
from tests.helpers.runs import events, make_corpus, rows, tiny_config

ROOT = Path(__file__).parents[1]

# What a process says on standard error when it begins to train.
DEVICE_LINE = re.compile(r"[^\n]*\bgloo\b[^\n]*\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pretrain() -> Iterator[CommandProcess]:
    with command_process() as run:
        yield run


def written(config: Config, folder: Path) -> Path:
    """The configuration as a file."""
    file = folder / "config.toml"
    file.write_text(dump_config(config))
    return file


def short_config(corpus: Path, directory: Path, *, steps: int) -> Config:
    """The tiny configuration with so few steps that its warm-up has to be shorter."""
    return tiny_config(corpus, directory, budget={"steps": steps}, schedule={"warmup_steps": 1})


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    """A configuration of a run that has not begun."""
    return written(tiny_config(corpus, tmp_path / "run"), tmp_path)


@pytest.fixture(scope="module")
def trained(corpus: Path, pretrain: CommandProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps; the passing counterpart of what is refused below."""
    folder = tmp_path_factory.mktemp("trained")
    result = pretrain("train", written(short_config(corpus, folder / "run", steps=2), folder))
    assert (result.code, only_error(result)) == (0, "")
    return folder / "run"


@pytest.fixture
def begun(trained: Path, corpus: Path, tmp_path: Path) -> Path:
    """The configuration of a run that has done two of its three steps."""
    shutil.copytree(trained, tmp_path / "run")
    return written(short_config(corpus, tmp_path / "run", steps=3), tmp_path)


def only_error(result: Result) -> str:
    """All that a command wrote to standard error, the line on its device aside."""
    return DEVICE_LINE.sub("", result.err, count=1)


def refused(result: Result) -> str:
    """The one message of a command that refused its input."""
    assert result.code == 2, result
    message = only_error(result)
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message.strip()


# Configuration: key, value, rule and remedy, all problems at once.

PROBLEMS = [
    ("model.top_kk=2", "model.top_kk = 2: unknown key; did you mean model.top_k?"),
    ("model.num_query_groups=3", "model.num_query_groups = 3: must divide model.num_attention_heads = 4; use"),
    ("parallel.expert=3", "parallel.expert = 3: must divide model.num_experts = 4; use parallel.expert = 2 or"),
    ("parallel.pipeline=4", "parallel.pipeline = 4: must divide model.num_layers = 2; use parallel.pipeline = 2 or"),
    ("batch.global_batch_size=7", "batch.global_batch_size = 7: must be a multiple of batch.micro_batch_size * data"),
    ("parallel.tensor=2", "parallel.tensor * parallel.pipeline * parallel.context = 2: must divide world size = 1"),
    ("optim.lr=fast", 'optim.lr = "fast": must be a number; write it without quotes'),
]


@pytest.mark.parametrize(("override", "problem"), PROBLEMS)
def test_a_problem_of_the_configuration(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, problem: str
) -> None:
    before = contents(config.parent)
    assert cli.main(["train", str(config), "--set", override]) == 2
    head, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {len(lines)} problems? in {config}:", head)
    assert sum(line.startswith(f"  {problem}") for line in lines) == 1
    assert len(lines) == 1 or override.startswith("parallel.")  # these break the rule about the world size, too
    assert contents(config.parent) == before


def test_all_problems_are_told_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rules on a key of which nothing is known but that it is misspelt, or on one of the wrong type, cannot be told.
    chosen = [pair for pair in PROBLEMS if pair[0].partition("=")[0] not in ("model.top_kk", "parallel.tensor")]
    before = contents(config.parent)
    assert cli.main(["train", str(config), *(f"--set={override}" for override, _ in chosen)]) == 2
    head, *lines = capsys.readouterr().err.splitlines()
    assert head.startswith(f"error: {len(lines)} problems in ")
    for _, problem in chosen:
        if not problem.startswith("batch."):  # with a wrong layout there is no data-parallel size
            assert sum(line.startswith(f"  {problem}") for line in lines) == 1, problem
    assert contents(config.parent) == before


# The optimizer: keys that its kind does not read, and rules that tensors cannot have.

OPTIM_PROBLEMS = [
    (
        "{muon={}}",
        'optim.muon: optim.kind = "adamw" does not read it; leave it out, or set optim.kind = "muon" or "muonh"',
    ),
    (
        "{kind='muon', muon={newton_schulz_coefficients='deepseek_v4'}}",
        'optim.muon.newton_schulz_steps = 5: newton_schulz_coefficients = "deepseek_v4" needs 10 or more; raise',
    ),
    ("{kind='lion', eps=1e-8}", 'optim.eps = 1e-08: optim.kind = "lion" does not read it; leave it out'),
    ("{kind='muonh', muon={lr=0.02}}", 'optim.muon.lr = 0.02: optim.kind = "muonh" does not read it; leave it out'),
    ("{kind='soap', mars={gamma=0.1}}", 'optim.mars: optim.kind = "soap" does not read it; leave it out, or set optim'),
    ("{kind='moun'}", 'optim.kind = "moun": must be "adamw", "nadamw", "mars", '),
    ("{kind='muon', muon={momentum=1.0}}", "optim.muon.momentum = 1.0: must be less than 1; lower it"),
    ("{kind='muon', muon={gamma=0.1}}", "optim.muon.gamma = 0.1: unknown key; "),
    (
        "{kind='muon', routes={'*.router.weight'='soap'}}",
        'optim.routes."*.router.weight" = "soap": optim.kind = "muon" has',
    ),
    (
        "{kind='muon', routes={'*.rooter.*'='muon'}}",
        'optim.routes."*.rooter.*" = "muon": matches no tensor; names are ',
    ),
    (
        "{kind='soap', routes={'*norm*'='soap'}}",
        'optim.routes."*norm*" = "soap": decoder.layers.0.input_layernorm.weight is',
    ),
]


@pytest.mark.parametrize(("optim", "problem"), OPTIM_PROBLEMS)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_problem_of_the_optimizer(
    config: Path, capsys: pytest.CaptureFixture[str], command: str, optim: str, problem: str
) -> None:
    before = contents(config.parent)
    assert cli.main([command, str(config), "--set", f"optim={optim}"]) == 2
    head, line = capsys.readouterr().err.splitlines()
    assert head in (f"error: 1 problem in {config}:", "error: 1 problem:")  # of the file; of the model it describes
    assert line.startswith(f"  {problem}")
    assert contents(config.parent) == before


# Sites that train together, of a model with four experts and a batch of 8 sequences in micro-batches of 2.

DECENTRAL_PROBLEMS = [
    ("{kind='sepes', sites=2}", 'decentral.kind = "sepes": must be "spes" or "diloco"; did you mean "spes"?'),
    ("{sites=2}", "decentral.kind: missing; give it a value"),
    ("{kind='spes', sites=0}", "decentral.sites = 0: must be at least 1; raise it"),
    ("{kind='spes', sites=2, sight=1}", "decentral.sight = 1: unknown key; did you mean decentral.site?"),
    ("{kind='spes', sites=2, site=2}", "decentral.site = 2: must be less than decentral.sites = 2, as sites count"),
    ("{kind='spes', sites=2, merge={top_k=4}}", "decentral.merge.top_k = 4: unknown key; "),
    ("{kind='diloco', sites=3}", "batch.global_batch_size = 8: must be a multiple of batch.micro_batch_size * data-"),
    (
        "{kind='spes', sites=2, merge={coefficient=0.1}}",
        "decentral.merge.neighbours = 4: must be less than model.num_experts = 4, as no expert is its own neighbour; ",
    ),
    (
        "{kind='spes', sites=4, coordinator='10.1.2.3:29400'}",
        'decentral.bind = "127.0.0.1": sites that meet at decentral.coordinator = "10.1.2.3:29400" cannot reach this',
    ),
]


@pytest.mark.parametrize(("decentral", "problem"), DECENTRAL_PROBLEMS)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_problem_of_the_sites(
    config: Path, capsys: pytest.CaptureFixture[str], command: str, decentral: str, problem: str
) -> None:
    before = contents(config.parent)
    assert cli.main([command, str(config), "--set", f"decentral={decentral}", "--set", "eval.every_steps=0"]) == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith(f"  {problem}") for line in lines) == 1
    assert contents(config.parent) == before


def test_problems_of_the_sites_are_told_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"site": "5", "sites": "3", "min_sites": "1", "coordinator": "here", "expert_delay_steps": "100"}
    overrides = [f"--set=decentral.{key}={value}" for key, value in (keys | {"kind": "spes"}).items()]
    assert cli.main(["plan", str(config), *overrides, "--set=growth=[{at_step=2, depth={}}]"]) == 2
    told = {line.split()[0] for line in capsys.readouterr().err.splitlines()[1:]}
    assert told == {*(f"decentral.{key}" for key in keys), "[[growth]]:"}


def test_sites_without_a_problem(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = "decentral={kind='spes', sites=4, site=3, merge={coefficient=0.1, neighbours=3}}"
    assert cli.main(["plan", str(config), "--set", sites]) == 0
    assert "trained experts" in capsys.readouterr().out


def test_every_kind_of_optimizer_without_a_problem(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The passing counterpart: with its own sections, and read as it is written down."""
    for kind, sections in SECTIONS.items():
        optim = {"kind": kind} | {section: {} for section in sections}
        assert cli.main(["plan", str(written(tiny_config(corpus, tmp_path / "run", optim=optim), tmp_path))]) == 0, kind
        assert capsys.readouterr().err == ""


# Growth: refused by `plan` and by `train`, before anything is made. The model has 2 layers, hidden size 32, 4 experts
# of width 32 with top-k 2, 4 heads in 2 groups; the run 6 steps, the first 2 of them warm-up.

GROWTHS = [
    "{at_step=3, depth={method='stack'}}",
    "{at_step=3, experts={}, parallel={expert=4}, optimizer_state='reset'}",
    "{at_step=3, experts={top_k='hold', exact_start=true}}",
    "{at_step=3, hidden={}, expert_ffn={}, rewarm={steps=2}}",
    "{at_step=3, query_groups={}}, {at_tokens=1025, hidden={factor=1.5}}",
]

GROWTH_PROBLEMS = [
    ("{depth={method='stack'}}", "growth[0].at_step = 0, growth[0].at_tokens = 0: exactly one of them must be given;"),
    ("{at_step=6, depth={}}", "growth[0].at_step = 6: must come before the end of the budget, step 6;"),
    (
        "{at_step=4, query_groups={}}, {at_tokens=1024, hidden={}}",
        "growth[1].at_tokens = 1024 (step 4): must come after",
    ),
    ("{at_step=3}", "growth[0]: nothing grows; give it depth, experts,"),
    ("{at_step=3, depht={}}", "[growth[0].depht]: unknown section; did you mean [growth.depth]?"),
    ("{at_step=3, depth={method='stck'}}", 'growth[0].depth.method = "stck": must be "interpose" or "stack"; did you'),
    ("{at_step=3, depth={factor=1}}", "growth[0].depth.factor = 1: must be at least 2; raise it"),
    ("{at_step=3, hidden={factor=1}}", "growth[0].hidden.factor = 1: must be more than 1; raise it"),
    ("{at_step=3, experts={top_k=4}}", 'growth[0].experts.top_k = 4: must be "double" or "hold"; choose one'),
    ("{at_step=3, depth={keep_first=2}}", "growth[0].depth.keep_first + keep_last = 2: leaves none of the 2 layers"),
    ("{at_step=3, experts={exact_start=true}}", 'growth[0].experts.exact_start: only for top_k = "hold"; leave it out'),
    ("{at_step=3, hidden={factor=3}}", "growth[0].hidden.factor = 3.0: several copies of one channel would stay equal"),
    ("{at_step=3, hidden={factor=1.3}}", "growth[0].hidden.factor = 1.3: 32 times that is no larger whole number; use"),
    ("{at_step=3, ffn={}}", "growth[0].ffn: the model has no such axis (model.ffn_size = 0); leave it out"),
    (
        "{at_step=1, hidden={}, rewarm={steps=2}}",
        "growth[0].at_step = 1: growth[0].rewarm starts from the learning rate",
    ),
    ("{at_step=3, hidden={}, rewarm={steps=3}}", "growth[0].rewarm.steps = 3: must end before the budget, which has 3"),
    ("{at_step=3, experts={}, optimizer_state='exact'}", 'growth[0].optimizer_state = "exact": known only for experts'),
    (
        "{at_step=3, experts={}, parallel={expert=3}}",
        "after growth[0], experts 4 -> 8 (top-k 2 -> 4, noise 0.01): parallel.expert = 3: must divide "
        "model.num_experts = 8; use growth[0].parallel.expert = 2, or change the growth",
    ),
]


@pytest.mark.parametrize(("growth", "problem"), GROWTH_PROBLEMS)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_problem_of_growth(
    config: Path, capsys: pytest.CaptureFixture[str], command: str, growth: str, problem: str
) -> None:
    before = contents(config.parent)
    assert cli.main([command, str(config), "--set", f"growth=[{growth}]"]) == 2
    head, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {len(lines)} problems? in {config}:", head)
    assert sum(line.startswith(f"  {problem}") for line in lines) == 1, lines
    assert len(lines) == 1 or "parallel" in growth  # on one rank, experts do not fit on three
    assert contents(config.parent) == before


@pytest.mark.parametrize("growth", GROWTHS)
def test_growth_without_a_problem(config: Path, capsys: pytest.CaptureFixture[str], growth: str) -> None:
    """The passing counterpart of the ones above."""
    assert cli.main(["plan", str(config), "--set", f"growth=[{growth}]"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\nGrowth at step ") == growth.count("at_")


def test_the_world_size_of_the_launcher_counts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", str(config), "--set", "parallel.expert=2"]) == 2
    err = capsys.readouterr().err
    assert "  parallel.expert * parallel.expert_tensor * parallel.pipeline = 2: must divide world size = 3" in err
    assert "Traceback" not in err


def test_training_without_data(config: Path, pretrain: CommandProcess) -> None:
    result = pretrain("train", config, "--set", "data.train=[]")
    assert result.code == 2
    assert "  data.train = []: training needs a dataset; add [[data.train]] with prefix" in result.err
    assert not (config.parent / "run").exists()


# Data.


def truncate(folder: Path, name: str) -> None:
    path = folder / name
    os.truncate(path, path.stat().st_size - 10)


def put_token(folder: Path, token: int) -> None:
    """Fill the training tokens with one id."""
    tokens = np.memmap(folder / "train.bin", np.uint16, "r+")
    tokens[:] = token
    tokens.flush()


def replace_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("ByteLevel", "ByteLevel ", 1))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no dataset": (shutil.rmtree, r"{data}/train\.idx: no such file; .*; check the path"),
    "no bin": (lambda data: (data / "train.bin").unlink(), r"{data}/train\.bin: no such file; .*; check the path"),
    "short bin": (
        lambda data: truncate(data, "train.bin"),
        r"{data}/train\.bin: \d+ bytes; the index lists \d+ tokens of 2 bytes, \d+ bytes; .*again",
    ),
    "short idx": (
        lambda data: truncate(data, "valid.idx"),
        r"{data}/valid\.idx: \d+ bytes; its header announces .*; .*again",
    ),
    "no tokenizer": (
        lambda data: (data / "tokenizer.json").unlink(),
        r"data\.tokenizer = {data}/tokenizer\.json: no such file; give the tokenizer\.json of the datasets",
    ),
    "another tokenizer": (
        replace_tokenizer,
        r"{data}/train\.json: tokenizer\.sha256 = \w+\.\.\.; must be that of {data}/tokenizer\.json, .*; set .*",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state", ["new", "begun"])
def test_data_that_cannot_be_used(
    pretrain: CommandProcess, trained: Path, corpus: Path, tmp_path: Path, damage: str, state: str
) -> None:
    if state == "begun":
        shutil.copytree(trained, tmp_path / "run")
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    config = written(short_config(data, tmp_path / "run", steps=3), tmp_path)
    apply, expected = DAMAGES[damage]
    apply(data)
    before = contents(tmp_path)
    message = refused(pretrain("train", config))
    assert re.fullmatch("error: " + expected.format(data=re.escape(str(data))), message), message
    assert contents(tmp_path) == before


def test_data_as_prepared_is_used(pretrain: CommandProcess, begun: Path) -> None:
    """The passing counterpart: the same run with the data as they were, which goes on."""
    result = pretrain("train", begun)
    assert (result.code, only_error(result)) == (0, "")
    (restart,) = events(begun.parent / "run", "restart")
    assert restart["step"] == 2


def test_tokens_beyond_the_vocabulary(pretrain: CommandProcess, corpus: Path, tmp_path: Path) -> None:
    """Only reading finds them; what was done before stays."""
    shutil.copytree(corpus, tmp_path / "data")
    put_token(tmp_path / "data", 320)
    config = written(tiny_config(tmp_path / "data", tmp_path / "run"), tmp_path)
    message = refused(pretrain("train", config))
    assert re.search(r"train\.bin: token 320 between .* < model\.vocab_size = 320; run `pretrain data verify`", message)
    put_token(tmp_path / "data", 319)
    assert pretrain("train", config).code == 0


def test_another_dataset_than_before(pretrain: CommandProcess, begun: Path) -> None:
    before = contents(begun.parent)
    message = refused(pretrain("train", begun, "--set", "run.seed=8"))
    assert re.match(r"error: data\.train: another blend, order or content than that of .*/step_00000002, so", message)
    assert contents(begun.parent) == before


# Checkpoints.


@pytest.mark.parametrize(
    ("override", "cause", "tensor"),
    [
        (
            "model.hidden_size=64",
            "model.hidden_size: 32 -> 64",
            "embedding.word_embeddings.weight is [320, 32] in the checkpoint, [320, 64] in the model; ",
        ),
        ("model.num_layers=4", "model.num_layers: 2 -> 4", "decoder.layers.2."),
        (
            "model.num_experts=8",
            "model.num_experts: 4 -> 8",
            ".mlp.router.weight is [4, 32] in the checkpoint, [8, 32]",
        ),
        (
            "model.qk_norm=false",
            "model.qk_norm: True -> False",
            "it also holds decoder.layers.0.self_attention.q_layern",
        ),
        ("run.precision=bf16", "run.precision: fp32 -> bf16", "in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model(
    pretrain: CommandProcess, begun: Path, override: str, cause: str, tensor: str
) -> None:
    before = contents(begun.parent)
    message = refused(pretrain("train", begun, f"--set={override}"))
    path = begun.parent / "run" / "checkpoints" / "step_00000002"
    assert message.startswith(f"error: {cause}; {path}: the checkpoint is of another ")
    assert tensor in message
    assert "config.toml" in message
    assert contents(begun.parent) == before


def test_a_checkpoint_of_another_optimizer(pretrain: CommandProcess, begun: Path) -> None:
    before = contents(begun.parent)
    message = refused(pretrain("train", begun, "--set=optim.kind=muon"))
    assert 'optim.kind = "muon": the checkpoint has the state of "adamw"; resume with' in message
    assert contents(begun.parent) == before


def test_the_state_of_another_optimizer_is_dropped_on_request(pretrain: CommandProcess, begun: Path) -> None:
    """The run goes on from the weights: the first update is one of fresh moments, the learning rate in size."""
    result = pretrain("train", begun, "--set=optim.kind=muon", "--set=optim.drop_other_state=true")
    assert (result.code, only_error(result)) == (0, "")
    run = begun.parent / "run"
    before, after = (run / "checkpoints" / f"step_{step:08d}" for step in (2, 3))
    assert read_state(after)["optimizer"] == {"kind": "muon", "step": 1}
    key = "decoder.final_layernorm.weight"
    with CheckpointReader(before) as old, CheckpointReader(after) as new:
        change = (new.read(key, (0,), (32,)) - old.read(key, (0,), (32,))).abs()
        names = {name.split(".")[1] for name in new.tensors() if name.startswith("optimizer.")}
    assert change.median() == pytest.approx(rows(run, "train")[-1]["lr"], rel=1e-2)
    assert names == {"exp_avg", "exp_avg_sq", "momentum"}


def test_a_checkpoint_beyond_the_budget(pretrain: CommandProcess, begun: Path) -> None:
    before = contents(begun.parent)
    message = refused(pretrain("train", begun, "--set", "budget.steps=1", "--set", "schedule.warmup_steps=0"))
    assert re.search(r"budget: 1 steps, but .*/step_00000002 has done 2 already; raise the budget", message)
    assert contents(begun.parent) == before


def test_only_damaged_checkpoints(pretrain: CommandProcess, begun: Path) -> None:
    checkpoints = begun.parent / "run" / "checkpoints"
    for shard in checkpoints.glob("*/shard_*"):
        os.truncate(shard, 100)
    before = contents(begun.parent)
    result = pretrain("train", begun)
    assert result.code == 2
    *logged, message = only_error(result).splitlines()
    assert [line.partition(": ")[0] for line in logged] == [f"{checkpoints}/step_00000002 is damaged and passed over"]
    assert message.startswith(f"error: {checkpoints}: all 1 checkpoints are damaged (step_00000002: shard_")
    assert message.endswith("restore one, or move the folder away to start from scratch")
    assert contents(begun.parent) == before


# The run directory.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model, but not for two. Mounting takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_no_space_left(pretrain: CommandProcess, corpus: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    config = written(tiny_config(corpus, run), tmp_path)
    message = refused(pretrain("train", config))
    assert re.fullmatch(
        rf"error: {run}/checkpoints/step_00000006\.partial: no space left: need [\d.]+ MiB, have [\d.]+ MiB; free some "
        r"space, or lower checkpoint\.keep",
        message,
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert pretrain("ckpt", "verify", run).code == 0
    assert len(rows(run, "train")) == 6

    # The passing counterpart: with room, the run goes on from there.
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert pretrain("train", config).code == 0
    (restart,) = events(run, "restart")
    assert restart["step"] == 3


def test_no_space_for_the_first_file(pretrain: CommandProcess, corpus: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(2 << 20))
    config = written(tiny_config(corpus, run), tmp_path)
    message = refused(pretrain("train", config))
    assert f"run.directory = {run}: cannot be written (No space left on device); free some space there" in message


def test_a_run_directory_in_use(pretrain: CommandProcess, begun: Path) -> None:
    run = begun.parent / "run"
    with locked(run):
        before = contents(begun.parent)
        message = refused(pretrain("train", begun))
        assert message == (
            f"error: run.directory = {run}: in use by process {os.getpid()} on {socket.gethostname()}; wait for that "
            "run to end, stop it, or choose another directory"
        )
        assert contents(begun.parent) == before
    assert pretrain("train", begun).code == 0


def test_a_run_directory_that_cannot_be_made(pretrain: CommandProcess, config: Path) -> None:
    message = refused(pretrain("train", config, "--set", f"run.directory={config}/run"))
    assert message.startswith(f"error: run.directory = {config}/run: cannot be written (Not a directory); ")


# The launcher.


def test_a_taken_port(pretrain: CommandProcess, begun: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        before = contents(begun.parent)
        message = refused(pretrain("train", begun, **launcher))
        assert message.startswith(f"error: MASTER_PORT={port} is taken on 127.0.0.1: another run or program listens ")
        assert message.endswith(
            "; set MASTER_PORT to a free port on every process, or start with torchrun --standalone"
        )
        assert contents(begun.parent) == before
    assert pretrain("train", begun, **launcher).code == 0


def test_a_launcher_that_says_too_little(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: RANK=0 is set but WORLD_SIZE is not: start with torchrun")


# Several ranks, under torchrun, which adds its own words to what they say.


def errors(result: Result) -> list[str]:
    """The messages of all ranks."""
    assert "pretrain/cli.py" not in result.err, f"a traceback of ours in {result.err}"
    return [line for line in result.err.splitlines() if line.startswith("error")]


@pytest.fixture
def two_homes(corpus: Path, tmp_path: Path) -> Path:
    """Working directories rank0 and rank1, in each of which the same relative paths name a dataset."""
    for rank in range(2):
        shutil.copytree(corpus, tmp_path / f"rank{rank}" / "data")
    parallel = {"expert": 2}
    written(tiny_config(Path("data"), tmp_path / "run", budget={"steps": 3}, parallel=parallel), tmp_path)
    return tmp_path


def train_in_homes(homes: Path, *overrides: str) -> Result:
    train = f'cd rank$RANK && exec {sys.executable} -m pretrain train {homes}/config.toml "$@"'
    return torchrun("--no-python", "bash", "-c", train, "train", *overrides, cwd=homes, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_an_error_of_all_ranks_is_told_once(two_homes: Path) -> None:
    before = contents(two_homes)
    result = train_in_homes(two_homes, "--set=model.top_k=5")
    assert result.code != 0
    assert errors(result) == [f"error: 1 problem in {two_homes}/config.toml:"]
    assert result.err.count("model.top_k = 5: must be from 1 to model.num_experts = 4") == 1
    assert contents(two_homes) == before


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(two_homes: Path) -> None:
    # Found when the data are opened: all ranks are told.
    (two_homes / "rank1" / "data" / "train.idx").rename(two_homes / "train.idx")
    before = contents(two_homes)
    result = train_in_homes(two_homes)
    assert result.code != 0
    (message,) = errors(result)
    assert re.fullmatch(r"error: rank 1: data/train\.idx: no such file; .*; check the path", message)
    assert contents(two_homes) == before

    # Found in the middle of training: the rank speaks, and the others, which cannot know, let it.
    (two_homes / "train.idx").rename(two_homes / "rank1" / "data" / "train.idx")
    put_token(two_homes / "rank1" / "data", 320)
    result = train_in_homes(two_homes)
    assert result.code != 0
    (message,) = errors(result)
    assert re.match(r"error on rank 1: data/train\.bin: token 320 between positions \d+ and \d+; ids are", message)

    # The passing counterpart.
    put_token(two_homes / "rank1" / "data", 319)
    result = train_in_homes(two_homes)
    assert (result.code, errors(result)) == (0, [])
    assert [row["step"] for row in rows(two_homes / "run", "train")] == [1, 2, 3]
