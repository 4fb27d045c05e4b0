"""Lets megatron-core run on CPUs over gloo, with its real tensor, expert, pipeline and data parallelism.

Megatron-core names CUDA in the open: as a device, as streams, as the random generator. `apply` replaces exactly those
places, once, and only where CUDA is absent; with a GPU `router_gemm` alone is needed (see `device.setup`). Each patch
is one function of `PATCHES` whose docstring says what it stands in for. Where the original could only raise without
CUDA it is replaced on torch itself; everything that also works for ordinary CPU code (factory functions,
`torch.cuda.manual_seed`, collectives) is replaced inside the megatron-core modules that need it, so that other code
sees plain torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config
import torch.distributed as dist

from pretrain.errors import UserError

SUPPORTED = (0, 16)
"""Megatron-core's (major, minor) that these patches were written against."""

_applied: tuple[str, ...] = ()


def apply() -> tuple[str, ...]:
    """Patch megatron-core for a machine without CUDA; return the names of the patches in force.

    Does nothing, and returns an empty tuple, where CUDA is available. Later calls change nothing.
    Raises UserError when the installed megatron-core is not the version the patches fit.
    """
    global _applied  # noqa: PLW0603 - patching modules is process-wide, and so is the memory of having done it
    if torch.cuda.is_available() or _applied:
        return _applied
    check_version(_module("package_info").__version__)
    for patch in PATCHES:
        patch()
    _applied = tuple(patch.__name__ for patch in PATCHES)
    return _applied


def check_version(version: str) -> None:
    """Raise UserError unless `version` is a megatron-core that the patches fit."""
    if tuple(version.split(".")[:2]) != tuple(map(str, SUPPORTED)):
        wanted = ".".join(map(str, SUPPORTED))
        raise UserError(
            f"megatron-core {version} cannot run without CUDA here: the CPU adapter fits {wanted}.x; "
            f'pip install "megatron-core>=0.16.1,<0.17"'
        )


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


def current_device() -> None:
    """Stands in for `torch.cuda.current_device()`, which megatron-core passes as the device of nearly every buffer."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def tensor_cuda() -> None:
    """Stands in for `Tensor.cuda()`: tied embeddings and packed RoPE move tensors with it."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


class HostStream:
    """Stream and event in one: work on a CPU is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: HostStream) -> None:
        """Return at once."""

    def wait_event(self, event: HostStream) -> None:
        """Return at once."""

    def record_event(self, event: HostStream | None = None) -> HostStream:
        """Return an event that has happened."""
        return self

    def synchronize(self) -> None:
        """Return at once."""


def streams() -> None:
    """Stands in for CUDA streams and events in the token dispatcher, the gradient buckets and the schedules."""
    only_stream = HostStream()
    torch.cuda.Stream = HostStream  # type: ignore[misc, assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[misc, assignment, return-value]
    torch.cuda.current_stream = lambda device=None: only_stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: only_stream  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None


def torch_with(**replacements: Any) -> types.ModuleType:
    """A module that is torch but for `replacements`, to be put where a module holds the name `torch`."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.__dict__.update(replacements)
    return stand_in


def on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A factory function that makes tensors for `device="cuda"` on the CPU."""

    @functools.wraps(factory)
    def wrapper(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

    return wrapper


def device_literals() -> None:
    """Stands in for `device="cuda"` in the schedules' token counters, the auxiliary-loss log and the causal masks."""
    stand_in = torch_with(zeros=on_host(torch.zeros), ones=on_host(torch.ones))
    for name in ("pipeline_parallel.schedules", "transformer.moe.moe_utils", "transformer.utils"):
        _module(name).torch = stand_in  # type: ignore[attr-defined]


def random_state() -> None:
    """Stands in for the CUDA generator in the RNG tracker and in recomputation: they fork the CPU generator instead."""
    random = _module("tensor_parallel.random")
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__dict__.update(get_rng_state=torch.get_rng_state, manual_seed=torch.manual_seed)
    random.torch = torch_with(cuda=cuda)  # type: ignore[attr-defined]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    random.CudaRNGStatesTracker.fork = _fork  # type: ignore[attr-defined]


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` on the CPU generator, without its warning that the CPU generator was used."""
    if name not in tracker.states_:
        raise KeyError(f"random state {name!r} is not tracked; known: {sorted(tracker.states_)}")
    outer_name, outer_state = tracker._current_state_name, torch.get_rng_state()
    if outer_name != "default-rng":
        tracker.states_[outer_name] = outer_state
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        # An inner fork of the same name has moved the outer state on.
        torch.set_rng_state(tracker.states_.get(outer_name, outer_state))
        tracker._current_state_name = outer_name


def router_gemm() -> None:
    """Stands in for `te_general_gemm`, a name the router reads but only defines when Transformer Engine is there.

    Also without it on a GPU. Where the name is defined nothing is touched.
    """
    moe_utils = _module("transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def compiled_helpers() -> None:
    """Stands in for torch.compile, in which megatron-core wraps a few small functions (routing with a selection bias is
    one): on a CPU that needs a C++ compiler at run time, and seconds at the first step, to save next to nothing."""
    torch._dynamo.config.disable = True


def split_sizes() -> None:
    """Stands in for the copy of split sizes to the host, which turns them into numpy only when they were on a GPU."""

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _module("transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = to_host  # type: ignore[attr-defined]


def uneven_gather() -> None:
    """Stands in for all_gather of unequal sizes, not in gloo: experts under tensor parallelism gather their tokens."""
    mappings = _module("tensor_parallel.mappings")
    even_gather = mappings._gather_along_first_dim

    def gather_along_first_dim(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, output_split_sizes, use_global_buffer)
        # gloo's all_to_all does take unequal sizes: every rank sends all its rows to everyone.
        copies = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        rows = [input_.shape[0]] * group.size()
        dist.all_to_all_single(output, copies, list(output_split_sizes), rows, group=group)
        return output

    mappings._gather_along_first_dim = gather_along_first_dim  # type: ignore[attr-defined]


def pipeline_sends() -> None:
    """Stands in for NCCL's hold on a buffer being sent: the schedules free a stage's output right after `isend`.

    They do so by swapping the tensor's `.data`; gloo keeps the tensor, not the memory, and would send what comes to
    lie there next. Sending an alias keeps the memory until gloo is done with it.
    """
    p2p = _module("pipeline_parallel.p2p_communication")

    def sending_aliases(operations: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operations)
        def wrapper(
            *, tensor_send_prev: torch.Tensor | None, tensor_send_next: torch.Tensor | None, **kwargs: Any
        ) -> Any:
            return operations(
                tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.detach(),
                tensor_send_next=None if tensor_send_next is None else tensor_send_next.detach(),
                **kwargs,
            )

        return wrapper

    for name in ("_p2p_ops", "_batched_p2p_ops"):
        setattr(p2p, name, sending_aliases(getattr(p2p, name)))


PATCHES: tuple[Callable[[], None], ...] = (
    current_device,
    tensor_cuda,
    streams,
    device_literals,
    random_state,
    router_gemm,
    compiled_helpers,
    split_sizes,
    uneven_gather,
    pipeline_sends,
)
"""Every patch, in the order of application."""
