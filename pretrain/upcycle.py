"""Sparse upcycling: a mixture of experts from a dense model, every expert a copy of the dense MLP.

After Komatsuzaki et al. (arXiv 2212.05055), with the options of SPES (arXiv 2602.11543) for what tells the experts
apart: noise on a share of their entries, and the router's first weights. Optimizer and training begin anew.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import CheckpointReader, Moment, read_state, write_checkpoint
from pretrain.checkpoint.pieces import (
    Progress,
    check_new,
    counted,
    cut,
    cut_experts,
    most_precise,
    sound_checkpoint,
)
from pretrain.checkpoint.verify import read_manifest
from pretrain.config.base import Fraction, NonNegativeFloat, Section
from pretrain.config.load import dump_config, load_config
from pretrain.config.ownership import trained_experts
from pretrain.config.schema import Config, ModelConfig
from pretrain.config.stages import stages
from pretrain.errors import ConfigError
from pretrain.model.initialise import draw_normal
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.transformer_config import compute_dtype
from pretrain.optim.routing import route
from pretrain.optim.states import split_state_key, state_key, states_of
from pretrain.run import NO_ROUNDS, TrainState, open_data, partial_keys
from pretrain.run_directory import CHECKPOINTS, CONFIG_FILE

# What the attention, norms and tables of both models have in common.
SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "qk_norm",
    "logit_scale",
    "norm_eps",
    "rope_theta",
)
# Keys where 0 stands for a value that follows from others, and the property that has it.
RESOLVED = {"num_query_groups": "query_groups", "head_dim": "channels"}

EMBEDDING = "embedding.word_embeddings.weight"

Extent = tuple[int, ...]


class UpcycleOptions(Section):
    """How the experts and the router start."""

    noise_std: NonNegativeFloat = 0.0
    """Standard deviation of the normal noise on entries of the experts' matrices (0: exact copies)."""
    noise_fraction: Fraction = 0.5
    """Share of the entries that get it."""
    router_std: NonNegativeFloat | None = None
    """Standard deviation of the router's weights (0: zeros; None: model.init_std, as in a new model)."""
    seed: int | None = None
    """Of noise and router (None: run.seed)."""


def upcycle(
    source: Path,
    config: Config,
    out: Path,
    options: UpcycleOptions,
    *,
    progress: Progress = lambda done, of: None,
) -> Path:
    """Make the first checkpoint of a run of `config`, a mixture of experts, from a checkpoint of a dense model.

    Args:
        source: a checkpoint, or a run directory, whose newest checkpoint is meant.
        out: run directory to be made, which holds the checkpoint and nothing else: training with `run.directory = out`
            starts from it. Of a run of several sites, it holds that of `decentral.site`: all sites get the same bytes,
            but states of their own experts alone.

    Returns:
        The checkpoint, of step 0. One box at a time is in memory, so that any size can be upcycled.

    Raises:
        CheckpointError, ConfigError, DataError: before anything is written.
    """
    directory = config.model_copy(update={"run": config.run.model_copy(update={"directory": out})}).site_directory
    check_new(directory)
    path = sound_checkpoint(source)
    trained = TrainState(**read_state(path))
    dense = stages(load_config(path / CONFIG_FILE))[len(trained.growths)].config.model
    problems = misfits(dense, config.model, where=str(path))
    if problems:
        raise ConfigError(problems)
    chosen = {"router_std": config.model.init_std, "seed": config.run.seed} | options.model_dump(exclude_none=True)
    options = UpcycleOptions.model_validate(chosen)
    state = _first_state(config)
    state.origin = {
        "upcycled_from": str(path.resolve()),
        "sha256": read_manifest(path).sha256,
        "step": trained.step,
        "tokens": trained.tokens,
        **options.model_dump(),
    }
    destination = directory / CHECKPOINTS / Moment(0).name
    with CheckpointReader(path) as reader:
        made = _Upcycled(dense, config, reader, options)
        boxes = list(made.boxes())
        destination.parent.mkdir(parents=True)
        write_checkpoint(
            destination,
            boxes,
            step=0,
            state=asdict(state),
            config_toml=dump_config(config),
            partial_keys=made.partial_keys,
            data_of=counted(made.data_of, boxes, progress),
        )
    return destination


def misfits(dense: ModelConfig, moe: ModelConfig, *, where: str) -> list[str]:
    """Why a mixture of experts cannot be made of a dense model, a line each. `where`: the dense model's checkpoint."""
    if dense.is_moe:
        return [f"{where}: has {dense.num_experts} experts a layer; give that of a dense model, or grow this one"]
    if not moe.is_moe:
        return ["model.num_experts = 0: a dense model; give the configuration of a mixture of experts"]
    problems = []
    for key in SHARED_KEYS:
        old, new = (getattr(model, RESOLVED.get(key, key)) for model in (dense, moe))
        if old != new:
            problems.append(f"model.{key} = {json.dumps(new)}: must be that of {where}; set {json.dumps(old)}")
    sizes = ["expert_ffn_size", *(["ffn_size"] if len(moe.moe_layers) < moe.num_layers else [])]
    for key in sizes:
        if getattr(moe, key) != dense.ffn_size:
            problems.append(
                f"model.{key} = {getattr(moe, key)}: must be model.ffn_size of {where}, whose MLP is copied; set "
                f"{dense.ffn_size}"
            )
    if moe.shared_expert_ffn_size:
        problems.append(
            f"model.shared_expert_ffn_size = {moe.shared_expert_ffn_size}: nothing in {where} makes shared experts; "
            "set 0"
        )
    if moe.tie_embeddings and not dense.tie_embeddings:
        problems.append(f"model.tie_embeddings = true: {where} has an output layer of its own; set false")
    return problems


def changes_function(model: ModelConfig, options: UpcycleOptions) -> list[str]:
    """Why the mixture of experts does not compute what the dense model does; nothing where it does, up to rounding.

    Copies of the MLP add up to it when their combine weights add up to 1.
    """
    router, reasons = model.router, []
    if not router.normalize_top_k:
        reasons.append("model.router.normalize_top_k = false")
    elif router.score_function == "sigmoid" and model.top_k == 1:
        reasons.append("a sigmoid score that is not normalised, as model.top_k = 1")
    if router.scaling_factor != 1.0:
        reasons.append(f"model.router.scaling_factor = {router.scaling_factor}")
    if options.noise_std and options.noise_fraction:
        reasons.append("noise")
    return reasons


def _first_state(config: Config) -> TrainState:
    """The state of a run that begins."""
    return TrainState(
        decentral=NO_ROUNDS if config.decentral else {},
        data_fingerprint=open_data(config)[0].fingerprint,
        rng=base64.b64encode(torch.Generator().manual_seed(config.run.seed).get_state().numpy().tobytes()).decode(),
        optimizer={"kind": config.optim.kind, "step": 0},
    )


class _Upcycled:
    """The tensors of the mixture of experts, made box by box from the dense checkpoint."""

    def __init__(self, dense: ModelConfig, config: Config, reader: CheckpointReader, options: UpcycleOptions) -> None:
        assert options.seed is not None
        assert options.router_std is not None
        self._config, self._reader, self._options = config, reader, options
        self._seed, self._router_std = options.seed, options.router_std
        self._stored = reader.tensors()
        self._dense = {tensor.key for tensor in logical_tensors(dense)}
        self._new = {tensor.key: tensor for tensor in logical_tensors(config.model)}
        self._trained = trained_experts(config)
        self.partial_keys = partial_keys(config, self._trained)
        """What the checkpoint has of some experts alone."""

    def boxes(self) -> Iterator[ShardedTensor]:
        """Every box of the checkpoint, without data."""
        dtype = compute_dtype(self._config.run.precision)
        for tensor in self._new.values():
            if not tensor.trainable:
                yield from cut(tensor, tensor.key, torch.float32)
                continue
            yield from cut(tensor, tensor.key, dtype)
            states = {state_key("master", tensor.key): tensor.shape} if dtype != torch.float32 else {}
            rule = route(tensor, self._config.optim).rule
            for state in states_of(tensor, rule, self._config.optim).values():
                states[state.tensor.key] = state.tensor.shape
            for key, shape in states.items():
                yield from cut_experts(key, shape, torch.float32, self._trained if key in self.partial_keys else None)

    def data_of(self, box: ShardedTensor) -> torch.Tensor:
        """The values of a box. Optimizer states begin at zero, and so do selection biases."""
        name, key = split_state_key(box.key)
        tensor, offset, shape = self._new[key], tuple(box.global_offset), tuple(box.local_shape)
        if name not in (None, "master") or not tensor.trainable:
            return torch.zeros(shape, dtype=box.dtype)
        if tensor.kind == "router":
            values = draw_normal(self._seed, f"upcycle/router/{key}", tensor.shape, offset, shape) * self._router_std
        elif tensor.is_expert:
            values = self._experts(tensor, offset, shape)
        else:
            # A table of its own where the dense model has one for both.
            values = self._read(key if key in self._dense else EMBEDDING, offset, shape)
        return values.to(box.dtype)

    def _experts(self, tensor: LogicalTensor, offset: Extent, shape: Extent) -> torch.Tensor:
        """Copies of a part of the dense MLP, one an expert, with noise of their own."""
        dense = self._read(tensor.key.replace(".mlp.experts.", ".mlp."), offset[1:], shape[1:])
        values = dense.expand(shape).clone()
        std, fraction = self._options.noise_std, self._options.noise_fraction
        if std and fraction:
            # One expert at a time, as much as the generator draws anyhow.
            for row in range(shape[0]):
                place = (tensor.shape, (offset[0] + row, *offset[1:]), (1, *shape[1:]))
                noise = draw_normal(self._seed, f"upcycle/noise/{tensor.key}", *place)
                # erf makes a normal number uniform in [-1, 1].
                uniform = torch.erf(draw_normal(self._seed, f"upcycle/chosen/{tensor.key}", *place) / math.sqrt(2))
                values[row] += torch.where(uniform <= 2 * fraction - 1, noise.mul_(std), 0.0)[0]
        return values

    def _read(self, key: str, offset: Extent, shape: Extent) -> torch.Tensor:
        """A part of a dense weight in fp32."""
        return self._reader.read(most_precise(self._stored, key), offset, shape).float()
