"""What the routers of all ranks did in the last step: load per expert and auxiliary losses.

Letters: L MoE layers of the whole model, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from pretrain.config.schema import ModelConfig
from pretrain.model.router import CountingRouter
from pretrain.model.transformer_config import AUX_LOSSES
from pretrain.parallel.engine import Engine

# Our router keys -> name of the loss in megatron-core's tracker.
TRACKED = {
    "aux_loss": "load_balancing_loss",
    "sequence_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}
assert set(TRACKED) == {*AUX_LOSSES, "z_loss"}


def _routers(engine: Engine) -> dict[int, CountingRouter]:
    """Global layer number (from 0) -> router, of this rank's layers."""
    return {
        module.layer_number - 1: module
        for chunk in engine.chunks
        for module in chunk.modules()
        if isinstance(module, CountingRouter)
    }


def reset_routing_stats(engine: Engine) -> None:
    """Forget the counts and losses of the step before."""
    for router in _routers(engine).values():
        router.load.zero_()
    # Emptied rather than zeroed: megatron-core sizes it by the first model it sees.
    get_moe_layer_wise_logging_tracker().clear()


def expert_load(engine: Engine, model: ModelConfig) -> torch.Tensor:
    """Tokens given to each expert since the reset, over the global batch: int64 [L, E] on the CPU. Collective."""
    load = torch.zeros(len(model.moe_layers), model.num_experts, dtype=torch.int64, device=engine.mesh.device)
    for layer, router in _routers(engine).items():
        load[model.moe_layers.index(layer)] = router.load
    # Every token passes one router per layer on one rank: pipeline stages add their layers, all others their tokens.
    dist.all_reduce(load)
    return load.cpu()


def copy_selection_biases(engine: Engine) -> dict[int, torch.Tensor]:
    """This rank's selection biases, for `restore_selection_biases`; empty when the routers have none."""
    routers = _routers(engine).items()
    return {layer: router.expert_bias.clone() for layer, router in routers if router.expert_bias is not None}


def restore_selection_biases(engine: Engine, biases: dict[int, torch.Tensor]) -> None:
    """Take back an update of the biases, which megatron-core makes before it is known whether the step is skipped."""
    routers = _routers(engine)
    for layer, bias in biases.items():
        routers[layer].expert_bias.copy_(bias)


def selection_bias(engine: Engine, model: ModelConfig) -> torch.Tensor | None:
    """Selection biases fp32 [L, E] on the CPU; None when the routers have none. Collective."""
    if model.router.bias_update_rate == 0:
        return None
    bias = torch.zeros(len(model.moe_layers), model.num_experts, device=engine.mesh.device)
    for layer, router in _routers(engine).items():
        bias[model.moe_layers.index(layer)] = router.expert_bias
    dist.all_reduce(bias, group=engine.mesh.groups.pp)
    return bias.cpu()


def aux_losses(engine: Engine, model: ModelConfig) -> dict[str, float]:
    """Auxiliary losses of the last step by their router key, mean over MoE layers, without coefficient. Collective.

    The balancing losses are 1 when the load is even and the router indifferent, num_experts / top_k at worst.
    """
    names = [name for name in TRACKED if getattr(model.router, name) > 0]
    if not names:
        return {}
    tracker, groups = get_moe_layer_wise_logging_tracker(), engine.mesh.groups
    totals = torch.zeros(len(names), device=engine.mesh.device)
    for index, name in enumerate(names):
        entry = tracker.get(TRACKED[name])
        if entry is None:
            continue  # A pipeline stage without MoE layers.
        share = entry["values"].sum() / (engine.microbatches * len(model.moe_layers))
        # megatron-core leaves a part of each loss on each rank of its reduce group, the whole of it elsewhere.
        if entry["reduce_group"] is None:
            share = share / groups.tp_cp.size()
        if not entry["reduce_group_has_dp"]:
            share = share / groups.dp.size()
        totals[index] = share
    dist.all_reduce(totals)
    return dict(zip(names, totals.tolist(), strict=True))
