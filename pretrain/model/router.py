"""megatron-core's top-k router, plus what it lacks: sigmoid scores that are not renormalised, and load counts.

It also mends two things of megatron-core's: buffers that lose precision under bf16, and a global balancing loss that
shrinks with the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class CountingRouter(TopKRouter):
    """Counts the tokens each expert is given in training, for the balance figures of a run."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.register_buffer(
            "load",
            torch.zeros(config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device()),
            persistent=False,
        )

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of each expert; routing_map [T, E] (bool) is the final choice.

        Stands in for megatron-core's method, which counts for the selection bias only. Counts neither in validation nor
        twice under recomputation, whose first pass runs without gradients.
        """
        assert padding_mask is None
        if self.training and torch.is_grad_enabled():
            count = routing_map.sum(dim=0)
            self.load += count
            if self.enable_expert_bias:
                self.local_tokens_per_expert += count

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """Coefficient of a balancing loss, 0 when it is off.

        megatron-core takes each rank's part of the global loss to add up over the data-parallel ranks, yet gradients
        are averaged over them: the factor makes up for that.
        """
        coefficient = super().get_aux_loss_coeff(aux_loss_type)
        if aux_loss_type == "global_aux_loss":
            coefficient *= self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        return coefficient

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CountingRouter:
        """As torch's, but buffers keep their precision: bf16 cannot count beyond 256, nor take small bias steps."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class PlainSigmoidRouter(CountingRouter):
    """Sigmoid scores used as they are as combine weights; megatron-core renormalises them when top_k > 1."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [S, B, E] -> combine weights scaling_factor * sigmoid(logit) [T, E], choice [T, E] (bool)."""
        probs, choice = super().routing(logits, padding_mask=padding_mask)
        if self.topk == 1:
            return probs, choice
        # Undo the division by the sum rather than start over: the auxiliary losses hang on the graph of `probs`.
        chosen = torch.sigmoid(logits.view(-1, logits.shape[-1]).float()) * choice
        return probs * chosen.sum(dim=-1, keepdim=True).type_as(probs), choice
