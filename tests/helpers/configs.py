"""Small configurations for tests, changed by dotted keys."""

from __future__ import annotations

import copy
from typing import Any

from pretrain.config.schema import Config

DENSE: dict[str, Any] = {
    "run": {"directory": "runs/test", "precision": "fp32"},
    "model": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_size": 64,
    },
    "batch": {"sequence_length": 32, "global_batch_size": 8},
    "budget": {"steps": 10},
}

MOE: dict[str, Any] = {
    **DENSE,
    "model": {
        **{key: value for key, value in DENSE["model"].items() if key != "ffn_size"},
        "num_experts": 8,
        "top_k": 2,
        "expert_ffn_size": 16,
    },
}


def make_config(start: dict[str, Any], changes: dict[str, Any] | None = None) -> Config:
    """`start` with the values of dotted keys, such as {"model.top_k": 4}, put in."""
    raw = copy.deepcopy(start)
    for dotted, value in (changes or {}).items():
        *sections, key = dotted.split(".")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return Config.model_validate(raw)
