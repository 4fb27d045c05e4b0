"""Timing: variants take turns in one process, and every variant sees the same random inputs.

A clock is a function that runs a step and returns seconds. `CudaClock` is that of the GPU; tests bring their own.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_kernels.bench.check import require_close
from pretrain_kernels.bench.peers import UNFUSED, Layer
from pretrain_kernels.bench.shapes import ROUTINGS, Problem, Shape, make_problem
from pretrain_kernels.newton_schulz import newton_schulz, newton_schulz_flops
from pretrain_kernels.router import TopK, route
from pretrain_kernels.triton_support import Launch

OURS, OURS_GROUPED_MM = "ours (triton)", "ours (grouped_mm)"
BMM, GROUPED_MM, TORCH, LOOP, COPY = "bmm, equal rows", "grouped_mm", "torch", "torch, one by one", "copy"
DOWN, DX, FORWARD, STEP = "down product", "dX product", "forward", "forward+backward"
COMBINE, ROUTER, NEWTON_SCHULZ, SQUARE = "sum of rows", "router fwd+bwd", "Newton-Schulz", "square product"

WARM_UP = 2
SQUARE_SIDE = 8192
STEPS = 5  # of Newton-Schulz, Muon's usual number
AGREEMENT = 2e-2
"""Largest difference between layers in bf16, of outputs and gradients; peers also round scores and rows to bf16."""

Step = Callable[[], object]
Clock = Callable[[Step], float]


class CudaClock:
    """Device time of a step by CUDA events, with the L2 cache overwritten before it."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.empty(max(size, 1 << 28), dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, step: Step) -> float:
        # It also keeps the device busy while the host starts on the step.
        self.other.zero_()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@dataclass(frozen=True)
class Measurement:
    """Seconds of one variant of an operation, once for every round."""

    shape: str
    routing: str
    operation: str
    variant: str
    seconds: list[float]
    flops: int = 0
    """Of the model, the same for all variants; 0 where operations are not what counts."""
    moved: int = 0
    """Bytes read and written, where that is what counts."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def tflops(self) -> float:
        """Model TFLOP/s."""
        return self.flops / self.median / 1e12

    @property
    def terabytes(self) -> float:
        """TB/s."""
        return self.moved / self.median / 1e12


@dataclass
class Results:
    """All that a run found."""

    measurements: list[Measurement] = field(default_factory=list)
    saved: dict[str, float] = field(default_factory=dict)
    """By shape: bytes that our layer keeps for backward over `Shape.saved_bytes`."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peers (and shapes) that were not measured, and why."""

    def find(self, shape: str, routing: str, operation: str, variant: str) -> Measurement | None:
        """The measurement, if it was taken."""
        wanted = (shape, routing, operation, variant)
        found = (m for m in self.measurements if (m.shape, m.routing, m.operation, m.variant) == wanted)
        return next(found, None)


@dataclass(frozen=True)
class Setup:
    """How to measure."""

    device: torch.device
    clock: Clock
    rounds: int
    layers: Mapping[str, Layer]
    """By name; UNFUSED among them is what the others are compared with."""
    triton: bool = True
    """Whether to measure the Triton kernels one by one, which needs a GPU."""


def take_turns(steps: Mapping[str, Step], *, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of `rounds` runs of each, all of them once a round in shuffled order, after WARM_UP unmeasured ones."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            taken[name].append(clock(steps[name]))
    return taken


def measure_shape(shape: Shape, setup: Setup, results: Results) -> Iterator[str]:
    """Add everything about a shape to `results`; yields what is about to be measured."""
    for routing in ROUTINGS:
        problem = make_problem(shape, routing, device=setup.device)
        yield f"{shape.name}, {routing}: layers"
        measure_layers(problem, routing, setup, results)
        yield f"{shape.name}, {routing}: products"
        products = product_steps(problem, bound=routing == "uniform", triton=setup.triton)
        for operation, (steps, flops) in products.items():
            _add(results, setup, (shape.name, routing, operation), steps, flops=flops)
        if setup.triton and routing == "uniform":
            for variant, (step, moved) in combine_steps(problem).items():
                _add(results, setup, (shape.name, routing, COMBINE), {variant: step}, moved=moved)
    yield f"{shape.name}: router, Newton-Schulz"
    _add(results, setup, (shape.name, "", ROUTER), router_steps(shape, setup))
    stack = (shape.E, shape.F, shape.D)
    steps = newton_schulz_steps(stack, setup.device)
    _add(results, setup, (shape.name, "", NEWTON_SCHULZ), steps, flops=newton_schulz_flops(stack, STEPS))


def measure_square(setup: Setup, results: Results, *, side: int = SQUARE_SIDE) -> None:
    """The bf16 product of two square matrices: what the device does at its best in this run."""
    a, b = (torch.randn(side, side, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    _add(results, setup, ("", "", SQUARE), {TORCH: lambda: torch.mm(a, b)}, flops=2 * side**3)


def _add(
    results: Results, setup: Setup, where: tuple[str, str, str], steps: Mapping[str, Step], *, flops: int = 0,
    moved: int = 0,
) -> None:  # fmt: skip
    for variant, seconds in take_turns(steps, rounds=setup.rounds, clock=setup.clock).items():
        results.measurements.append(Measurement(*where, variant, seconds, flops=flops, moved=moved))


def measure_layers(problem: Problem, routing: str, setup: Setup, results: Results) -> None:
    """Forward, and forward and backward, of all layers that give what the unfused one gives."""
    shape = problem.shape
    layers = agreeing_layers(problem, routing, setup.layers, results)
    if OURS in layers:
        results.saved[shape.name] = saved_bytes(problem, layers[OURS]) / shape.saved_bytes
    forward = {name: partial(run_forward, problem, layer) for name, layer in layers.items()}
    step = {name: partial(run_step, problem, layer) for name, layer in layers.items()}
    _add(results, setup, (shape.name, routing, FORWARD), forward, flops=shape.forward_flops)
    _add(results, setup, (shape.name, routing, STEP), step, flops=shape.step_flops)


def run_forward(problem: Problem, layer: Layer) -> Tensor:
    """Forward as in training: what backward needs is kept."""
    return layer(problem.x, problem.fc1, problem.fc2, problem.routing)


def run_step(problem: Problem, layer: Layer) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of x, fc1, fc2 and the scores."""
    y = run_forward(problem, layer)
    return (y.detach(), *torch.autograd.grad(y, problem.leaves, problem.dy))


def agreeing_layers(problem: Problem, routing: str, layers: Mapping[str, Layer], results: Results) -> dict[str, Layer]:
    """The layers whose output and gradients are those of UNFUSED; peers that fail are noted in `results.missing`.

    Raises a CheckError where a layer of ours is another.
    """
    where = f"{problem.shape.name}, {routing}"
    expected = run_step(problem, layers[UNFUSED])
    kept = {}
    for name, layer in layers.items():
        mine = name.startswith("ours")
        try:
            found = run_step(problem, layer)
            require_close(found, expected, name=f"{name} at {where}", tolerance=AGREEMENT)
        except Exception as error:  # of other people's packages, any: the rest can still be measured
            if mine:
                raise
            reason = str(error).strip().splitlines() or [""]
            results.missing[f"{name} at {where}"] = f"{type(error).__name__}: {reason[0]}"
        else:
            kept[name] = layer
    return kept


def saved_bytes(problem: Problem, layer: Layer) -> int:
    """Bytes of the tensors that autograd keeps between the passes, without the weights."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run_forward(problem, layer)
    del y
    for weight in (problem.fc1, problem.fc2):
        storages.pop(weight.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def product_steps(problem: Problem, *, bound: bool, triton: bool) -> dict[str, tuple[dict[str, Step], int]]:
    """(steps, operations) of the products that are contiguous on both sides: rows [R, F] fc2^T and rows [R, 2F] fc1.

    `bound`: with torch.bmm, every expert having as many rows; what no grouped product is faster than.
    """
    shape = problem.shape
    # Less than R where it does not divide: at most E - 1 rows of many thousands.
    each = shape.rows // shape.E
    fc1, fc2 = problem.fc1.detach(), problem.fc2.detach()
    ends = problem.counts.cumsum(0).to(torch.int32)
    ours = triton_products(problem) if triton else {}
    found: dict[str, tuple[dict[str, Step], int]] = {}
    sides = {DOWN: (shape.F, fc2.transpose(1, 2), 1), DX: (2 * shape.F, fc1, 2)}
    for operation, (width, weight, count) in sides.items():
        rows = torch.randn(shape.rows, width, device=weight.device, dtype=weight.dtype)
        steps: dict[str, Step] = {GROUPED_MM: partial(F.grouped_mm, rows, weight, offs=ends)}
        if bound:
            equal = rows[: each * shape.E].view(shape.E, each, width)
            steps[BMM] = partial(torch.bmm, equal, weight)
        if operation in ours:
            steps[OURS] = ours[operation]
        found[operation] = (steps, count * shape.product_flops)
    return found


def triton_products(problem: Problem) -> dict[str, Step]:
    """Our launches of both products, as the layer launches them, on random rows."""
    launches = _triton_launches(problem)
    return {DOWN: launches[DOWN].run, DX: launches[DX].run}


def combine_steps(problem: Problem) -> dict[str, tuple[Step, int]]:
    """(step, bytes) of the kernel that sums each token's rows up, and of a plain copy of as many rows."""
    shape = problem.shape
    launch = _triton_launches(problem)[COMBINE]
    rows = launch.arguments["rows"]
    copy = torch.empty_like(rows)
    item = rows.element_size()
    summed = item * shape.D * (shape.rows + shape.tokens) + 4 * shape.rows
    return {OURS: (launch.run, summed), COPY: (lambda: copy.copy_(rows), 2 * item * shape.D * shape.rows)}


def _triton_launches(problem: Problem) -> dict[str, Launch]:
    """Launches of the layer by operation: the passes list them instead of running them."""
    # Not at the top: the rest works without Triton.
    from pretrain_kernels.triton_experts import choose_tiles, steps  # noqa: PLC0415
    from pretrain_kernels.triton_experts.routing import route_tokens  # noqa: PLC0415

    shape = problem.shape
    major, minor = torch.cuda.get_device_capability(problem.x.device)
    tiles = choose_tiles(rows=shape.rows, experts=shape.E, width=shape.F, capability=10 * major + minor)
    x, fc1, fc2, scores = (leaf.detach() for leaf in problem.leaves)
    route = route_tokens(problem.routing.experts, scores, expert_count=shape.E, tile=tiles.rows)
    forward: list[Launch] = []
    steps.forward(x, fc1, fc2, route, tiles=tiles, keep=True, run=forward.append)
    _, down, combine = forward
    backward: list[Launch] = []
    dh = torch.randn(shape.rows, 2 * shape.F, device=x.device, dtype=x.dtype)
    steps.backward_input(dh, fc1, route, tiles=tiles, run=backward.append)
    # Nothing has been written to these yet.
    down.arguments["left"].base.normal_()
    combine.arguments["rows"].normal_()
    return {DOWN: down, DX: backward[0], COMBINE: combine}


def router_steps(shape: Shape, setup: Setup) -> dict[str, Step]:
    """Top-k routing of T logits with its backward, softmax over the chosen."""
    logits = torch.randn(shape.tokens, shape.E, device=setup.device).requires_grad_()
    factors = torch.randn(shape.tokens, shape.K, device=setup.device)
    rule = TopK(top_k=shape.K)

    def step(backend: str) -> Tensor:
        scores = route(logits, rule, backend=backend).scores  # type: ignore[arg-type]
        return torch.autograd.grad(scores, logits, factors)[0]

    steps: dict[str, Step] = {TORCH: lambda: step("torch")}
    if setup.triton:
        steps[OURS] = lambda: step("triton")
    return steps


def newton_schulz_steps(stack: tuple[int, int, int], device: torch.device) -> dict[str, Step]:
    """The iteration in bf16: ours on the whole stack, the plain form by torch on it, and matrix by matrix."""
    x = torch.randn(stack, device=device, dtype=torch.bfloat16)

    def plain(matrices: Tensor) -> Tensor:
        return newton_schulz(matrices, STEPS, torch.bfloat16, form="plain", backend="torch")

    return {
        OURS: lambda: newton_schulz(x, STEPS, torch.bfloat16),
        TORCH: lambda: plain(x),
        LOOP: lambda: [plain(matrix) for matrix in x.split(1)],
    }
