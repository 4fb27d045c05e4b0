"""The model as it trains on this rank: megatron-core's DDP-wrapped chunks, and a pass over one global batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank

from pretrain.config.schema import BatchConfig, Config
from pretrain.model.build import build_chunks
from pretrain.model.initialise import initialise
from pretrain.model.shards import Shard, collect_shards
from pretrain.model.stacked_weight import StackedWeight
from pretrain.parallel.mesh import Mesh

Batch = Mapping[str, torch.Tensor]


@dataclass
class Engine:
    """This rank's part of the model, ready to train."""

    chunks: list[GPTModel]
    """Bare chunks, in pipeline order."""
    wrapped: list[DistributedDataParallel]
    shards: list[Shard]
    mesh: Mesh
    batch: BatchConfig
    sites: int = 1
    """How many share a global batch; this is one of them."""
    trained: Collection[int] | None = None
    """The experts of each layer that train here; None: all."""

    @property
    def microbatches(self) -> int:
        """Forward passes per rank and optimizer step."""
        return self.batch.global_batch_size // (self.batch.micro_batch_size * self.mesh.data_size * self.sites)

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()

    def forward_backward(self, microbatches: Iterator[Batch]) -> torch.Tensor:
        """Mean loss over a global batch (with several sites, this one's part), its gradients left in the `main_grad` of
        every parameter that trains, reduced over all ranks.

        Args:
            microbatches: this rank's micro-batches: tokens and labels [B, S].

        Returns:
            Loss in nats per token, fp32 scalar, the same on every rank.
        """
        self.zero_grad()
        return self._run(microbatches, self.microbatches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterator[Batch], count: int) -> torch.Tensor:
        """Mean loss over `count` micro-batches per rank, without touching gradients or router statistics."""
        for chunk in self.wrapped:
            chunk.eval()
        loss = self._run(microbatches, count, forward_only=True)
        for chunk in self.wrapped:
            chunk.train()
        return loss

    @torch.no_grad()
    def logits(self, microbatch: Batch, positions: int) -> torch.Tensor:
        """Logits [B, positions, V] in fp32 of the first positions of one micro-batch, the same on every rank.

        The batch must be the same on all ranks, and `positions` at most a half of one context-parallel part.
        """
        for chunk in self.wrapped:
            chunk.eval()
        # The interleaved schedule takes as many micro-batches as there are stages.
        count = self.mesh.config.pipeline if len(self.wrapped) > 1 else 1
        outputs = self._schedule(
            iter([microbatch] * count), count, partial(_logits_step, positions=positions), collect_non_loss_data=True
        )
        for chunk in self.wrapped:
            chunk.train()
        B, V = len(microbatch["tokens"]), self.vocab_size
        whole = torch.empty(B, positions, V, device=self.mesh.device)
        groups = self.mesh.groups
        if outputs:
            parts = [torch.empty_like(outputs[0]) for _ in range(groups.tp.size())]
            dist.all_gather(parts, outputs[0].contiguous(), group=groups.tp)
            whole = torch.cat(parts, dim=-1)
        is_source = bool(outputs) and groups.tp.rank() == groups.dp_cp.rank() == 0
        source = torch.tensor(self.mesh.rank if is_source else -1, device=self.mesh.device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX)
        dist.broadcast(whole, src=int(source))
        return whole

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer over all ranks."""
        return self.chunks[0].vocab_size

    def _run(self, microbatches: Iterator[Batch], count: int, *, forward_only: bool) -> torch.Tensor:
        outputs = self._schedule(microbatches, count, _forward_step, forward_only=forward_only)
        return self._mean_loss([output["loss"] for output in outputs])

    def _schedule(
        self,
        microbatches: Iterator[Batch],
        count: int,
        step: Callable[..., tuple[torch.Tensor, Callable[..., Any]]],
        *,
        forward_only: bool = True,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """megatron-core's schedule over `count` micro-batches -> what the last stage's `step` left of each."""
        data: Iterator[Batch] | list[Iterator[Batch]] = microbatches
        if len(self.wrapped) > 1:
            # Every chunk of the interleaved schedule walks the same micro-batches at its own pace.
            loaded = list(microbatches)
            data = [iter(loaded) for _ in self.wrapped]
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(step, context=self.mesh.groups.cp),
            data_iterator=data,
            model=self.wrapped,
            num_microbatches=count,
            seq_length=self.batch.sequence_length,
            micro_batch_size=self.batch.micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )
        return outputs

    def _mean_loss(self, losses: list[torch.Tensor]) -> torch.Tensor:
        groups = self.mesh.groups
        total = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        if losses:
            total = torch.stack(losses).double().mean().float()
            dist.all_reduce(total, group=groups.dp_cp)
            total /= groups.dp_cp.size()
        # Only the last stage has losses; adding zeros spreads them.
        dist.all_reduce(total, group=groups.pp)
        return total


def build_engine(
    config: Config,
    mesh: Mesh,
    *,
    fill: Callable[[list[Shard]], None] | None = None,
    trained: Collection[int] | None = None,
) -> Engine:
    """Build and wrap this rank's chunks.

    `fill` gives the weights and biases their values (default: the initial ones). Gradients get their memory after it.
    `trained`: the experts of each layer, by number, that train here; None: all. The others have weights and nothing
    else.
    """
    chunks = build_chunks(
        config.model,
        parallel=config.parallel,
        precision=config.run.precision,
        sequence_length=config.batch.sequence_length,
        groups=mesh.groups,
        trained=trained,
    )
    megatron = chunks[0].config
    modules: list[torch.nn.Module] = [chunk.to(mesh.device) for chunk in chunks]
    if megatron.bf16:
        modules = [Float16Module(megatron, module) for module in modules]
    shards = collect_shards(chunks, config.model, mesh.groups)
    if fill:
        fill(shards)
    else:
        initialise(shards, config.model, config.run.seed)
    wrapped = [
        DistributedDataParallel(
            megatron,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce and mesh.groups.dp_cp.size() > 1,
                use_distributed_optimizer=False,
            ),
            module,
            # Overlap matters on the first chunk, whose backward comes last; megatron-core's own trainer does the same.
            disable_bucketing=index > 0,
            pg_collection=mesh.groups,
        )
        for index, module in enumerate(modules)
    ]
    for module in (module for chunk in wrapped for module in chunk.modules()):
        if isinstance(module, StackedWeight):
            module.check_views()
    megatron.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return Engine(chunks, wrapped, shards, mesh, config.batch, config.sites, trained)


def _forward_step(
    microbatches: Iterator[Batch], chunk: torch.nn.Module, *, context: dist.ProcessGroup
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
    """megatron-core's forward step: losses [B, S] of a micro-batch and the function that averages them.

    Ranks of the context-parallel group each take their part of every sequence.
    """
    batch = _context_part(next(microbatches), context)
    losses = chunk(batch["tokens"], batch["positions"], None, labels=batch["labels"])
    return losses, partial(_mean_of, context_size=context.size())


def _logits_step(
    microbatches: Iterator[Batch], chunk: torch.nn.Module, *, context: dist.ProcessGroup, positions: int
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """megatron-core's forward step: this rank's logits [B, S, V] and the function that keeps the first of them."""
    batch = _context_part(next(microbatches), context)
    logits = chunk(batch["tokens"], batch["positions"], None)
    return logits, lambda output, non_loss_data: output[:, :positions].float()


def _context_part(microbatch: Batch, context: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """This rank's part of every sequence, with the positions of its tokens."""
    tokens = microbatch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return get_batch_on_this_cp_rank({**microbatch, "positions": positions}, cp_group=context)


def _mean_of(losses: torch.Tensor, *, context_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss to differentiate, and the one to report. megatron-core's schedule multiplies the former by the context
    size, for losses that are this rank's share of a sum over the group; ours is a mean of its own."""
    loss = losses.float().mean()
    return loss / context_size, {"loss": loss.detach().clone()}
