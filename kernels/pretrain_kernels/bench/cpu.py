"""`python -m pretrain_kernels.bench.cpu`: the expert layer on one CPU thread against megatron-core's SequentialMLP.

Both get the same weights, rows and gradients, and must agree before a clock starts. Then they take turns, forward and
backward, in shuffled order; the clock is the CPU time of the process, which other users of a machine disturb less than
wall time. Figures are medians over rounds, ratios the medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain_kernels import Grouped, swiglu_experts

Step = Callable[[], object]

# "bf16" lets oneDNN take fp32 products. It still computes in fp32 unless the CPU has AMX units, which the agreement
# with megatron-core would show.
ONEDNN, AS_TORCH_HAS_IT = "bf16", "none"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@dataclass(frozen=True)
class Shape:
    """E experts, D model width, F expert width, R rows."""

    E: int
    D: int
    F: int
    R: int

    @property
    def gflop(self) -> float:
        """Forward and backward: three products of R rows with D x F, and two more for each."""
        return 18e-9 * self.R * self.D * self.F


SHAPES = [Shape(8, 512, 512, 4096), Shape(32, 512, 256, 8192), Shape(64, 256, 256, 8192), Shape(64, 512, 256, 2048)]


@dataclass(frozen=True)
class Variant:
    """Whose layer, in which data type, with which library for fp32 products."""

    ours: bool
    dtype: torch.dtype
    products: str

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{'ours' if self.ours else 'SequentialMLP'} {name}{' oneDNN' if self.products == ONEDNN else ''}"


THEIRS = Variant(ours=False, dtype=torch.float32, products=AS_TORCH_HAS_IT)
"""What everything is measured against: megatron-core's layer as it is."""
VARIANTS = [
    THEIRS,
    Variant(ours=True, dtype=torch.float32, products=AS_TORCH_HAS_IT),
    Variant(ours=False, dtype=torch.float32, products=ONEDNN),
    Variant(ours=True, dtype=torch.float32, products=ONEDNN),
    Variant(ours=False, dtype=torch.bfloat16, products=AS_TORCH_HAS_IT),
    Variant(ours=True, dtype=torch.bfloat16, products=AS_TORCH_HAS_IT),
]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of every variant (default 9)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    memory = "kept (MALLOC_* set)" if all(name in os.environ for name in MALLOC) else "as glibc has it"
    print(f"{cpu_name()}; torch {torch.__version__}, one thread; freed memory: {memory}; {rounds} rounds")
    print("CPU ms of forward and backward (GFLOP/s), and how many times as fast as the first line")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shape in SHAPES:
            report(shape, take_turns(steps(shape), rounds=rounds))
    finally:
        dist.destroy_process_group()


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor()
    name, family, model = (found.get(f"{key}\t", " ?").strip() for key in ("model name", "cpu family", "model\t"))
    return f"{name} (family {family}, model {model})"


def steps(shape: Shape) -> dict[Variant, Step]:
    """One step of each variant on the same random numbers; raises unless they agree."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.randint(shape.E, (shape.R,), generator=generator), minlength=shape.E)
    widths = [(shape.R, shape.D), (shape.E, 2 * shape.F, shape.D), (shape.E, shape.D, shape.F), (shape.R, shape.D)]
    numbers = [torch.randn(width, generator=generator) / width[-1] ** 0.5 for width in widths]
    scores = torch.rand(shape.R, generator=generator)
    layers = {variant: make_layer(variant, *numbers, counts=counts, scores=scores) for variant in VARIANTS}
    expected = layers[THEIRS].results()
    for variant, layer in layers.items():
        for actual, wanted in zip(layer.results(), expected, strict=True):
            error = float((actual.float() - wanted).norm() / wanted.norm())
            if error > TOLERANCE[variant.dtype]:
                raise RuntimeError(f"{variant} is {error:.1e} off {THEIRS} at {shape}")
    return {variant: layer.step for variant, layer in layers.items()}


@dataclass
class Layer:
    """A layer and what it is run on."""

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Of x and the scores."""
    fc1: list[torch.Tensor]
    """Parameters whose gradients are those of fc1, expert by expert or all at once."""
    others: list[torch.Tensor]
    x: torch.Tensor
    scores: torch.Tensor
    dy: torch.Tensor
    products: str

    def step(self) -> torch.Tensor:
        """Forward and backward; returns the output."""
        for leaf in (self.x, self.scores, *self.fc1, *self.others):
            leaf.grad = None
        torch.backends.mkldnn.matmul.fp32_precision = self.products  # type: ignore[attr-defined]
        y = self.forward(self.x, self.scores)
        y.backward(self.dy)
        torch.backends.mkldnn.matmul.fp32_precision = AS_TORCH_HAS_IT  # type: ignore[attr-defined]
        return y

    def results(self) -> list[torch.Tensor]:
        """The output and the gradients of x, the scores and fc1, of one step."""
        y = self.step().detach()
        gradients = [leaf.grad for leaf in (self.x, self.scores, *self.fc1) if leaf.grad is not None]
        assert len(gradients) == 2 + len(self.fc1)
        return [y, *gradients[:2], torch.cat([gradient.flatten() for gradient in gradients[2:]])]


def make_layer(variant: Variant, *numbers: torch.Tensor, counts: torch.Tensor, scores: torch.Tensor) -> Layer:
    """The layer of a variant; `numbers` are x, fc1, fc2 and the gradient of the output."""
    x, fc1, fc2, dy = (tensor.to(variant.dtype, copy=True) for tensor in numbers)
    inputs = {"x": x.requires_grad_(), "scores": scores.clone().requires_grad_(), "dy": dy}
    if variant.ours:
        fc1.requires_grad_()
        fc2.requires_grad_()

        def forward(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return swiglu_experts(x, fc1, fc2, Grouped(counts, scores))

        return Layer(forward, fc1=[fc1], others=[fc2], products=variant.products, **inputs)
    theirs = sequential_mlp(fc1, fc2)
    return Layer(
        lambda x, scores: theirs(x, counts, scores)[0],
        fc1=[expert.linear_fc1.weight for expert in theirs.local_experts],
        others=[expert.linear_fc2.weight for expert in theirs.local_experts],
        products=variant.products,
        **inputs,
    )


def sequential_mlp(fc1: torch.Tensor, fc2: torch.Tensor) -> Any:
    """megatron-core's experts, one module each, with these weights."""
    # Only here: nothing else in this package needs megatron-core.
    from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: PLC0415
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: PLC0415
    from megatron.core.transformer.mlp import MLPSubmodules  # noqa: PLC0415
    from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: PLC0415
    from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: PLC0415

    E, D, F = fc2.shape
    config = TransformerConfig(
        num_layers=1, hidden_size=D, num_attention_heads=1, ffn_hidden_size=F, moe_ffn_hidden_size=F,
        num_moe_experts=E, gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, use_cpu_initialization=True,
        perform_initialization=False, params_dtype=fc1.dtype,
    )  # fmt: skip
    world = dist.group.WORLD
    groups = ProcessGroupCollection(ep=world, expt_tp=world, expt_dp=world)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = SequentialMLP(E, config, submodules, groups)
    with torch.no_grad():
        for expert, up, down in zip(layer.local_experts, fc1, fc2, strict=True):
            expert.linear_fc1.weight.copy_(up)
            expert.linear_fc2.weight.copy_(down)
    return layer


def take_turns(variants: dict[Variant, Step], *, rounds: int) -> dict[Variant, list[float]]:
    """CPU seconds of `rounds` steps of each, all of them once a round."""
    taken: dict[Variant, list[float]] = {variant: [] for variant in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for variant in order.sample(list(variants), len(variants)):
            start = time.process_time()
            variants[variant]()
            taken[variant].append(time.process_time() - start)
    return taken


def report(shape: Shape, seconds: dict[Variant, list[float]]) -> None:
    """Print the lines of one shape."""
    print(f"\nE {shape.E}, D {shape.D}, F {shape.F}, {shape.R} rows")
    for variant, taken in seconds.items():
        median = statistics.median(taken)
        ratio = statistics.median(theirs / own for theirs, own in zip(seconds[THEIRS], taken, strict=True))
        print(f"  {variant!s:24} {1e3 * median:8.1f} ms  ({shape.gflop / median:5.0f})  {ratio:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
