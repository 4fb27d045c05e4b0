"""How commands and their arguments are declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any


def command(
    into: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command, or (`run` None) a group of commands."""
    sub = into.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        # Leaves an example on one line, for copying.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def hours(text: str) -> float:
    """An argument that is a number of hours."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of hours, more than 0")
    return found


def add_set(sub: argparse.ArgumentParser) -> None:
    """The option that changes keys of a configuration."""
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. optim.lr=3e-4; repeatable",
    )


def explain_option(problem: Mapping[str, Any]) -> str:
    """pydantic's word on an option, as one line."""
    option = "--" + str(problem["loc"][0]).replace("_", "-")
    rule = problem["msg"].replace("Input should be", "must be")
    return f"{option} {problem['input']}: {rule}; give another value"
