"""Experts spread over ranks and cut by tensor parallelism, over gloo, against the layer on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.platform import cpu_adapter
from tests.helpers.distributed import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")

S, B, D, F, E = 8, 4, 16, 12, 4
SIZES = [3, 0, 1]


def moe_layer(tensor: int, expert: int, expert_tensor: int) -> Any:
    """A megatron-core MoE layer for the layout, its weights cut from the same whole tensors."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from tests.platform.gpt import transformer_config

    sizes = {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    config = transformer_config(
        hidden_size=D, moe_ffn_hidden_size=F, num_moe_experts=E, sequence_parallel=tensor > 1,
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, **sizes,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
    layer = build_module(spec, config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    weights = whole_weights()
    layer.router.weight.data.copy_(weights["router"])
    first, part = local_experts(expert, expert_tensor)
    for index, mlp in enumerate(layer.experts.local_experts):
        mlp.linear_fc1.weight.data.copy_(weights["fc1"][first + index][:, part].flatten(0, 1))
        mlp.linear_fc2.weight.data.copy_(weights["fc2"][first + index][:, part])
    return layer


def whole_weights() -> dict[str, torch.Tensor]:
    """router [E, D], fc1 [E, gate and up, F, D], fc2 [E, D, F]."""
    generator = torch.Generator().manual_seed(5)
    return {
        "router": torch.randn(E, D, generator=generator),
        "fc1": torch.randn(E, 2, F, D, generator=generator),
        "fc2": torch.randn(E, D, F, generator=generator),
    }


def local_experts(expert: int, expert_tensor: int) -> tuple[int, slice]:
    """First expert of this rank, and the slice of F it holds."""
    from megatron.core import parallel_state

    rows = F // expert_tensor
    start = parallel_state.get_expert_tensor_parallel_rank() * rows
    return parallel_state.get_expert_model_parallel_rank() * (E // expert), slice(start, start + rows)


def forward_backward(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> dict[str, Any]:
    """Output, and gradients of input, router (of this rank's tokens) and this rank's experts."""
    x = x.clone().requires_grad_()
    output, _ = layer(x)
    output.backward(grad)
    mlps = layer.experts.local_experts
    return {
        "output": output.detach(),
        "x": x.grad,
        "router": layer.router.weight.grad,
        "fc1": torch.stack([mlp.linear_fc1.weight.grad.view(2, -1, D) for mlp in mlps]),
        "fc2": torch.stack([mlp.linear_fc2.weight.grad for mlp in mlps]),
    }


def compare_layouts() -> dict[str, Any]:
    """Four ranks: TP 2, EP 2, ETP 2, against the whole layer, which every rank also computes by itself."""
    cpu_adapter.apply()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    generator = torch.Generator().manual_seed(6)
    x, grad = (torch.randn(S, B, D, generator=generator) for _ in range(2))
    whole = forward_backward(moe_layer(tensor=1, expert=1, expert_tensor=1), x, grad)
    parallel_state.destroy_model_parallel()

    layer = moe_layer(tensor=2, expert=2, expert_tensor=2)
    gathers: list[list[int]] = []
    gather = mappings._gather_along_first_dim

    def recording_gather(input_: torch.Tensor, group: Any, sizes: Any = None, buffer: bool = False) -> torch.Tensor:
        gathers.extend([sizes] if sizes else [])
        return gather(input_, group, sizes, buffer)

    mappings._gather_along_first_dim = recording_gather
    # Sequences over data-parallel ranks, positions over tensor-parallel ones (sequence parallelism).
    rows = parallel_state.get_tensor_model_parallel_rank() * (S // 2)
    columns = parallel_state.get_data_parallel_rank() * (B // 2)
    here = (slice(rows, rows + S // 2), slice(columns, columns + B // 2))
    cut = forward_backward(layer, x[here].contiguous(), grad[here].contiguous())
    dist.all_reduce(cut["router"])
    first, part = local_experts(expert=2, expert_tensor=2)
    expected = {
        "output": whole["output"][here],
        "x": whole["x"][here],
        "router": whole["router"],
        "fc1": whole["fc1"][first : first + 2, :, part],
        "fc2": whole["fc2"][first : first + 2, :, part],
    }
    return {"expected": expected, "actual": cut, "gathers": gathers}


def test_expert_tensor_parallel_layer_equals_whole_layer() -> None:
    ranks = run_ranks(compare_layouts, 4)
    for rank in ranks:
        for name, expected in rank["expected"].items():
            # Sums over ranks in another order than over one matrix product; fp32.
            torch.testing.assert_close(rank["actual"][name], expected, rtol=2e-5, atol=2e-5, msg=name)
            assert expected.abs().max() > 0.1, name
    # The case in question did occur: the ranks brought unequal numbers of tokens.
    assert any(sizes[0] != sizes[1] for rank in ranks for sizes in rank["gathers"])


def uneven() -> dict[str, Any]:
    """Gather and reduce-scatter of SIZES rows over three ranks, through megatron-core's autograd functions."""
    from megatron.core.tensor_parallel import mappings

    group, rank = dist.group.WORLD, dist.get_rank()
    whole = torch.arange(8.0).view(4, 2)
    mine = whole.split(SIZES)[rank].clone().requires_grad_()
    cpu_adapter.current_device()
    error = ""
    try:
        mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=SIZES)
    except (RuntimeError, ValueError) as unpatched:
        error = str(unpatched)
    cpu_adapter.uneven_gather()
    gathered = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=SIZES)
    # Its backward is an unequal reduce-scatter, which gloo has.
    (gathered * (rank + 1)).sum().backward()
    return {"error": error, "gathered": gathered.detach(), "gradient": mine.grad}


def test_uneven_gather() -> None:
    for rank, result in enumerate(run_ranks(uneven, 3)):
        assert torch.equal(result["gathered"], torch.arange(8.0).view(4, 2))
        assert torch.equal(result["gradient"], torch.full((SIZES[rank], 2), 1.0 + 2 + 3))
        assert "invalid tensor size" in result["error"], result["error"]
