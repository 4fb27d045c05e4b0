"""Commands of this package: their arguments, and the function each calls. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.arguments import command, hours, positive


def add_tuning_commands(commands: argparse._SubParsersAction) -> None:
    """Declare them."""
    sweep = command(
        commands,
        "sweep",
        _sweep,
        "Tune hyperparameters by coordinate descent, over sizes and data. What is trained is not trained again.",
        "pretrain sweep configs/sweeps/dense.toml --jobs 2 --max-hours 1",
    )
    sweep.add_argument("file", type=Path, metavar="SWEEP", help="what to tune (TOML)")
    sweep.add_argument("--jobs", type=positive, default=2, help="runs at once, a core each (default: %(default)s)")
    sweep.add_argument("--max-trials", type=positive, help="start at most so many runs now (exit code 75: some left)")
    sweep.add_argument("--max-hours", type=hours, help="start no more runs after so many hours (likewise)")
    sweep.add_argument("--dry-run", action="store_true", help="say what would be run next, and run nothing")
    speedup = command(
        commands,
        "speedup",
        _speedup,
        "Compare finished runs by the tokens that a baseline would need for their losses.",
        "pretrain speedup runs/adamw-1x runs/adamw-2x runs/adamw-4x runs/muon-1x --baseline adamw",
    )
    speedup.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directory")
    speedup.add_argument("--published", action="store_true", help="compare the losses of arXiv 2509.02046 instead")
    speedup.add_argument("--baseline", default="adamw", metavar="KIND", help="optim.kind (default: %(default)s)")
    speedup.add_argument(
        "--out", type=Path, default=Path("runs/speedup"), metavar="DIR", help="for the picture (default: %(default)s)"
    )
    speedup.add_argument("--json", action="store_true", help="for programs")


def _sweep(options: argparse.Namespace) -> int:
    from pretrain.tuning.sweep import sweep  # noqa: PLC0415 (torch is imported by the commands that need it)

    return sweep(
        options.file,
        jobs=options.jobs,
        max_trials=options.max_trials,
        max_hours=options.max_hours,
        dry_run=options.dry_run,
    )


def _speedup(options: argparse.Namespace) -> int:
    from pretrain.tuning.speedup_command import speedup  # noqa: PLC0415

    return speedup(
        options.runs,
        baseline=options.baseline,
        out=options.out,
        as_json=options.json,
        use_published=options.published,
    )
