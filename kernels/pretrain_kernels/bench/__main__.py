"""`python -m pretrain_kernels.bench`: check the kernels on an NVIDIA GPU, then measure them against others.

Medians of interleaved runs in one process on random bf16 data, with the L2 cache overwritten before each. The product
of two 8192 x 8192 matrices in the same run says what the device can do. Exit codes: 0, measured; 1, a check failed
and nothing was measured any further; 2, it cannot run.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from pretrain_kernels import BackendError, check_backend, triton_support
from pretrain_kernels.bench import check, measure, peers, report
from pretrain_kernels.bench.measure import CudaClock, Results, Setup
from pretrain_kernels.bench.shapes import QUICK, SHAPES

ROUNDS, QUICK_ROUNDS = 20, 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse(arguments)
    device = torch.device("cuda")
    if problem := obstacle(options):
        print(f"pretrain_kernels.bench: {problem}", file=sys.stderr)
        return 2
    with torch.cuda.device(0):
        machine = describe_machine(options.rounds)
        print("; ".join(f"{key} {value}" for key, value in machine.items()))
        try:
            for name in check.run_checks(device):
                print(f"checked: {name}", flush=True)
            results = measure_all(options, device)
        except check.CheckError as error:
            print(f"pretrain_kernels.bench: check failed: {error}", file=sys.stderr)
            return 1
    present(options, results, machine)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `shapes` and `rounds` are filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quick = f"{QUICK_ROUNDS} rounds instead of {ROUNDS}, and the first {QUICK} shapes"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--json", metavar="FILE", help="everything, with the time of every round")
    parser.add_argument("--csv", metavar="FILE", help="a row for each measurement")
    parser.add_argument("--picture", metavar="FILE", help="rates of the layers as bars (.png, .svg or .pdf)")
    options = parser.parse_args(arguments)
    options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    options.shapes = options.shapes or list(SHAPES)[: QUICK if options.quick else None]
    return options


def obstacle(options: argparse.Namespace) -> str | None:
    """Why the command cannot run here, in one line; None if it can. Asked before anything takes time."""
    if triton_support.interpreting():
        return "TRITON_INTERPRET=1 runs kernels on the CPU; unset it"
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer, and torch sees none"
    try:
        check_backend("triton", torch.device("cuda", 0), torch.bfloat16, 8, 8)
    except BackendError as error:
        return str(error)
    if options.picture and not importlib.util.find_spec("matplotlib"):
        return f"--picture {options.picture}: matplotlib is not installed"
    paths = (options.json, options.csv, options.picture)
    return next((problem for path in paths if path and (problem := report.unwritable(path))), None)


def describe_machine(rounds: int) -> dict[str, object]:
    """What figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    # Whatever the distribution is called: torch's nightly builds bring their own.
    triton = metadata.packages_distributions()["triton"][0]
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "triton": metadata.version(triton),
        "rounds": rounds,
    }


def measure_all(options: argparse.Namespace, device: torch.device) -> Results:
    """All measurements. A shape that does not agree with the unfused layer raises a CheckError."""
    others, missing = peers.available()
    layers = {peers.UNFUSED: peers.unfused, measure.OURS: peers.ours("triton")}
    layers |= {measure.OURS_GROUPED_MM: peers.ours("grouped_mm")} | others
    results = Results(missing={name: peer.reason for name, peer in missing.items()})
    setup = Setup(device, CudaClock(device), options.rounds, layers)
    measure.measure_square(setup, results)
    for name in options.shapes:
        for doing in measure.measure_shape(SHAPES[name], setup, results):
            print(f"measuring {doing}", flush=True)
    return results


def present(options: argparse.Namespace, results: Results, machine: dict[str, object]) -> None:
    """Print the table, the targets and what is missing; write the files that were asked for."""
    print(*report.table(results), sep="\n")
    print("\ntargets", *report.verdicts(results), sep="\n")
    for name, reason in results.missing.items():
        print(f"not measured: {name}: {reason}")
    if options.csv:
        report.write_csv(options.csv, results)
    if options.json:
        report.write_json(options.json, results, machine)
    if options.picture:
        report.write_picture(options.picture, results, str(machine["device"]))


if __name__ == "__main__":
    sys.exit(main())
