"""What the GPU benchmark runs on: the expert layers of published models, random inputs, and how tokens choose experts.

Letters: E experts, K experts of a token, D model width, F expert width, T tokens, R = T K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain_kernels import Tokens

TOKENS = 16384
"""Tokens of a micro-batch: four sequences of 4096."""


@dataclass(frozen=True)
class Shape:
    """One expert layer. Operations are those of the model: rows that only fill tiles do not count."""

    name: str
    D: int
    F: int
    E: int
    K: int
    tokens: int = TOKENS

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.K

    @property
    def product_flops(self) -> int:
        """One product of R rows with D x F."""
        return 2 * self.rows * self.D * self.F

    @property
    def forward_flops(self) -> int:
        """Gate, up and down: three products, 6 R D F."""
        return 3 * self.product_flops

    @property
    def step_flops(self) -> int:
        """Forward, and two more products for the gradients of each: 18 R D F."""
        return 9 * self.product_flops

    @property
    def saved_bytes(self) -> int:
        """What backward needs in 16 bits: x, the pre-activations, and 12 bytes of routing for every row."""
        return 2 * self.tokens * self.D + 4 * self.rows * self.F + 12 * self.rows


# From the published configurations; the quick run takes the first QUICK.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Qwen3-30B-A3B", D=2048, F=768, E=128, K=8),
        Shape("OLMoE-1B-7B", D=2048, F=1024, E=64, K=8),
        Shape("Mixtral-8x7B", D=4096, F=14336, E=8, K=2),
        Shape("SPES-7B", D=2048, F=2048, E=32, K=4),
        Shape("DeepSeek-V2-Lite", D=2048, F=1408, E=64, K=6),
        Shape("SPARKLING", D=1024, F=512, E=64, K=8),
    )
}
QUICK = 4


def uniform_routing(shape: Shape, generator: torch.Generator) -> Tensor:
    """int64 [T, K]: K different experts a token, every expert as often as every other (to one row)."""
    numbers = torch.arange(shape.rows) % shape.E  # K <= E neighbours of a cycle are different
    relabelled = torch.randperm(shape.E, generator=generator)[numbers].view(shape.tokens, shape.K)
    return relabelled[torch.randperm(shape.tokens, generator=generator)]


def zipf_routing(shape: Shape, generator: torch.Generator) -> Tensor:
    """int64 [T, K]: K different experts a token, drawn one after the other with weights 1, 1/2, 1/3, ...

    The largest of log-weights plus Gumbel noise are such a draw without replacement.
    """
    weights = 1.0 / torch.arange(1, shape.E + 1)
    weights = weights[torch.randperm(shape.E, generator=generator)]
    uniform = torch.rand(shape.tokens, shape.E, generator=generator).clamp(min=1e-30)
    return (weights.log() - (-uniform.log()).log()).topk(shape.K, dim=1).indices


ROUTINGS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {"uniform": uniform_routing, "zipf": zipf_routing}


@dataclass(frozen=True)
class Problem:
    """Inputs of a layer: random everywhere, as products of zeros are faster than others (they draw less power)."""

    shape: Shape
    x: Tensor
    fc1: Tensor
    fc2: Tensor
    routing: Tokens
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What gets gradients."""
        return self.x, self.fc1, self.fc2, self.routing.scores

    @property
    def counts(self) -> Tensor:
        """int64 [E]: rows of each expert."""
        return torch.bincount(self.routing.experts.flatten(), minlength=self.shape.E)


def make_problem(
    shape: Shape, routing: str, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Problem:
    """Random inputs of `shape` on `device`, routed by the entry `routing` of ROUTINGS."""
    on_cpu = torch.Generator().manual_seed(seed)
    experts = ROUTINGS[routing](shape, on_cpu)
    scores = torch.rand(shape.tokens, shape.K, generator=on_cpu) + 0.1
    scores = scores / scores.sum(dim=1, keepdim=True)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).mul_(scale)

    return Problem(
        shape=shape,
        x=normal(shape.tokens, shape.D).requires_grad_(),
        fc1=normal(shape.E, 2 * shape.F, shape.D, scale=shape.D**-0.5).requires_grad_(),
        fc2=normal(shape.E, shape.D, shape.F, scale=shape.F**-0.5).requires_grad_(),
        routing=Tokens(experts.to(device), scores.to(device).requires_grad_()),
        dy=normal(shape.tokens, shape.D),
    )
