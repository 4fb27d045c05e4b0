"""Small datasets and configurations for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.config.schema import Config
from pretrain.data.prepare import PrepareOptions, prepare

VOCAB_SIZE = 320


def make_corpus(folder: Path) -> Path:
    """A few hundred lines of text as a prepared dataset; returns its folder (train, valid, tokenizer.json)."""
    text = folder / "text"
    text.mkdir(parents=True)
    for module in range(12):
        lines = [f"def function_{module}_{n}(x): return x * {n % 7} + {module}" for n in range(60)]
        (text / f"module_{module}.py").write_text("\n".join(lines))
    prepare(PrepareOptions(inputs=(str(text),), output=folder / "data", vocab_size=VOCAB_SIZE, valid_fraction=0.2))
    return folder / "data"


def tiny_config(corpus: Path, directory: Path, **sections: dict[str, Any]) -> Config:
    """A two-layer MoE that trains in seconds; `sections` are merged into the defaults, key by key."""
    values: dict[str, Any] = {
        "run": {"directory": str(directory), "precision": "fp32", "seed": 7},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 16,
            "qk_norm": True,
            "num_experts": 4,
            "top_k": 2,
            "expert_ffn_size": 32,
            "router": {"score_function": "sigmoid", "bias_update_rate": 1e-3, "aux_loss": 1e-2},
        },
        "data": {
            "train": [{"prefix": str(corpus / "train")}],
            "valid": [{"prefix": str(corpus / "valid")}],
            "tokenizer": str(corpus / "tokenizer.json"),
        },
        "batch": {"sequence_length": 32, "global_batch_size": 8, "micro_batch_size": 2},
        "budget": {"steps": 6},
        "optim": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 10},
        "eval": {"every_steps": 3, "batches": 2},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return Config.model_validate(values)


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` of one kind."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    """The events of a run with a name."""
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == name]
