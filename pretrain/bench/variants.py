"""The training steps that are compared. Each starts from the same weights and walks the same batches.

All do forward and backward pass, clipping to the same norm and AdamW with the same constants; all keep fp32 master
weights when they compute in bf16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from pretrain.config.schema import Config
from pretrain.metrics.throughput import RunClock
from pretrain.model.transformer_config import transformer_config
from pretrain.parallel.engine import Batch, build_engine
from pretrain.parallel.mesh import Mesh, Meshes
from pretrain.restore import restore_or_build
from pretrain.train import train_step

OURS = "pretrain train"
BARE = "bare megatron-core loop"
STOCK = "megatron-core, its own layers"
TRANSFORMERS = "transformers Qwen3-MoE"

Step = Callable[[], float]
"""Trains on the next batch; returns its loss in nats per token."""
Weights = Mapping[str, torch.Tensor]
"""Initial value of every logical tensor (see `pretrain.model.logical`)."""


def initial_weights(config: Config, mesh: Mesh) -> Weights:
    """What every variant starts from: copies, in the precision of the run."""
    return {shard.key: shard.view().detach().clone() for shard in build_engine(config, mesh).shards}


@contextmanager
def ours(config: Config, mesh: Mesh) -> Iterator[Step]:
    """The step of `pretrain train`: reads its own data, logs, writes rows."""
    clock = RunClock()
    with restore_or_build(config, Meshes(mesh.device, mesh), clock) as (run, state):
        clock.begin_steps()
        yield lambda: train_step(run, state)


def bare_megatron(config: Config, mesh: Mesh, batches: Iterator[Batch]) -> Step:
    """megatron-core's schedule and optimizer around the model that we train, and nothing else."""
    return _megatron_loop(build_engine(config, mesh).wrapped, config, batches)


def stock_megatron(config: Config, mesh: Mesh, batches: Iterator[Batch], weights: Weights) -> Step:
    """The same loop around megatron-core's own layers, which it uses where Transformer Engine is missing."""
    # Its grouped experts need Transformer Engine.
    megatron = replace(transformer_config(config.model, config.parallel, config.run.precision), moe_grouped_gemm=False)
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            megatron, use_transformer_engine=False, normalization="RMSNorm"
        ),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.batch.sequence_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        pg_collection=mesh.groups,
    ).to(mesh.device)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            # Each expert is a module of its own there.
            whole, expert = re.subn(r"local_experts\.(\d+)\.", "", name)
            value = weights[whole]
            if expert:
                value = value[int(re.findall(r"local_experts\.(\d+)\.", name)[0])]
            parameter.copy_(value.reshape(parameter.shape))
    module = Float16Module(megatron, gpt) if megatron.bf16 else gpt
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(megatron, settings, module, pg_collection=mesh.groups)
    megatron.finalize_model_grads_func = finalize_model_grads
    return _megatron_loop([wrapped], config, batches)


def _megatron_loop(wrapped: list[DistributedDataParallel], config: Config, batches: Iterator[Batch]) -> Step:
    """The training step of megatron-core's examples."""
    optim, batch = config.optim, config.batch
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.run.precision == "bf16",
    )
    optimizer = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False)
    # It also keeps weight decay from norms.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr,
        max_lr=optim.lr,
        min_lr=optim.lr,
        lr_warmup_steps=0,
        lr_decay_steps=config.total_steps,
        lr_decay_style="constant",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.total_steps,
        wd_incr_style="constant",
    )
    forward_backward = get_forward_backward_func()

    def step() -> float:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        (output,) = forward_backward(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=wrapped,
            num_microbatches=1,
            seq_length=batch.sequence_length,
            micro_batch_size=batch.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(increment=1)
        return float(output["loss"])

    return step


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    batch = next(batches)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return model(tokens, positions, None, labels=batch["labels"]), mean
