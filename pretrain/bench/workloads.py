"""What is measured: model and batch shapes, and the tokens they train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pretrain.config.schema import Config, ModelConfig
from pretrain.data.files import bin_path, idx_path

Precision = Literal["fp32", "bf16"]

DOCUMENT_TOKENS = 1024
ZIPF_EXPONENT = 1.2
"""Of token frequencies by rank; makes some tokens, and hence some experts, far more frequent, as text does."""
MORE_STEPS_THAN_ANYONE_RUNS = 1_000_000


@dataclass(frozen=True)
class Workload:
    """One shape: a model, and a step of one micro-batch."""

    name: str
    model: ModelConfig
    sequence_length: int
    micro_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.micro_batch_size

    def describe(self) -> str:
        """The shape in one line."""
        m = self.model
        return (
            f"hidden {m.hidden_size}, layers {m.num_layers}, heads {m.num_attention_heads}/{m.query_groups} x "
            f"{m.channels}, {m.num_experts} experts of {m.expert_ffn_size}, top {m.top_k}, vocabulary {m.vocab_size}; "
            f"{self.micro_batch_size} x {self.sequence_length} tokens a step"
        )


def _moe(**shape: Any) -> ModelConfig:
    """Qwen3-MoE's architecture: per-head norms on queries and keys, softmax over the chosen experts, no shared one.

    Without auxiliary losses, which its two implementations define differently.
    """
    return ModelConfig(qk_norm=True, norm_eps=1e-6, **shape)


SMALL = Workload(
    "small",
    _moe(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_attention_heads=4,
        num_query_groups=2,
        num_experts=16,
        top_k=2,
        expert_ffn_size=256,
    ),
    sequence_length=256,
    micro_batch_size=8,
)
MEDIUM = Workload(
    "medium",
    _moe(
        vocab_size=8192,
        hidden_size=512,
        num_layers=4,
        num_attention_heads=8,
        num_query_groups=4,
        num_experts=32,
        top_k=4,
        expert_ffn_size=256,
    ),
    sequence_length=512,
    micro_batch_size=2,
)
LARGE = Workload(
    "large",
    _moe(
        vocab_size=32768,
        hidden_size=1024,
        num_layers=6,
        num_attention_heads=16,
        num_query_groups=4,
        num_experts=64,
        top_k=8,
        expert_ffn_size=512,
    ),
    sequence_length=2048,
    micro_batch_size=4,
)


def workloads_for(device: torch.device) -> tuple[Workload, ...]:
    """The shapes that suit a device: on a GPU one that fills it, and one so small that launches limit it."""
    return (MEDIUM, LARGE) if device.type == "cuda" else (SMALL, MEDIUM)


def write_tokens(prefix: Path, *, vocab_size: int, tokens: int) -> None:
    """A Megatron dataset PREFIX of at least so many random tokens."""
    generator = np.random.default_rng(0)
    frequency = np.arange(1, vocab_size + 1) ** -ZIPF_EXPONENT
    documents = tokens // DOCUMENT_TOKENS + 1
    drawn = generator.choice(vocab_size, size=(documents, DOCUMENT_TOKENS), p=frequency / frequency.sum())
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    for document in drawn:
        builder.add_document(torch.from_numpy(document), [DOCUMENT_TOKENS])
    builder.finalize(str(idx_path(prefix)))


def run_config(workload: Workload, precision: Precision, folder: Path) -> Config:
    """A run of the workload on the dataset folder/tokens, with no more around its steps than the defaults."""
    return Config.model_validate(
        {
            "run": {"directory": folder / "run", "precision": precision},
            "model": workload.model.model_dump(),
            "data": {"train": [{"prefix": folder / "tokens"}]},
            "batch": {
                "sequence_length": workload.sequence_length,
                "global_batch_size": workload.micro_batch_size,
                "micro_batch_size": workload.micro_batch_size,
            },
            "budget": {"steps": MORE_STEPS_THAN_ANYONE_RUNS},
            # megatron-core decays embeddings.
            "optim": {"lr": 1e-4, "decay_embeddings": True},
            "schedule": {"kind": "constant"},
        }
    )
