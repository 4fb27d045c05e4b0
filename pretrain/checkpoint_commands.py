"""Commands on checkpoints: their arguments, and the function each calls. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pretrain.arguments import add_set, command, explain_option
from pretrain.config.load import load_config
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.checkpoint.pieces import Progress


def add_checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    """Declare them."""
    grow = command(
        commands,
        "grow",
        _grow,
        "Grow a checkpoint as a run would at this point of its configuration.",
        "pretrain grow runs/small configs/growth/experts.toml runs/grown",
    )
    _add_conversion(grow)
    upcycle = command(
        commands,
        "upcycle",
        _upcycle,
        "Make a mixture of experts from a dense checkpoint, every expert a copy of its MLP.",
        "pretrain upcycle runs/qwen3-1.7b configs/models/spes-9b.toml runs/spes-9b --noise-std 0.02",
    )
    _add_conversion(upcycle)
    upcycle.add_argument("--noise-std", help="standard deviation of noise on the experts' weights (default: 0, none)")
    upcycle.add_argument("--noise-fraction", help="share of each matrix's entries that get it (default: 0.5)")
    upcycle.add_argument("--router-std", help="standard deviation of the router (default: model.init_std; 0: zeros)")
    upcycle.add_argument("--seed", help="of noise and router (default: run.seed)")
    text = "List and verify checkpoints; join those of several sites, or split one."
    ckpt = command(commands, "ckpt", None, text, "pretrain ckpt ls runs/demo").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, run, text in (
        ("ls", _ckpt_ls, "List the checkpoints of a run."),
        ("verify", _ckpt_verify, "Read every checkpoint of a run in full and compare it with its hashes."),
    ):
        sub = command(ckpt, name, run, text, f"pretrain ckpt {name} runs/demo")
        sub.add_argument("run_directory", type=Path, metavar="RUN", help="run directory")
    join = command(
        ckpt,
        "join",
        _ckpt_join,
        "Make one checkpoint out of those of all sites, for a run in one place.",
        "pretrain ckpt join runs/sites runs/joined",
    )
    join.add_argument("run_directory", type=Path, metavar="RUN", help="run directory that holds site_0, site_1, ...")
    join.add_argument("out", type=Path, metavar="OUT", help="run directory to be made")
    split = command(
        ckpt,
        "split",
        _ckpt_split,
        "Make a checkpoint for each site of a configuration out of one of a run in one place.",
        "pretrain ckpt split runs/upcycled configs/decentral/two-sites.toml runs/sites",
    )
    _add_conversion(split)


def _add_conversion(sub: argparse.ArgumentParser) -> None:
    """Arguments of a command that makes one checkpoint out of another."""
    sub.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, or a run directory (its newest one)")
    sub.add_argument("config", type=Path, metavar="CONFIG", help="configuration file (TOML)")
    sub.add_argument("out", type=Path, metavar="OUT", help="run directory to be made")
    add_set(sub)


@contextmanager
def _progress(text: str) -> Iterator[Progress]:
    """A progress line on the terminal for the time of a `with` block."""
    from rich.progress import Progress as Bar  # noqa: PLC0415 (what is slow to import is, by the commands that need it)

    with Bar(transient=True) as bar:
        task = bar.add_task(text)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _go_on(options: argparse.Namespace) -> str:
    return f"to go on: pretrain train {options.config} --set run.directory={options.out}"


def _grow(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    from pretrain.grow_checkpoint import grow_checkpoint  # noqa: PLC0415

    with _progress("growing") as progress:
        grown = grow_checkpoint(options.checkpoint, config, options.out, progress=progress)
    print(f"grown: {grown}\n{_go_on(options)}")
    return 0


def _upcycle(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    from pretrain.upcycle import UpcycleOptions, changes_function, upcycle  # noqa: PLC0415

    given = {name: getattr(options, name) for name in UpcycleOptions.model_fields}
    try:
        chosen = UpcycleOptions.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError([explain_option(problem) for problem in error.errors()]) from error
    with _progress("upcycling") as progress:
        made = upcycle(options.checkpoint, config, options.out, chosen, progress=progress)
    reasons = changes_function(config.model, chosen)
    print(f"upcycled: {made}")
    print(f"not the dense model's function: {'; '.join(reasons)}" if reasons else "computes what the dense model does")
    split = f"to go on, at all sites: pretrain ckpt split {options.out} {options.config} OUT"
    print(split if config.decentral else _go_on(options))
    return 0


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


def _ckpt_join(options: argparse.Namespace) -> int:
    from pretrain.site_checkpoints import join_sites  # noqa: PLC0415

    with _progress("joining") as progress:
        joined = join_sites(options.run_directory, options.out, progress=progress)
    print(
        f"joined: {joined}\noptimizer state of what all sites train: that of the lowest site\n"
        f"to go on: pretrain train {joined}/config.toml"
    )
    return 0


def _ckpt_split(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    from pretrain.site_checkpoints import split_checkpoint  # noqa: PLC0415

    with _progress("splitting") as progress:
        sites = split_checkpoint(options.checkpoint, config, options.out, progress=progress)
    print("\n".join([*(f"site {number}: {path}" for number, path in enumerate(sites)), _go_on(options)]))
    return 0
