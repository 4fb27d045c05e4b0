"""What has to hold on a device before anything is measured there. The first check that fails ends the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pretrain_kernels import Grouped, Tokens, swiglu_experts
from pretrain_kernels.bench.shapes import Shape, zipf_routing
from pretrain_kernels.newton_schulz import Form, newton_schulz
from pretrain_kernels.reference import reference_experts
from pretrain_kernels.router import TopK, route

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest norm of the error over the norm of the fp64 reference, of outputs and gradients alike."""
NAMES = ("output", "x", "fc1", "fc2", "scores")
D, F = 200, 136
"""Widths of the cases: multiples of 8, and of no tile."""

# Rows of each expert: around a tile of 128 rows; none in the first, middle and last; all on one.
GROUPED = {
    "1, 127, 128 and 129 rows": [127, 1, 128, 129],
    "empty experts": [0, 65, 0, 0, 200, 0],
    "all rows on one expert": [0, 0, 300, 0],
    "no rows": [0, 0, 0],
    "many rows": [300, 129, 0, 400],
}
TOKENS = 193, 515  # of 12 experts: few rows for each and many, which take different tiles
EXPERTS, CHOICES = 12, 4


class CheckError(RuntimeError):
    """A check that failed: its name, what was found and what was wanted, in one line."""


@dataclass(frozen=True)
class Case:
    """x, fc1, fc2, routing, and a gradient of the output."""

    x: Tensor
    fc1: Tensor
    fc2: Tensor
    routing: Grouped | Tokens
    dy: Tensor

    def results(self, layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The output and the gradients of NAMES[1:]."""
        leaves = [leaf.detach().requires_grad_() for leaf in (self.x, self.fc1, self.fc2, self.routing.scores)]
        y = layer(*leaves[:3], replace(self.routing, scores=leaves[3]))
        wanted = torch.autograd.grad(y, leaves, self.dy.to(y.dtype), allow_unused=True, materialize_grads=True)
        return (y.detach(), *wanted)


def make_case(routing: Grouped | Tokens, experts: int, *, device: torch.device, dtype: torch.dtype) -> Case:
    """Random inputs for a routing on the CPU."""
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

    rows = len(routing.scores)
    fields = {name: tensor.to(device) for name, tensor in vars(routing).items()}
    return Case(
        x=normal(rows, D),
        fc1=normal(experts, 2 * F, D, scale=D**-0.5),
        fc2=normal(experts, D, F, scale=F**-0.5),
        routing=replace(routing, **fields),
        dy=normal(rows, D),
    )


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """All cases by name."""
    generator = torch.Generator().manual_seed(0)
    for name, rows in GROUPED.items():
        grouped = Grouped(torch.tensor(rows), torch.rand(sum(rows), generator=generator))
        yield f"grouped, {name}", make_case(grouped, len(rows), device=device, dtype=dtype)
    chosen = {f"Zipf, {tokens} tokens": _zipf(tokens, generator) for tokens in TOKENS}
    chosen["all rows on one expert"] = torch.full((193, 1), 5)
    for name, experts in chosen.items():
        tokens = Tokens(experts, torch.rand(experts.shape, generator=generator))
        yield f"tokens, {name}", make_case(tokens, EXPERTS, device=device, dtype=dtype)


def _zipf(tokens: int, generator: torch.Generator) -> Tensor:
    return zipf_routing(Shape("", D=D, F=F, E=EXPERTS, K=CHOICES, tokens=tokens), generator)


def zipf_case(device: torch.device) -> Case:
    """The case that the checks of behaviour run on."""
    return dict(cases(device, torch.bfloat16))[f"tokens, Zipf, {TOKENS[0]} tokens"]


def require_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], *, name: str, tolerance: float) -> None:
    """Raise unless every one of NAMES is within `tolerance` of what is wanted; both zero is fine, NaN never."""
    for part, actual, expected in zip(NAMES, found, wanted, strict=True):
        if not expected.numel():
            continue
        exact = expected.double()
        error = float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise CheckError(f"{name}: {part} is {error:.1e} off, more than {tolerance:.1e}")


def require(holds: bool, problem: str) -> None:
    """Raise a CheckError unless it holds."""
    if not holds:
        raise CheckError(problem)


def check_reference(
    device: torch.device, backend: Literal["triton", "grouped_mm", "loop"], *dtypes: torch.dtype
) -> None:
    """Output and gradients against fp64, with all experts and with half of them frozen."""
    for dtype in dtypes:
        for name, case in cases(device, dtype):
            half = torch.arange(len(case.fc1), device=device) % 2 == 0
            for trainable in (None, half):
                found = case.results(lambda *a, t=trainable: swiglu_experts(*a, trainable=t, backend=backend))
                wanted = case.results(lambda *a, t=trainable: reference_experts(*a, trainable=t))
                label = f"{name}, {dtype}{'' if trainable is None else ', half of the experts frozen'}"
                require_close(found, wanted, name=label, tolerance=TOLERANCE[dtype])
                if trainable is not None:
                    frozen = not (found[2][~half].any() or found[3][~half].any())
                    require(bool(frozen), f"{label}: weights that do not train have gradients")


def check_main_grad(device: torch.device, backend: Literal["triton", "grouped_mm", "loop"]) -> None:
    """Weight gradients are added to `main_grad`, on top of what it holds."""
    case = zipf_case(device)
    wanted = case.results(reference_experts)
    fc1, fc2 = (torch.nn.Parameter(weight.clone()) for weight in (case.fc1, case.fc2))
    held = 2.0
    for weight in (fc1, fc2):
        weight.main_grad = torch.full_like(weight, held, dtype=torch.float32)  # type: ignore[attr-defined]
    x, scores = case.x.clone().requires_grad_(), case.routing.scores.clone().requires_grad_()
    routing = replace(case.routing, scores=scores)
    y = swiglu_experts(x, fc1, fc2, routing, backend=backend, accumulate_main_grad=True)
    y.backward(case.dy)
    added = tuple(weight.main_grad - held for weight in (fc1, fc2))  # type: ignore[attr-defined]
    assert x.grad is not None
    assert scores.grad is not None
    found = (y.detach(), x.grad, *added, scores.grad)
    require_close(found, wanted, name="main_grad", tolerance=TOLERANCE[torch.bfloat16])


def check_repeats(device: torch.device, backend: Literal["triton", "grouped_mm", "loop"]) -> None:
    """Two runs give the same bits."""
    case = zipf_case(device)
    first, second = (case.results(lambda *a: swiglu_experts(*a, backend=backend)) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        require(torch.equal(a, b), f"repeatability: {name} differs between two runs")


def check_no_wait(device: torch.device) -> None:
    """Neither pass makes the host wait for the device."""
    case = zipf_case(device)
    step = _triton_step(case)
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        raise CheckError(f"no wait for the device: {error}".splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph(device: torch.device) -> None:
    """Both passes, captured in a CUDA graph and replayed on other inputs, equal the same without a graph."""
    case = zipf_case(device)
    step = _triton_step(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    case.x.neg_()
    case.routing.scores.mul_(0.5)
    graph.replay()
    for name, a, b in zip(NAMES, captured, step(), strict=True):
        require(torch.equal(a, b), f"CUDA graph: {name} differs from the run without one")


def _triton_step(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: case.results(lambda *a: swiglu_experts(*a, backend="triton"))


def check_router(device: torch.device, backend: Literal["triton", "torch"] = "triton") -> None:
    """The router against its torch form: experts where they are chosen by logits, scores and gradients to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(515, 60, generator=generator).to(device)
    factors = torch.randn(515, 6, generator=generator).to(device)
    for rule in (TopK(top_k=6), TopK(top_k=6, score="all_softmax"), TopK(top_k=6, score="sigmoid")):
        results = []
        for kind in (backend, "torch"):
            leaf = logits.clone().requires_grad_()
            tokens = route(leaf, rule, backend=kind)
            (gradient,) = torch.autograd.grad(tokens.scores, leaf, factors)
            results.append((tokens.experts, tokens.scores.detach(), gradient))
        (experts, *found), (other_experts, *wanted) = results
        # Other scores may round to a tie, or away from one.
        if rule.score == "softmax":
            require(torch.equal(experts, other_experts), f"router, {rule.score}: other experts than torch's")
        for name, actual, expected in zip(("scores", "gradient"), found, wanted, strict=True):
            error = float((actual - expected).abs().max())
            require(error <= 1e-5, f"router, {rule.score}: {name} are {error:.1e} off, more than 1e-5")


def check_newton_schulz(device: torch.device, backend: Literal["triton", "torch"] = "triton") -> None:
    """Both forms against fp64: no more than 1.5 times as far off as with torch's products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 264, 520, generator=generator).to(device)
    exact = newton_schulz(x.double(), 5, torch.float64, form="plain", backend="torch")
    forms: tuple[Form, ...] = ("plain", "gram")
    for form in forms:
        for dtype in (torch.bfloat16, torch.float16):
            errors = [
                float((newton_schulz(x, 5, dtype, form=form, backend=kind) - exact).norm() / exact.norm())
                for kind in (backend, "torch")
            ]
            problem = f"Newton-Schulz, {form}, {dtype}: {errors[0]:.1e} off, torch's products {errors[1]:.1e}"
            require(errors[0] <= 1.5 * errors[1], problem)


def run_checks(device: torch.device) -> Iterator[str]:
    """Run all checks on a GPU; yields the name of each that holds, raises a CheckError at the first that does not."""
    checks: dict[str, Callable[[], None]] = {
        "experts against the fp64 reference": lambda: check_reference(device, "triton", *TOLERANCE),
        "weight gradients added to main_grad": lambda: check_main_grad(device, "triton"),
        "bitwise repeatability": lambda: check_repeats(device, "triton"),
        "no wait for the device": lambda: check_no_wait(device),
        "CUDA graph capture and replay": lambda: check_graph(device),
        "router against torch": lambda: check_router(device),
        "Newton-Schulz forms against fp64": lambda: check_newton_schulz(device),
    }
    for name, check in checks.items():
        check()
        yield name
