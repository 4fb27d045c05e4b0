"""Every configuration key, its type, its default and what it means.

Field names follow the field's own usage (Megatron, Hugging Face); units are in the names. A section is
frozen: a run never changes its configuration, it writes it down. Limits of a single value stand here;
rules that tie several keys together stand in `rules`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pretrain.config.base import (
    Count,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)
from pretrain.config.decentral import DecentralConfig
from pretrain.config.growth import GrowthConfig
from pretrain.config.optim import OptimConfig


class RouterConfig(Section):
    """How a token chooses its experts, and how the load over experts is kept even."""

    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Turns router logits into scores."""
    normalize_top_k: bool = True
    """Whether the combine weights of the selected experts sum to one. With softmax, true is softmax over the
    selected logits and false softmax over all experts; with sigmoid and top_k = 1, true changes nothing."""
    scaling_factor: PositiveFloat = 1.0
    """Factor on the combine weights after normalisation (DeepSeek-V3 uses 2.5)."""
    num_groups: Count = 0
    """Group-limited routing: experts form this many groups (0: off)."""
    group_top_k: Count = 0
    """Group-limited routing: groups a token may choose from."""
    aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss over each micro-batch (Switch Transformer, equation 4)."""
    sequence_aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss over each sequence."""
    global_aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss over the global batch, as far as it has been seen: each micro-batch meets
    the mean load of those before it and of those beside it on other data-parallel ranks."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss (ST-MoE, equation 5)."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Auxiliary-loss-free balancing: step of the selection bias per optimizer step (0: no bias). Needs sigmoid."""


class ModelConfig(Section):
    """Shape of the decoder: pre-norm, RMSNorm, RoPE, SwiGLU, no biases."""

    vocab_size: PositiveInt
    """Rows of the embedding table. At least the tokenizer's vocabulary; a multiple of the tensor-parallel size."""
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: Count = 0
    """Key/value heads (0: as many as attention heads)."""
    head_dim: Count = 0
    """Channels per head (0: hidden_size / num_attention_heads). Need not divide hidden_size."""
    ffn_size: Count = 0
    """Intermediate size of dense layers; needed when the model has any."""
    qk_norm: bool = False
    """RMSNorm per head on queries and keys."""
    tie_embeddings: bool = False
    """One table for input embedding and output layer."""
    logit_scale: PositiveFloat = 1.0
    """Factor on the logits. Growing the hidden size of a model with tied embeddings changes it."""
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get it divided by
    sqrt(2 * num_layers) (GPT-2, Megatron)."""

    num_experts: Count = 0
    """Routed experts per layer (0: a dense model)."""
    top_k: Count = 0
    """Experts per token."""
    expert_ffn_size: Count = 0
    """Intermediate size of one routed expert."""
    shared_expert_ffn_size: Count = 0
    """Intermediate size of the shared expert every token passes (0: none)."""
    first_dense_layers: Count = 0
    """Leading layers that are dense, with ffn_size."""
    dense_layers: tuple[Count, ...] = ()
    """Further dense layers, by their number from 0: stacking a model that begins with dense layers makes some."""
    router: RouterConfig = RouterConfig()

    backend: Literal["auto", "native", "transformer_engine"] = "auto"
    """Layer implementations: our own, Transformer Engine's, or the latter where it is installed and there is a GPU."""
    experts_backend: Literal["auto", "triton", "grouped_mm", "loop"] = "auto"
    """How our own layers multiply routed experts: Triton kernels (NVIDIA GPUs, bf16), torch's grouped_mm, one expert
    after the other, or the first of these that takes the device, precision and widths."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def channels(self) -> int:
        """Channels per attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, has routed experts."""
        return self.is_moe and layer >= self.first_dense_layers and layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with routed experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))


class DataSource(Section):
    """One component of a blend: a Megatron dataset, given as PREFIX for PREFIX.bin and PREFIX.idx."""

    prefix: Path
    weight: PositiveFloat = 1.0
    """Share of samples drawn from this source, relative to the other sources."""


class DataConfig(Section):
    """Where tokens come from. Paths are relative to the working directory."""

    train: tuple[DataSource, ...] = ()
    valid: tuple[DataSource, ...] = ()
    tokenizer: Path | None = None
    """`tokenizer.json` the datasets were made with; its fingerprint is checked against theirs."""


class BatchConfig(Section):
    """How many tokens make an optimizer step, and how they are cut up."""

    sequence_length: PositiveInt
    """Tokens per sequence."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all data-parallel ranks of all sites."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass on one rank."""

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.global_batch_size


class BudgetConfig(Section):
    """How long to train: exactly one of the two."""

    tokens: Count = 0
    steps: Count = 0


class ScheduleConfig(Section):
    """Learning rate over the budget: linear warm-up, then `kind`."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    min_lr_ratio: Fraction = 0.1
    """Final learning rate over peak."""
    decay_fraction: Fraction = 0.2
    """wsd: last share of the budget, in which the rate falls."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """wsd: shape of that fall (`sqrt`: 1 - sqrt)."""


class ParallelConfig(Section):
    """Sizes of the parallel layout. Data parallelism takes what is left of the world size."""

    tensor: PositiveInt = 1
    """Tensor parallel size; above 1, sequence parallelism is on, too."""
    pipeline: PositiveInt = 1
    pipeline_chunks: PositiveInt = 1
    """Model chunks per pipeline rank; above 1 the interleaved schedule is used."""
    context: PositiveInt = 1
    """Context parallel size. Needs Transformer Engine."""
    expert: PositiveInt = 1
    """Expert parallel size: the routed experts are spread over this many ranks."""
    expert_tensor: PositiveInt = 1
    """Tensor parallel size inside an expert."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of attention and experts, or all."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass goes on."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: Count = 0
    """Save at every so many steps (0: only at the end and when stopped)."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_every_steps: Count = 0
    """Checkpoints at multiples of this are never removed (0: none)."""
    asynchronous: bool = False
    """Write in the background while training goes on."""


class EvalConfig(Section):
    """Validation during training."""

    every_steps: Count = 0
    """Validate at every so many steps, and at the end (0: never)."""
    batches: PositiveInt = 8
    """Global batches per validation, always the same ones."""


class MetricsConfig(Section):
    """What is logged, and where."""

    log_every_steps: PositiveInt = 1
    """Rows in metrics.jsonl; the progress line is always live."""
    wandb: bool = False
    """Log to Weights & Biases; offline when WANDB_API_KEY is not set."""
    wandb_project: str = "meristem"
    peak_tflops: NonNegativeFloat = 0.0
    """Peak rate of one device in TFLOP/s; when given, the model FLOP utilisation is logged."""


class RunConfig(Section):
    """Identity of the run: its folder, seed and precision."""

    directory: Path
    """Run directory: configuration, manifest, metrics, events, checkpoints and reports of one run."""
    seed: int = 1234
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 computes in bfloat16 with fp32 master weights, gradients and optimizer state."""


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig = DataConfig()
    batch: BatchConfig
    budget: BudgetConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    growth: tuple[GrowthConfig, ...] = ()
    decentral: DecentralConfig | None = None
    """Several sites train this run together; without it, one does."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the budget; a token budget is rounded up to whole steps."""
        return self.budget.steps or -(-self.budget.tokens // self.batch.tokens_per_step)

    @property
    def sites(self) -> int:
        """Sites that train this run together."""
        return self.decentral.sites if self.decentral else 1

    @property
    def site_tokens_per_step(self) -> int:
        """Tokens of an optimizer step that this process's site trains on."""
        return self.batch.tokens_per_step // self.sites

    @property
    def site_directory(self) -> Path:
        """Where this process's site keeps its run: a folder of its own in the run directory, if there are sites."""
        return self.run.directory / f"site_{self.decentral.site}" if self.decentral else self.run.directory
