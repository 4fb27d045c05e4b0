"""Lets megatron-core's own optimizer run on a CPU, for the time of a `with` block. Only the benchmark needs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pretrain.platform.cpu_adapter import on_host, torch_with

# Scale of the loss, gradient norm, and the norm that stands in for a CUDA extension.
MODULES_WITH_DEVICE_LITERALS = ("optimizer.optimizer", "optimizer.clip_grads", "utils")


@contextmanager
def optimizer_on_cpu() -> Iterator[None]:
    """megatron-core's optimizers accept tensors of the CPU inside; nothing is changed where CUDA is available."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            device_literals(stack)
            tensor_types(stack)
        yield


def device_literals(stack: ExitStack) -> None:
    """Stands in for `device="cuda"` in the optimizer's factory calls."""
    stand_in = torch_with(zeros=on_host(torch.zeros), tensor=on_host(torch.tensor))
    for name in MODULES_WITH_DEVICE_LITERALS:
        _replace(stack, importlib.import_module(f"megatron.core.{name}"), "torch", stand_in)


def tensor_types(stack: ExitStack) -> None:
    """Stands in for the names of CUDA's tensor types, which the optimizer compares `Tensor.type()` with."""
    real = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    _replace(stack, torch.Tensor, "type", cuda_type)


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
