"""The command line: every command parses its arguments here and calls one function elsewhere.

Exit codes: 0 done; 1 something is wrong with what was looked at, or the program has a fault; 2 the input is wrong;
75 saved after a request to stop, start again; 130 interrupted by Ctrl-C before there was anything to save.
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

from pydantic import ValidationError

from pretrain import __version__
from pretrain.arguments import add_set, command, explain_option, positive
from pretrain.checkpoint_commands import add_checkpoint_commands
from pretrain.config.load import load_config
from pretrain.errors import ConfigError, UserError
from pretrain.platform.launcher import find_launch
from pretrain.tuning.commands import add_tuning_commands

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
SPEAK_AFTER_SECONDS = 10
"""Ranks other than 0 wait this long before they tell of an error: rank 0 has nearly all of them, too, tells, and ends
the job."""
LOST_PEER_SECONDS = 15
"""A rank that lost another one waits this long before it ends: the launcher ends the job with the first rank that ends,
and that should be the one that knows why, after its own wait."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    _quieten()
    try:
        return options.run(options)
    except UserError as error:
        _say_error(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`pretrain plan ... | head`); keep Python from writing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        time.sleep(LOST_PEER_SECONDS)
        _say_error(f"another rank has ended, look for its message ({str(error).splitlines()[0]})")
        return FAILED


def _quieten() -> None:
    """Our own log, one line a message; no warnings that a user can do nothing about."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pretrain").setLevel(logging.INFO)
    # megatron-core warns of every optional package it does not find; `pretrain` says itself what it uses.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # It also calls collectives by names that torch 2.13 is about to rename.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _say_error(text: str) -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank != "0":
        time.sleep(SPEAK_AFTER_SECONDS)
    print(f"error: {text}" if rank == "0" else f"error on rank {rank}: {text}", file=sys.stderr, flush=True)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone: the cause lies there, not in this traceback."""
    return "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error)


def _train(options: argparse.Namespace) -> int:
    # Before torch is imported, which takes seconds: a mistyped key is said at once.
    config = load_config(options.config, options.set, world_size=find_launch().world_size)
    from pretrain.train import train  # noqa: PLC0415 (torch is imported by the commands that need it)

    return train(config)


def _plan(options: argparse.Namespace) -> int:
    from pretrain.plan import format_plan, make_plan  # noqa: PLC0415

    plan = make_plan(load_config(options.config, options.set, world_size=options.world_size), options.world_size)
    print(json.dumps(plan.to_json(), indent=2) if options.json else format_plan(plan))
    return 0


def _coordinator(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    from pretrain.decentral.coordinator import coordinate  # noqa: PLC0415

    return coordinate(config.decentral)


def _data_prepare(options: argparse.Namespace) -> int:
    from pretrain.data.prepare import PrepareOptions, prepare  # noqa: PLC0415

    given = {
        "suffixes": options.suffixes and tuple(options.suffixes.split(",")),
        "text_key": options.text_key,
        "eod_token": options.eod_token,
        "tokenizer": options.tokenizer,
        "vocab_size": options.vocab_size,
        "valid_fraction": options.valid_fraction,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        prepare_options = PrepareOptions(inputs=tuple(options.inputs), output=options.output, **chosen)
    except ValidationError as error:
        raise ConfigError([explain_option(problem) for problem in error.errors()]) from error
    splits = prepare(prepare_options, show_progress=True)
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


def _report(options: argparse.Namespace) -> int:
    from pretrain.metrics.report import summary, write_report  # noqa: PLC0415

    folder = write_report(options.runs, options.out)
    print(f"{summary(options.runs)}\npictures: {folder}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from pretrain.demo import demo  # noqa: PLC0415

    return demo(options.config, options.set)


def _bench(options: argparse.Namespace) -> int:
    from pretrain.bench.command import bench  # noqa: PLC0415

    return bench(options.part, rounds=options.rounds, quick=options.quick, json_file=options.json)


def _study_growth(options: argparse.Namespace) -> int:
    from pretrain.studies.command import growth_study  # noqa: PLC0415

    return growth_study(seeds=options.seeds, out=options.out, jobs=options.jobs, quick=options.quick)


def _study_optimizers(options: argparse.Namespace) -> int:
    from pretrain.studies.optimizers.command import optimizer_study  # noqa: PLC0415

    return optimizer_study(seeds=options.seeds, out=options.out, jobs=options.jobs, quick=options.quick)


def _study_decentral(options: argparse.Namespace) -> int:
    from pretrain.studies.decentral.command import decentral_study  # noqa: PLC0415

    return decentral_study(seeds=options.seeds, out=options.out, jobs=options.jobs, quick=options.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain",
        description="Pretraining of mixture-of-experts language models on megatron-core.",
        epilog="example:\n  pretrain demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meristem {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run_commands(commands)
    add_checkpoint_commands(commands)
    _add_data_commands(commands)
    _add_result_commands(commands)
    _add_bench_command(commands)
    _add_study_commands(commands)
    add_tuning_commands(commands)
    return parser


def _add_run_commands(commands: argparse._SubParsersAction) -> None:
    train = command(
        commands,
        "train",
        _train,
        "Train one run, or go on with it from its newest valid checkpoint.",
        "torchrun --nproc-per-node 8 -m pretrain train configs/moe-8gpu.toml --set optim.lr=2e-4",
    )
    plan = command(
        commands,
        "plan",
        _plan,
        "Check a configuration and print every number that follows from it.",
        "pretrain plan configs/models/sparkling-joint.toml --world-size 64",
    )
    plan.add_argument(
        "--world-size",
        type=positive,
        help="ranks, of one site if there are several (default: the fewest that the layout fits on)",
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    demo = command(
        commands,
        "demo",
        _demo,
        "Prepare a corpus, train a small mixture of experts on it, and report.",
        "pretrain demo configs/demo.toml --set budget.steps=600",
    )
    coordinator = command(
        commands,
        "coordinator",
        _coordinator,
        "Let the sites of [decentral] find each other and agree. May be started again at any time.",
        "pretrain coordinator configs/decentral/two-sites.toml",
    )
    for sub in (train, plan, coordinator):
        sub.add_argument("config", type=Path, metavar="CONFIG", help="configuration file (TOML)")
    demo.add_argument(
        "config",
        type=Path,
        nargs="?",
        default=Path("configs/demo.toml"),
        metavar="CONFIG",
        help="configuration file (default: %(default)s)",
    )
    for sub in (train, plan, coordinator, demo):
        add_set(sub)


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    example = "pretrain data prepare books/ code/ --output data/mine --vocab-size 32768"
    data = command(commands, "data", None, "Prepare and verify datasets.", example).add_subparsers(
        required=True, metavar="COMMAND"
    )
    prepare = command(
        data, "prepare", _data_prepare, "Turn text, code or JSONL into a Megatron dataset with a tokenizer.", example
    )
    prepare.add_argument("inputs", nargs="+", help="files, folders, or `stdlib` for Python's own sources")
    prepare.add_argument("--output", type=Path, required=True, help="folder to be made")
    prepare.add_argument("--suffixes", help="comma-separated suffixes of the files to read in folders")
    prepare.add_argument("--text-key", help="key of the text in JSONL (default: text)")
    prepare.add_argument("--eod-token", help="token that ends every document (default: <|endoftext|>)")
    prepare.add_argument("--tokenizer", type=Path, help="tokenizer.json to use (default: train one)")
    prepare.add_argument("--vocab-size", type=positive, help="size of the tokenizer that is trained")
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


def _add_result_commands(commands: argparse._SubParsersAction) -> None:
    report = command(
        commands,
        "report",
        _report,
        "Draw the pictures and the table of one run, or of several together.",
        "pretrain report runs/small runs/large --out comparison",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or one of sites")
    report.add_argument("--out", type=Path, help="folder (default: report/ in the run, or beside several runs)")


def _add_bench_command(commands: argparse._SubParsersAction) -> None:
    bench = command(
        commands,
        "bench",
        _bench,
        "Measure here: our training step beside megatron-core's and transformers', what a growth costs, the demo.",
        "pretrain bench growth --quick --json bench.json",
    )
    help_text = (
        "measure this alone: a training step, a growth, the updates of all optimizers, or a synchronisation of sites "
        "(default: step, growth, demo)"
    )
    bench.add_argument("part", nargs="?", choices=("step", "growth", "optim", "decentral"), help=help_text)
    bench.add_argument("--rounds", type=positive, help="timed rounds (default: 9 of steps, 3 of growth, else 5)")
    bench.add_argument("--quick", action="store_true", help="a smaller model only, and no demo")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE, too")


def _add_study_commands(commands: argparse._SubParsersAction) -> None:
    example = "pretrain study growth --seeds 3 --jobs 2"
    study = command(
        commands, "study", None, "Put what this project claims to the test (half an hour to one).", example
    ).add_subparsers(required=True, metavar="COMMAND")
    growth = command(
        study,
        "growth",
        _study_growth,
        "Train models that grow beside models that do not, and compare them. What is trained is not trained again.",
        example,
    )
    optimizers = command(
        study,
        "optimizers",
        _study_optimizers,
        "Tune optimizers and compare them over data, size and seeds. What is trained is not trained again.",
        "pretrain study optimizers --seeds 3 --jobs 2",
    )
    decentral = command(
        study,
        "decentral",
        _study_decentral,
        "Train a model centrally and on several sites, and compare them. What is trained is not trained again.",
        "pretrain study decentral --seeds 2 --jobs 2",
    )
    for sub, out, seeds in ((growth, "growth", 3), (optimizers, "optimizers", 3), (decentral, "decentral", 2)):
        sub.add_argument("--seeds", type=positive, default=seeds, help="runs of each kind (default: %(default)s)")
        where = Path(f"runs/study-{out}")
        sub.add_argument("--out", type=Path, default=where, metavar="DIR", help="default: %(default)s")
        help_text = "processes at once, a core each (default: %(default)s)"
        sub.add_argument("--jobs", type=positive, default=2, help=help_text)
        sub.add_argument("--quick", action="store_true", help="few steps: shows that all works, compares nothing")
