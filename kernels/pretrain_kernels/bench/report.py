"""What was measured, as a table, beside the targets, and as files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from pretrain_kernels.bench import measure
from pretrain_kernels.bench.measure import DOWN, DX, FORWARD, OURS, STEP, Measurement, Results
from pretrain_kernels.bench.peers import LIGER, SCATTERMOE, SONICMOE, UNFUSED
from pretrain_kernels.bench.shapes import ROUTINGS, SHAPES, Shape

QWEN = "Qwen3-30B-A3B"


@dataclass(frozen=True)
class Verdict:
    """A target at one place: what was found, and the bound."""

    target: str
    where: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the value keeps to the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{self.target:44} {self.where:28} {self.value:6.2f}  {sign} {self.bound:.2f}  {verdict}"


@dataclass(frozen=True)
class Race:
    """A target for how many times our rate is another's in the same operation."""

    operation: str
    peer: str
    bound: Callable[[Shape], float | None]
    """None: no target at this shape."""


# Each bound is a published ratio of comparable kernels on H100s, or what is left of it without a second warp group
# that computes while the first one writes, which Triton cannot express:
# contiguous grouped products of DeepGEMM and SonicMoE come close to that of equal rows; the published Triton layer
# doubles the rate of grouped_mm with separate steps at fine-grained experts; an open Liger change makes Liger 1.5 to
# 1.9 times as fast; SonicMoE is 1.9 times as fast as ScatterMoE.
RACES = [
    Race(DOWN, measure.BMM, lambda shape: 0.85),
    Race(DX, measure.BMM, lambda shape: 0.85),
    Race(DOWN, measure.GROUPED_MM, lambda shape: 1.0),
    Race(DX, measure.GROUPED_MM, lambda shape: 1.0),
    Race(STEP, UNFUSED, lambda shape: 1.5 if shape.F <= 1408 else 1.1),
    Race(STEP, LIGER, lambda shape: 1.3 if shape.name == QWEN else None),
    Race(STEP, SCATTERMOE, lambda shape: 1.4),
    Race(STEP, SONICMOE, lambda shape: 0.75),
    # One call for each matrix is slow where the matrices are small.
    Race(measure.NEWTON_SCHULZ, measure.LOOP, lambda shape: 2.0 if min(shape.D, shape.F) <= 1024 else None),
]
# Rate of a step over that of the square product.
OF_SQUARE = {QWEN: 0.50, "OLMoE-1B-7B": 0.60, "Mixtral-8x7B": 0.70}
OF_COPY = 0.80
SKEW = 1.15
SAVED = 1.05


def verdicts(results: Results, shapes: dict[str, Shape] = SHAPES) -> list[Verdict]:
    """All targets for which both sides were measured."""
    found = [verdict for shape in shapes.values() for verdict in _races(results, shape)]
    square = results.find("", "", measure.SQUARE, measure.TORCH)
    for name in shapes:
        uniform, skewed = (results.find(name, routing, STEP, OURS) for routing in ("uniform", "zipf"))
        if uniform and square and name in OF_SQUARE:
            value = uniform.tflops / square.tflops
            found.append(Verdict(f"{STEP}: rate / square product", f"{name}, uniform", value, OF_SQUARE[name]))
        if uniform and skewed:
            value = skewed.median / uniform.median
            found.append(Verdict(f"{STEP}: time, Zipf / uniform", name, value, SKEW, at_least=False))
        ours, copy = (results.find(name, "uniform", measure.COMBINE, variant) for variant in (OURS, measure.COPY))
        if ours and copy:
            value = ours.terabytes / copy.terabytes
            found.append(Verdict(f"{measure.COMBINE}: bandwidth / copy", name, value, OF_COPY))
        if name in results.saved:
            value = results.saved[name]
            found.append(Verdict("bytes saved / 2TD + 4RF + routing", name, value, SAVED, at_least=False))
    return found


def _races(results: Results, shape: Shape) -> Iterator[Verdict]:
    for race in RACES:
        bound = race.bound(shape)
        for routing in (*ROUTINGS, ""):
            ours, peer = (results.find(shape.name, routing, race.operation, name) for name in (OURS, race.peer))
            if bound is not None and ours and peer:
                where = f"{shape.name}, {routing}" if routing else shape.name
                yield Verdict(f"{race.operation}: ours / {race.peer}", where, ours.tflops / peer.tflops, bound)


def table(results: Results) -> Iterator[str]:
    """One line a measurement; the last column is its time over ours."""
    yield f"{'':24} {'':20} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6} {'time / ours':>11}"
    heading = None
    for found in results.measurements:
        where = ", ".join(part for part in (found.shape, found.routing) if part)
        if where != heading:
            heading = where
            yield f"{where or 'device'}"
        ours = results.find(found.shape, found.routing, found.operation, OURS)
        # The copy moves other bytes than the sum.
        ratio = f"{found.median / ours.median:11.2f}" if ours and found.variant != measure.COPY else f"{'':11}"
        tflops = f"{found.tflops:8.0f}" if found.flops else f"{'':8}"
        moved = f"{found.terabytes:6.2f}" if found.moved else f"{'':6}"
        yield f"  {found.operation:22} {found.variant:20} {1e3 * found.median:9.3f} {tflops} {moved} {ratio}".rstrip()


def write_csv(path: str, results: Results) -> None:
    """One row a measurement, with medians and extremes in seconds."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["shape", "routing", "operation", "variant", "median", "min", "max", "tflops", "terabytes"])
        for found in results.measurements:
            where = [found.shape, found.routing, found.operation, found.variant]
            seconds = [found.median, min(found.seconds), max(found.seconds)]
            writer.writerow([*where, *seconds, found.tflops, found.terabytes])


def write_json(path: str, results: Results, machine: dict[str, object]) -> None:
    """Everything: the machine, the time of every round, the verdicts, and what is missing."""
    content = {
        "machine": machine,
        "measurements": [asdict(found) | _rates(found) for found in results.measurements],
        "saved": results.saved,
        "missing": results.missing,
        "verdicts": [asdict(verdict) | {"met": verdict.met} for verdict in verdicts(results)],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _rates(found: Measurement) -> dict[str, float]:
    return {"median": found.median, "tflops": found.tflops, "terabytes": found.terabytes}


def write_picture(path: str, results: Results, device: str) -> None:
    """Bars: model TFLOP/s of the layers at every shape, forward and forward with backward, uniform routing."""
    # Only here: it is an option of this command alone.
    import matplotlib  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    uniform = [found for found in results.measurements if found.routing == "uniform"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, operation in zip(figure.subplots(2, 1, sharex=True), (FORWARD, STEP), strict=True):
        bars = [found for found in uniform if found.operation == operation]
        names, variants = (list(dict.fromkeys(getattr(bar, key) for bar in bars)) for key in ("shape", "variant"))
        width = 0.8 / max(len(variants), 1)
        for bar_index, variant in enumerate(variants):
            mine = [bar for bar in bars if bar.variant == variant]
            places = [names.index(bar.shape) + bar_index * width for bar in mine]
            axes.bar(places, [bar.tflops for bar in mine], width, label=variant)
        square = results.find("", "", measure.SQUARE, measure.TORCH)
        if square:
            axes.axhline(square.tflops, color="gray", linewidth=1, label=f"{measure.SQUARE}, same run")
        axes.set(ylabel="model TFLOP/s", title=f"{operation}, {device}")
        axes.set_xticks([index + 0.4 - width / 2 for index in range(len(names))], names)
        axes.legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "pretrain_kernels"}):
        figure.savefig(path)


def unwritable(path: str) -> str | None:
    """Why a file cannot be written there, in words; None if it can."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"{path}: there is no folder {folder}"
    return None if os.access(folder, os.W_OK) else f"{path}: the folder {folder} is not writable"
