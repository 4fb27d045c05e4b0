"""What the benchmark prints: the machine, a Markdown table per workload, the demonstration's speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from pretrain.bench.demo import DemoSpeed
from pretrain.bench.measure import Result, Timings, ratio
from pretrain.bench.variants import BARE, OURS

PACKAGES = ("meristem", "torch", "megatron-core", "transformers", "transformer-engine", "triton")
LARGEST_OVERHEAD = 1.03
"""What a step of ours may take, over a bare megatron-core loop of the same model."""


def machine(device: torch.device) -> dict[str, str]:
    """Date, hardware and versions."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "python": platform.python_version(),
    }


def describe(facts: Mapping[str, str]) -> str:
    """The machine, a fact a line."""
    return "\n".join(f"{name + ':':<9} {value}" for name, value in facts.items())


def result_table(result: Result, device: torch.device) -> str:
    """A heading and a row per variant; on a CPU judged by process CPU time, with wall time beside it."""
    clocks = ("wall",) if device.type == "cuda" else ("cpu", "wall")
    tokens = result.workload.tokens_per_step
    header = ["", "tokens/s"]
    for clock in clocks:
        header += [f"{clock} s (min..max)", "ours / it", "by round"]
    header += ["loss, first", f"loss, step {len(result.timings[OURS].losses)}"]
    rows = [header, ["-" * 3] * len(header)]
    rows += [_row(name, timing, result.timings[OURS], clocks, tokens) for name, timing in result.timings.items()]
    heading = f"{result.workload.name}, {result.precision}: {result.workload.describe()}"
    return "\n".join([heading, "", *aligned(rows)])


def _row(name: str, timing: Timings, ours: Timings, clocks: Sequence[str], tokens: int) -> list[str]:
    row = [name, f"{tokens / statistics.median(timing.of(clocks[0])):,.0f}"]
    for clock in clocks:
        seconds = timing.of(clock)
        compared = ratio(ours.of(clock), seconds)
        row.append(f"{statistics.median(seconds):.3f} ({min(seconds):.3f}..{max(seconds):.3f})")
        row += ["", ""] if timing is ours else [f"{compared.of_medians:.3f}", f"{compared.per_round:.3f}"]
    for own, reference in ((timing.losses[0], ours.losses[0]), (timing.losses[-1], ours.losses[-1])):
        row.append(f"{own:.5f}" if timing is ours else f"{own - reference:+.1e}")
    return row


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table whose columns line up in plain text, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        yield "| " + " | ".join(cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True)) + " |"


def verdict(results: Sequence[Result], device: torch.device) -> str:
    """Whether the target for the training step holds, a line per workload."""
    clock = "wall" if device.type == "cuda" else "cpu"
    lines = []
    for result in results:
        compared = ratio(result.timings[OURS].of(clock), result.timings[BARE].of(clock))
        holds = "holds" if compared.of_medians <= LARGEST_OVERHEAD else "MISSED"
        lines.append(
            f"{result.workload.name} {result.precision}: {compared.of_medians:.3f} of {BARE} ({clock} time), "
            f"target {LARGEST_OVERHEAD:.2f}: {holds}"
        )
    return "\n".join(lines)


def demo_line(demo: DemoSpeed) -> str:
    """The demonstration's speed."""
    threads = f"{demo.threads} thread" + ("s" if demo.threads > 1 else "")
    return (
        f"demo, {demo.processes} processes of {threads}: {demo.tokens_per_second:,.0f} tokens/s "
        f"({demo.slowest:,.0f}..{demo.fastest:,.0f}), wall time"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """As Linux names it: model, family and stepping tell chips apart whose marketing name a cloud hides."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in facts.items()}
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([found.get("model name", platform.machine()), *numbers])
