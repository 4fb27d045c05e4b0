"""The command line: every command parses its arguments here and calls one function elsewhere.

Exit codes: 0 done; 1 something is wrong with what was looked at, or the program has a fault; 2 the input is wrong;
75 saved after a request to stop, start again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from pretrain import __version__
from pretrain.config.load import load_config
from pretrain.errors import UserError

USER_ERROR = 2
OTHER_RANKS_WAIT_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pretrain").setLevel(logging.INFO)
    # megatron-core warns of every optional package it does not find; `pretrain` says itself what it uses.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    try:
        return options.run(options)
    except UserError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank != "0":
            # Rank 0 raises nearly all user errors, too, and says so; the job is then ended. Else this rank speaks.
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BrokenPipeError:
        # The reader of our output went away (`pretrain plan ... | head`); keep Python from writing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _train(options: argparse.Namespace) -> int:
    from pretrain.platform import distributed  # noqa: PLC0415 (torch is imported by the commands that need it)

    config = load_config(options.config, options.set, world_size=distributed.world_size())
    from pretrain.train import train  # noqa: PLC0415

    return train(config)


def _plan(options: argparse.Namespace) -> int:
    from pretrain.plan import format_plan, make_plan  # noqa: PLC0415

    plan = make_plan(load_config(options.config, options.set, world_size=options.world_size), options.world_size)
    print(json.dumps(plan.to_json(), indent=2) if options.json else format_plan(plan))
    return 0


def _data_prepare(options: argparse.Namespace) -> int:
    from pretrain.data.prepare import PrepareOptions, prepare  # noqa: PLC0415

    given = {
        "suffixes": options.suffixes and tuple(options.suffixes.split(",")),
        "text_key": options.text_key,
        "tokenizer": options.tokenizer,
        "vocab_size": options.vocab_size,
        "valid_fraction": options.valid_fraction,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    splits = prepare(PrepareOptions(inputs=tuple(options.inputs), output=options.output, **chosen), show_progress=True)
    for split, sidecar in splits.items():
        print(
            f"{options.output / split}.bin: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens, "
            f"{sidecar.text_bytes:,} bytes of text"
        )
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from pretrain.data.verify import verify  # noqa: PLC0415

    bad = 0
    for prefix in options.prefixes:
        findings = verify(prefix, tokenizer=options.tokenizer)
        sound = all(finding.level != "error" for finding in findings)
        bad += not sound
        print("\n".join([*map(str, findings), *([f"{prefix}: ok"] if sound else [])]))
    return int(bad > 0)


def _ckpt_ls(options: argparse.Namespace) -> int:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from pretrain.checkpoint import LS_HEADER, list_checkpoints  # noqa: PLC0415

    table = Table(*LS_HEADER)
    for row in list_checkpoints(options.run_directory):
        table.add_row(*row.cells())
    Console().print(table)
    return 0


def _ckpt_verify(options: argparse.Namespace) -> int:
    from pretrain.checkpoint import verify_checkpoints  # noqa: PLC0415

    bad = 0
    for path, findings in verify_checkpoints(options.run_directory).items():
        bad += bool(findings)
        print("\n".join(f"{path}: {finding}" for finding in findings) if findings else f"{path}: ok")
    return int(bad > 0)


def _report(options: argparse.Namespace) -> int:
    from pretrain.metrics.report import summary, write_report  # noqa: PLC0415

    folder = write_report(options.runs, options.out)
    print(f"{summary(options.runs)}\npictures: {folder}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from pretrain.demo import demo  # noqa: PLC0415

    return demo(options.config, options.set)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain", description="Pretraining of mixture-of-experts language models on megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"meristem {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        into: argparse._SubParsersAction, name: str, run: object, text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = into.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        sub.set_defaults(run=run)
        return sub

    def configured(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", type=Path, metavar="CONFIG", help="configuration file (TOML)")
        _add_set(sub)

    train = command(
        commands,
        "train",
        _train,
        "Train, or go on training, one run.",
        "torchrun --nproc-per-node 8 -m pretrain train configs/moe-8gpu.toml --set optim.lr=2e-4",
    )
    configured(train)
    plan = command(
        commands,
        "plan",
        _plan,
        "Check a configuration and print every number that follows from it.",
        "pretrain plan configs/models/sparkling-joint.toml --world-size 64",
    )
    configured(plan)
    plan.add_argument("--world-size", type=_positive, help="ranks (default: the fewest that the layout fits on)")
    plan.add_argument("--json", action="store_true", help="for programs")

    data = commands.add_parser("data", help="Prepare and verify datasets.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    prepare = command(
        data,
        "prepare",
        _data_prepare,
        "Turn text, code or JSONL into a Megatron dataset with a tokenizer.",
        "pretrain data prepare books/ code/ --output data/mine --vocab-size 32768",
    )
    prepare.add_argument("inputs", nargs="+", help="files, folders, or `stdlib` for Python's own sources")
    prepare.add_argument("--output", type=Path, required=True, help="folder to be made")
    prepare.add_argument("--suffixes", help="comma-separated suffixes of the files to read in folders")
    prepare.add_argument("--text-key", help="key of the text in JSONL (default: text)")
    prepare.add_argument("--tokenizer", type=Path, help="tokenizer.json to use (default: train one)")
    prepare.add_argument("--vocab-size", type=_positive, help="size of the tokenizer that is trained")
    prepare.add_argument("--valid-fraction", type=float, help="share held out for validation")
    verify = command(
        data,
        "verify",
        _data_verify,
        "Read a dataset in full and name everything that is wrong with it.",
        "pretrain data verify data/mine/train data/mine/valid",
    )
    verify.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx")
    verify.add_argument("--tokenizer", type=Path, help="tokenizer.json the dataset should have been made with")

    ckpt = commands.add_parser("ckpt", help="List and verify checkpoints.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, run, text in (
        ("ls", _ckpt_ls, "List the checkpoints of a run."),
        ("verify", _ckpt_verify, "Read every checkpoint of a run in full and compare it with its hashes."),
    ):
        sub = command(ckpt, name, run, text, f"pretrain ckpt {name} runs/demo")
        sub.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")

    report = command(
        commands,
        "report",
        _report,
        "Draw the pictures and the table of one run, or of several together.",
        "pretrain report runs/small runs/large --out comparison",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    report.add_argument("--out", type=Path, help="folder (default: report/ in the first run)")

    demo = command(
        commands,
        "demo",
        _demo,
        "Prepare a corpus, train a small mixture of experts on 2 processes, and report.",
        "pretrain demo",
    )
    demo.add_argument("config", type=Path, nargs="?", default=Path("configs/demo.toml"), metavar="CONFIG")
    _add_set(demo)
    return parser


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. optim.lr=3e-4; repeatable",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value
