"""Expert layers with random inputs, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pretrain_kernels import Grouped, Tokens, swiglu_experts
from pretrain_kernels.reference import reference_experts

# Rows of each expert: none in the first, the last, the middle or all but one; one row; about a tile of 128; none.
ROWS = {
    "uneven": [7, 1, 4, 9, 3],
    "first empty": [0, 5, 3, 2, 1],
    "middle empty": [4, 0, 0, 6, 1],
    "last empty": [2, 8, 1, 3, 0],
    "all on one": [0, 0, 13, 0, 0],
    "about 128": [127, 0, 128, 1, 129],
    "no rows": [0, 0, 0, 0, 0],
}
NAMES = ("y", "x", "fc1", "fc2", "scores")
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """x, weights, routing, and a gradient of the output."""

    x: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    routing: Grouped | Tokens
    dy: torch.Tensor

    def run(self, backend: str, *, trainable: torch.Tensor | None = None) -> Results:
        """The output and, by their names, the gradients of x, fc1, fc2 and the scores."""
        return self._results(lambda *inputs: swiglu_experts(*inputs, trainable=trainable, backend=backend))

    def reference(self, *, trainable: torch.Tensor | None = None, dtype: torch.dtype = torch.float64) -> Results:
        """The same from the reference, computed in `dtype`."""
        return self._results(lambda *inputs: reference_experts(*inputs, trainable=trainable, dtype=dtype))

    def _results(self, function) -> Results:
        inputs = (self.x, self.fc1, self.fc2, self.routing.scores)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        y = function(*leaves[:3], replace(self.routing, scores=leaves[3]))
        # The reference does without weights that do not train.
        gradients = torch.autograd.grad(y, leaves, self.dy.to(y.dtype), allow_unused=True, materialize_grads=True)
        return dict(zip(NAMES, (y.detach(), *gradients), strict=True))


def random_layer(
    rows: Sequence[int] | None = None,
    *,
    tokens: int = 30,
    experts: int = 5,
    per_token: int = 3,
    D: int = 32,
    F: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """Grouped rows where `rows` per expert are given, else tokens that choose `per_token` different experts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    scores_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if rows is not None:
        tokens, experts = sum(rows), len(rows)
        scores = torch.rand(tokens, generator=generator, dtype=scores_dtype)
        routing: Grouped | Tokens = Grouped(torch.tensor(rows), scores)
    else:
        chosen = torch.rand(tokens, experts, generator=generator).topk(per_token).indices
        routing = Tokens(chosen, torch.rand(tokens, per_token, generator=generator, dtype=scores_dtype))
    return Layer(
        x=normal(tokens, D),
        fc1=normal(experts, 2 * F, D, scale=D**-0.5),
        fc2=normal(experts, D, F, scale=F**-0.5),
        routing=routing,
        dy=normal(tokens, D),
    )


def errors(actual: Results, expected: Results) -> dict[str, float]:
    """Norm of the difference over the norm of the expected; 0 for empty tensors, NaN stays NaN."""
    assert actual.keys() == expected.keys()
    return {
        name: float((actual[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
        if wanted.numel()
        else 0.0
        for name, wanted in expected.items()
    }


def same(a: Results, b: Results, *names: str) -> bool:
    """Whether the named results, or all, are the same bit by bit."""
    return all(torch.equal(a[name], b[name]) for name in names or NAMES)
