"""Transformer Engine's layers through megatron-core's own provider; the one file that needs TE.

TE fuses a norm into the projection after it and keeps one parameter per expert; `TE_NAMES` says which logical
tensor such a parameter is.
"""

from __future__ import annotations

import importlib.util

from megatron.core.models.backends import BackendSpecProvider

from pretrain.errors import ConfigError

# Suffix of TE's name -> suffix of the logical key.
TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.experts.experts.linear_fc1.weight": "mlp.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight": "mlp.experts.linear_fc2.weight",
}


def is_available() -> bool:
    """Whether Transformer Engine can be imported here."""
    return importlib.util.find_spec("transformer_engine") is not None


def backend() -> BackendSpecProvider:
    """megatron-core's provider of TE modules; a ConfigError where TE is missing."""
    if not is_available():
        raise ConfigError(
            ['model.backend = "transformer_engine": not installed here; pip install "meristem[cuda]" or use "native"']
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: PLC0415

    return TESpecProvider()
