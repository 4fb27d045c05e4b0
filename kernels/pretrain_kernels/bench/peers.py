"""Expert layers of others behind one signature: (x, fc1, fc2, routing) -> [T, D], differentiable like ours.

The packages are optional: a peer that cannot be imported is left out, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_kernels import Tokens, swiglu_experts

Layer: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tokens], Tensor]

UNFUSED = "unfused torch"
LIGER, SCATTERMOE, SONICMOE = "liger", "scattermoe", "sonicmoe"


@dataclass(frozen=True)
class Missing:
    """Why a peer is not measured."""

    reason: str


def ours(backend: Literal["triton", "grouped_mm", "loop"]) -> Layer:
    """`swiglu_experts` with a backend."""
    return partial(swiglu_experts, backend=backend)


def unfused(x: Tensor, fc1: Tensor, fc2: Tensor, routing: Tokens) -> Tensor:
    """The layer as one writes it with torch alone: every step an operation, left to autograd."""
    K = routing.experts.shape[1]
    experts, choice = routing.experts.flatten().sort(stable=True)
    token = choice // K
    ends = torch.searchsorted(experts, torch.arange(len(fc1), device=x.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(x.index_select(0, token), fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, fc2.transpose(1, 2), offs=ends)
    rows = rows * routing.scores.flatten().index_select(0, choice).unsqueeze(-1).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, token, rows)


def liger() -> Layer | Missing:
    """Liger-Kernel's fused MoE (liger-kernel 0.8 or newer; Triton)."""
    module = _import("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    if isinstance(module, Missing):
        return module

    def layer(x: Tensor, fc1: Tensor, fc2: Tensor, routing: Tokens) -> Tensor:
        output: Tensor = module.LigerFusedMoEFunction.apply(x, fc1, fc2, routing.experts.int(), routing.scores)
        return output

    return layer


def scattermoe() -> Layer | Missing:
    """ScatterMoE's linear layers with SwiGLU between them, as in its gated MLP (Triton)."""
    module = _import("scattermoe.parallel_experts", "parallel_linear", "flatten_sort_count")
    if isinstance(module, Missing):
        return module

    def layer(x: Tensor, fc1: Tensor, fc2: Tensor, routing: Tokens) -> Tensor:
        order = module.flatten_sort_count(routing.experts, num_experts=len(fc1))
        K = routing.experts.shape[1]
        h = module.parallel_linear(x, fc1.transpose(1, 2), K, *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        output: Tensor = module.parallel_linear(
            F.silu(gate) * up, fc2.transpose(1, 2), 1, *order, grouped_in=True, gates=routing.scores.to(x.dtype)
        )
        return output

    return layer


def sonicmoe() -> Layer | Missing:
    """SonicMoE with a routing from outside (CuTe DSL; gate and up rows one after the other need `concat_layout`)."""
    module = _import("sonicmoe.functional", "moe_general_routing_inputs")
    if isinstance(module, Missing):
        return module
    enums = _import("sonicmoe.enums", "ActivationType")
    if isinstance(enums, Missing):
        return enums

    def layer(x: Tensor, fc1: Tensor, fc2: Tensor, routing: Tokens) -> Tensor:
        experts = routing.experts
        token = torch.arange(len(experts), device=x.device, dtype=torch.int32).repeat_interleave(experts.shape[1])
        weights: tuple[Any, ...] = (fc1.permute(1, 2, 0), None, fc2.permute(1, 2, 0), None)
        stream = torch.cuda.current_stream().cuda_stream
        # Arguments by position: the name of the stream's differs between releases.
        output: Tensor = module.moe_general_routing_inputs(
            x, routing.scores.flatten(), token, experts.flatten().int(), *weights, len(fc1), stream,
            enums.ActivationType.SWIGLU, concat_layout=True,
        )[0]  # fmt: skip
        return output

    return layer


PEERS: dict[str, Callable[[], Layer | Missing]] = {LIGER: liger, SCATTERMOE: scattermoe, SONICMOE: sonicmoe}


def available() -> tuple[dict[str, Layer], dict[str, Missing]]:
    """Peers that import, and those that do not."""
    found = {name: adapter() for name, adapter in PEERS.items()}
    layers = {name: layer for name, layer in found.items() if not isinstance(layer, Missing)}
    return layers, {name: layer for name, layer in found.items() if isinstance(layer, Missing)}


def _import(name: str, *attributes: str) -> Any | Missing:
    """The module, if it imports and has what is needed. Third-party imports fail in many ways: all of them are told."""
    try:
        module: ModuleType = importlib.import_module(name)
    except Exception as error:
        return Missing(f"{type(error).__name__}: {error}".splitlines()[0])
    absent = [attribute for attribute in attributes if not hasattr(module, attribute)]
    return Missing(f"{name} has no {absent[0]}") if absent else module
