"""megatron-core's top-k router, plus what it lacks: sigmoid scores that are not renormalised, and load counts."""

from __future__ import annotations

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

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [S, B, E] -> combine weights [T, E], choice [T, E] (bool)."""
        probs, choice = super().routing(logits, padding_mask=padding_mask)
        # As megatron-core counts for its bias: not in validation, and once under recomputation, whose first
        # pass runs without gradients.
        if self.training and torch.is_grad_enabled():
            self.load += choice.sum(dim=0)
        return probs, choice


class PlainSigmoidRouter(CountingRouter):
    """Sigmoid scores used as they are as combine weights; megatron-core renormalises them when top_k > 1."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As CountingRouter.routing, with combine weight = scaling_factor * sigmoid(logit)."""
        probs, choice = super().routing(logits, padding_mask=padding_mask)
        if self.topk == 1:
            return probs, choice
        # Undo the division by the sum rather than start over: the auxiliary losses hang on the graph of `probs`.
        chosen = torch.sigmoid(logits.view(-1, logits.shape[-1]).float()) * choice
        return probs * chosen.sum(dim=-1, keepdim=True).type_as(probs), choice
