"""The models and layouts of the equivalence tests, each combination a configuration with a name."""

from __future__ import annotations

import functools
from typing import Any

from pretrain.config.rules import check
from pretrain.config.schema import Config
from tests.helpers.configs import DENSE, MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import Outcome, train_all, train_alone

STEPS = 3

# Weights large enough for attention and routing to matter, and a step that changes them visibly. AdamW's eps is
# large because at 1e-8 an entry whose gradient is nothing but rounding still moves by a full learning rate.
COMMON: dict[str, Any] = {
    "model.init_std": 0.1,
    "batch.sequence_length": 16,
    "batch.global_batch_size": 4,
    "optim.lr": 1e-2,
    "optim.eps": 1e-3,
}

# Between them: every auxiliary loss, bias balancing, dense-first layers, shared experts, tied and untied tables,
# both optimizers, gradients reduced during the backward pass and after it, and all kinds of recomputation.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {
        "model.router": {
            "score_function": "sigmoid",
            "bias_update_rate": 1e-2,
            "aux_loss": 1e-1,
            "scaling_factor": 2.5,
        },
        # A whole pipeline stage without experts.
        "model.first_dense_layers": 2,
        "model.ffn_size": 48,
        "model.shared_expert_ffn_size": 24,
        "model.qk_norm": True,
        "model.head_dim": 12,
        "parallel.recompute": "full",
    },
    "softmax": {
        "model.router": {"aux_loss": 5e-2, "sequence_aux_loss": 1e-1, "z_loss": 1e-2},
        "model.tie_embeddings": True,
        "batch.micro_batch_size": 2,
        "batch.global_batch_size": 8,
        "optim.kind": "muon",
        "parallel.overlap_grad_reduce": False,
    },
    "plain sigmoid": {
        "model.router": {
            "score_function": "sigmoid",
            "normalize_top_k": False,
            "num_groups": 4,
            "group_top_k": 2,
            "z_loss": 1e-2,
        },
        "model.tie_embeddings": True,
        "model.first_dense_layers": 1,
        "model.ffn_size": 48,
        "parallel.recompute": "selective",
    },
    # Its running mean over micro-batches depends on how many are seen at once: for layouts without data parallelism.
    "global": {"model.router.global_aux_loss": 1e-1},
    "dense": {"model.qk_norm": True, "optim.kind": "muon", "parallel.recompute": "selective"},
}

# Name -> processes, layout. Data parallelism takes the processes that are left.
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "single": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 interleaved": (2, {"pipeline": 2, "pipeline_chunks": 2}),
    "EP2": (2, {"expert": 2}),
    "ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "EP2 in TP2": (2, {"tensor": 2, "expert": 2}),
    "EP4": (4, {"expert": 4}),
    "EP2xDP2": (4, {"expert": 2}),
    "TP2xEP2": (4, {"tensor": 2, "expert": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "PP2xDP2": (4, {"pipeline": 2}),
    "ETP2xEP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "PP2xEP2 interleaved": (4, {"pipeline": 2, "pipeline_chunks": 2, "expert": 2}),
    "TP2xPP2xEP2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
}

WITHOUT_DATA_PARALLELISM = ("TP2", "PP2", "PP2 interleaved", "ETP2")
WITHOUT_EXPERTS = ("DP2", "TP2", "PP2", "PP2 interleaved", "TP2xDP2", "PP2xDP2")
MOE_KINDS = ("sigmoid", "softmax", "plain sigmoid")

PAIRS: list[tuple[str, str]] = [
    *((layout, kind) for layout in LAYOUTS if layout != "single" for kind in MOE_KINDS),
    *((layout, "global") for layout in WITHOUT_DATA_PARALLELISM),
    *((layout, "dense") for layout in WITHOUT_EXPERTS),
]


def configuration(layout: str, kind: str, **changes: Any) -> Config:
    """A valid configuration of the table; `changes` name sections: `run={"precision": "bf16"}`."""
    world_size, sizes = LAYOUTS[layout]
    keys = {**COMMON, **KINDS[kind], **{f"parallel.{key}": size for key, size in sizes.items()}}
    if layout == "single":
        # Equal to recomputed and overlapped is then part of what is compared.
        keys = {key: value for key, value in keys.items() if not key.startswith("parallel.")}
    keys |= {f"{section}.{key}": value for section, values in changes.items() for key, value in values.items()}
    config = make_config(DENSE if kind == "dense" else MOE, keys)
    assert check(config, world_size) == []
    return config


@functools.cache
def alone(kind: str) -> Outcome:
    """The outcome of one process, the yardstick."""
    return train_alone(configuration("single", kind), STEPS)


@functools.cache
def outcomes(world_size: int) -> dict[tuple[str, str], list[Outcome]]:
    """Every rank's outcome of each pair that runs on so many processes. The same ones train pair after pair."""
    cases = {pair: configuration(*pair) for pair in PAIRS if LAYOUTS[pair[0]][0] == world_size}
    ranks = run_ranks(train_all, world_size, cases, STEPS)
    return {pair: [rank[pair] for rank in ranks] for pair in cases}


def outcome(layout: str, kind: str) -> list[Outcome]:
    """Every rank's outcome of one pair."""
    return outcomes(LAYOUTS[layout][0])[layout, kind]
