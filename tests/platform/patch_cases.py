"""Run as a script: each patch's case with all patches and with that one left out, every time in a fresh fork.

Prints {patch: {"with": error, "without": error}} as JSON, an empty error meaning success. A fork of a process that has
only imported megatron-core costs milliseconds, where a fresh interpreter takes seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from pretrain.platform import cpu_adapter


def train_one_step() -> None:
    """A whole step of a mixture-of-experts model in a world of one."""
    from tests.platform.gpt import one_step

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result = one_step({})
    assert all(torch.isfinite(gradient).all() for gradient in result["gradients"].values())


def split_sizes_to_numpy() -> None:
    """What the dispatcher hands to all_to_all must be host integers, not a tensor."""
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert not torch.is_tensor(sizes)
    assert sizes.tolist() == [2, 3]


def swiglu_without_compiler() -> None:
    """A function that megatron-core wraps in torch.compile, on a machine that has no C++ compiler."""
    import torch._inductor.config
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    torch._inductor.config.cpp.cxx = ("/no/such/compiler",)
    torch._inductor.config.force_disable_caches = True  # nor something compiled earlier
    x = torch.randn(3, 8)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


def masks() -> None:
    """The causal masks are made with device="cuda"."""
    from megatron.core.transformer import utils

    assert utils.get_default_causal_mask(3).int().tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert utils.get_sliding_window_causal_mask(3, 3, (1, 0)).int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 0, 0]]


def auxiliary_loss_log() -> None:
    """The log of auxiliary losses is made with device="cuda" on pipeline stages that have no such loss."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    losses: dict[str, torch.Tensor] = {}
    moe_utils.track_moe_metrics(
        1.0, 0, None, total_loss_dict=losses, force_initialize=True, track_names=["load_balancing_loss"], num_layers=2
    )
    assert losses["load_balancing_loss"].item() == 0


CASES: dict[str, tuple[Callable[[], None], ...]] = {
    "current_device": (train_one_step,),
    "streams": (train_one_step,),
    "device_literals": (train_one_step, masks, auxiliary_loss_log),
    "random_state": (train_one_step,),
    "router_gemm": (train_one_step,),
    "compiled_helpers": (swiglu_without_compiler,),
    "split_sizes": (split_sizes_to_numpy,),
}
"""The other patches matter between processes only; their cases are in test_cpu_pipeline and test_cpu_experts."""


def outcome(case: Callable[[], None], patches: tuple[Callable[[], None], ...]) -> str:
    """Apply `patches` and run `case` in a fork; return its error on one line, or nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        error = ""
        try:
            cpu_adapter.PATCHES = patches
            cpu_adapter.apply()
            case()
        except BaseException as raised:
            error = " ".join(f"{type(raised).__name__}: {raised}".split())
        os.write(writer, (error[:1000] + "\n").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        error = pipe.readline().strip()
    os.waitpid(pid, 0)
    return error


def main() -> None:
    """Run every case and print the outcomes."""
    torch.set_num_threads(1)  # no OpenMP threads that a fork would lose
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported before the forks, so that each of them need not.
        for name in ("models.gpt.gpt_model", "pipeline_parallel.schedules", "distributed"):
            importlib.import_module(f"megatron.core.{name}")
    everything = cpu_adapter.PATCHES
    outcomes = {
        f"{patch}-{case.__name__}": {
            "with": outcome(case, everything),
            "without": outcome(case, tuple(p for p in everything if p.__name__ != patch)),
        }
        for patch, cases in CASES.items()
        for case in cases
    }
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
