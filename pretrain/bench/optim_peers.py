"""What our update rules are timed against: the optimizers of torch and pytorch_optimizer, and plain loops over tensors.

Peers get copies of our weights and gradients. Elementwise rules get the tensors as the model has them; matrix rules the
matrices inside them, each apart, as those libraries take no others; block rules the blocks. In each step they find the
gradient's global norm, by the function that ours find it by.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.config.optim import Kind, OptimConfig
from pretrain.model.shards import Shard
from pretrain.optim.blocks import Blocks
from pretrain.optim.clip import global_norm
from pretrain.optim.matrices import split_matrices
from pretrain.optim.muon import muon_scale
from pretrain_kernels.newton_schulz import newton_schulz

LIBRARY = "pytorch_optimizer"
LOOP = "loop over tensors"

LoopRule = Callable[[Tensor, Tensor, Sequence[Tensor], int], None]
"""Moves a weight by its gradient, its states and the number of the step."""


@dataclass(frozen=True)
class Peer:
    """An optimizer that has its own copy of the weights."""

    step: Callable[[], object]
    weights: list[Tensor]
    """In the order of `tensors_of`."""


def tensors_of(kind: Kind, shards: Sequence[Shard], config: OptimConfig, *, gradients: bool = False) -> list[Tensor]:
    """The weights (or gradients) of shards as a peer of a kind takes them; copies."""
    boxes = [(s, s.view(s.tensor.main_grad if gradients else s.tensor.detach())) for s in shards]  # type: ignore[attr-defined]
    if kind in ("soap", "kron"):
        largest = (config.soap if kind == "soap" else config.kron).block_size
        found = [block for shard, box in boxes for block in Blocks(shard, largest).cut(box)]
    elif kind in ("muon", "scion", "muonh", "adamh"):
        found = [matrix for shard, box in boxes for batch in split_matrices(shard.logical, box) for matrix in batch]
    else:
        found = [box.view(shard.tensor.shape) for shard, box in boxes]
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in found]


def peers(kind: Kind, shards: Sequence[Shard], config: OptimConfig, *, lr: float) -> dict[str, Peer]:
    """The peers of a kind by name, on copies of the given shards. `lr`: of those shards. There is no decay."""
    weights, grads = (tensors_of(kind, shards, config, gradients=of_grads) for of_grads in (False, True))
    makers = {**_of_torch(kind, config, lr), **(_of_library(kind, config, lr) if has_library() else {})}
    found = {name: _optimizer(make, weights, grads) for name, make in makers.items()}
    loop = _loops(config, lr).get(kind)
    if loop:
        rule, states = loop
        found[LOOP] = _looped(rule, weights, grads, states)
    return found


def has_library() -> bool:
    """Whether pytorch_optimizer is installed."""
    return importlib.util.find_spec(LIBRARY) is not None


def _optimizer(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], weights: list[Tensor], grads: list[Tensor]
) -> Peer:
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return Peer(_with_norm(make(params).step, grads), [param.detach() for param in params])


def _looped(rule: LoopRule, weights: list[Tensor], grads: list[Tensor], states: int) -> Peer:
    members = [
        (weight.clone(), grad.clone(), [torch.zeros_like(weight) for _ in range(states)])
        for weight, grad in zip(weights, grads, strict=True)
    ]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        for weight, grad, kept in members:
            rule(weight, grad, kept, done)

    return Peer(_with_norm(step, grads), [weight for weight, *_ in members])


def _with_norm(step: Callable[[], object], grads: list[Tensor]) -> Callable[[], object]:
    return lambda: (global_norm(grads, grads[0].device), step())


def _of_torch(kind: Kind, config: OptimConfig, lr: float) -> Mapping[str, Callable[..., torch.optim.Optimizer]]:
    adam: dict[str, Any] = {"lr": lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": 0.0}
    if kind == "adamw":
        return {
            "torch AdamW, fused": partial(torch.optim.AdamW, fused=True, **adam),
            "torch AdamW, foreach": partial(torch.optim.AdamW, foreach=True, **adam),
            "torch AdamW, loop": partial(torch.optim.AdamW, foreach=False, fused=False, **adam),
        }
    if kind == "nadamw":
        # With this momentum_decay its schedule of beta1 is over at once.
        adam |= {"momentum_decay": 1e6, "decoupled_weight_decay": True}
        return {
            "torch NAdam, foreach": partial(torch.optim.NAdam, foreach=True, **adam),
            "torch NAdam, loop": partial(torch.optim.NAdam, foreach=False, **adam),
        }
    if kind == "muon":
        muon: dict[str, Any] = {
            "lr": lr,
            "weight_decay": 0.0,
            "momentum": config.muon.momentum,
            "adjust_lr_fn": "match_rms_adamw",
        }
        return {"torch Muon (bf16)": partial(torch.optim.Muon, **muon)}
    return {}


def _of_library(kind: Kind, config: OptimConfig, lr: float) -> Mapping[str, Callable[..., torch.optim.Optimizer]]:
    library = importlib.import_module(LIBRARY)
    betas = (config.beta1, config.beta2)
    if kind == "lion":
        made = partial(library.Lion, lr=lr, betas=betas)
    elif kind == "mars":
        made = partial(library.MARS, lr=lr, betas=betas, gamma=config.mars.gamma, eps=config.eps, optimize_1d=True)
    elif kind == "sophia":
        made = partial(_sophia, library.SophiaH, lr=lr / config.sophia.gamma, betas=betas, p=config.sophia.gamma)
    elif kind == "soap":
        soap = {"shampoo_beta": config.soap.shampoo_beta, "precondition_frequency": config.soap.every_steps}
        return {f"{LIBRARY} SOAP": partial(library.SOAP, lr=lr, betas=betas, eps=config.eps, weight_decay=0.0, **soap)}
    elif kind == "kron" and torch.backends.opt_einsum.is_available():
        # Without opt_einsum torch contracts from the left, by way of a tensor with block size ^ 4 entries. Every step
        # updates the preconditioners, as at the start of a run of ours.
        return {f"{LIBRARY} Kron": partial(library.Kron, lr=lr, pre_conditioner_update_probability=1.0)}
    else:
        return {}
    name = f"{LIBRARY} {'SophiaH' if kind == 'sophia' else made.func.__name__}"
    return {f"{name}, foreach": partial(made, foreach=True), f"{name}, loop": partial(made, foreach=False)}


def _sophia(
    cls: Callable[..., torch.optim.Optimizer], params: list[torch.nn.Parameter], **keys: Any
) -> torch.optim.Optimizer:
    """SophiaH that never estimates: it would need gradients that can be differentiated again."""
    made = cls(params, update_period=1 << 30, **keys)
    made.param_groups[0]["step"] = 1  # the first step, number 0, is due for an estimate
    return made


def _loops(config: OptimConfig, lr: float) -> Mapping[Kind, tuple[LoopRule, int]]:
    """Our rules as they would be written for one tensor at a time, and how many states each has."""
    b1, b2, eps = config.beta1, config.beta2, config.eps

    def adam(grad: Tensor, states: Sequence[Tensor], step: int) -> Tensor:
        first, second = states
        first.lerp_(grad, 1 - b1)
        second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        return (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps)

    def cautious(weight: Tensor, grad: Tensor, states: Sequence[Tensor], step: int) -> None:
        update = adam(grad, states, step)
        mask = (update * grad > 0).to(update.dtype)
        weight.sub_(lr * update * mask / (mask.mean() + 1e-8))

    def adamh(weight: Tensor, grad: Tensor, states: Sequence[Tensor], step: int) -> None:
        update, radius = adam(grad, states, step), weight.norm()
        weight.sub_(lr * radius * update / update.norm())
        weight.mul_(radius / weight.norm())

    def orthogonal(weight: Tensor, direction: Tensor, keys: Any) -> None:
        dtype = getattr(torch, keys.newton_schulz_dtype)
        update = newton_schulz(direction[None], keys.newton_schulz_steps, dtype)[0]
        weight.sub_(lr * muon_scale(keys.scale, *weight.shape) * update)

    def muon(weight: Tensor, grad: Tensor, states: Sequence[Tensor], step: int) -> None:
        momentum = states[0].mul_(config.muon.momentum).add_(grad)
        orthogonal(weight, grad + config.muon.momentum * momentum, config.muon)

    def scion(weight: Tensor, grad: Tensor, states: Sequence[Tensor], step: int) -> None:
        orthogonal(weight, states[0].lerp_(grad, 1 - config.scion.momentum), config.scion)

    return {"cautious": (cautious, 2), "adamh": (adamh, 2), "muon": (muon, 1), "scion": (scion, 1)}
