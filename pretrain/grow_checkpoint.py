"""Growing a checkpoint where it lies, without a job: the same maps as in a run, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import CheckpointReader, Moment, read_state, write_checkpoint
from pretrain.checkpoint.pieces import SHAPING, Progress, check_new, counted, cut, most_precise, sound_checkpoint
from pretrain.config.load import changed_keys, dump_config, load_config
from pretrain.config.optim import OptimConfig
from pretrain.config.schema import Config
from pretrain.config.stages import growth_step, stages
from pretrain.errors import CheckpointError, ConfigError
from pretrain.growth.history import check_history, growth_figures, next_growth, record_of
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.transplant import fill_new, measured_tensors, requests, target_of
from pretrain.growth.values import Part, measure
from pretrain.model.logical import logical_tensors
from pretrain.optim.routing import route
from pretrain.optim.states import split_state_key, state_key, states_of
from pretrain.run import TrainState
from pretrain.run_directory import CHECKPOINTS, CONFIG_FILE

# Noise of a smaller share of the standard deviation is mostly lost in bf16: at 0.001, 78 % of the entries round back.
SMALLEST_BF16_NOISE = 0.003


def grow_checkpoint(source: Path, config: Config, out: Path, *, progress: Progress = lambda done, of: None) -> Path:
    """Grow a checkpoint by the configuration's growth point of its step.

    Args:
        source: a checkpoint, or a run directory, whose newest checkpoint is meant.
        config: with the growth point; its model and optimizer are those of the checkpoint.
        out: run directory to be made, which holds the grown checkpoint and nothing else: training with
            `run.directory = out` goes on from it.

    Returns:
        The grown checkpoint. One box at a time is in memory, so that any size can be grown.

    Raises:
        CheckpointError, ConfigError: before anything is written.
    """
    check_new(out)
    path = sound_checkpoint(source)
    state = TrainState(**read_state(path))
    with CheckpointReader(path) as reader:
        point = _point(path, config, state)
        grown = _Grown(point, reader, optim=config.optim, seed=config.run.seed)
        figures = growth_figures(point, sequence_length=config.batch.sequence_length)
        state.growths.append({**record_of(point, state.step), "figures": figures})
        state.scores = {}
        if point.config.optimizer_state == "reset" and state.optimizer:
            state.optimizer["step"] = 0
        destination = out / CHECKPOINTS / Moment(state.step, grown=True).name
        destination.parent.mkdir(parents=True)
        boxes = list(grown.boxes())
        write_checkpoint(
            destination,
            boxes,
            step=state.step,
            state=asdict(state),
            config_toml=dump_config(config),
            data_of=counted(grown.data_of, boxes, progress),
        )
    return destination


def _point(path: Path, config: Config, state: TrainState) -> GrowthPoint:
    """The growth that `config` has for this checkpoint."""
    check_history(config, state.growths, step=state.step, scores=state.scores, where=str(path))
    done = len(state.growths)
    if done == len(config.growth):
        raise ConfigError([f"growth: {path} has been through all {done} points; add one at_step = {state.step}"])
    due = growth_step(config, config.growth[done])
    if due != state.step:
        raise ConfigError(
            [f"growth[{done}]: due at step {due}, but {path} is at step {state.step}; give a checkpoint of step {due}"]
        )
    own = load_config(path / CONFIG_FILE)
    changed = changed_keys(stages(own)[done].config, stages(config)[done].config)
    differing = [change for change in changed if change.startswith(SHAPING)]
    if differing:
        raise ConfigError([f"{change}: not what {path} was trained with; restore it" for change in differing])
    return next_growth(config, done, scores=state.scores)


class _Grown:
    """The grown model's tensors, made box by box from the old checkpoint."""

    def __init__(self, point: GrowthPoint, reader: CheckpointReader, *, optim: OptimConfig, seed: int) -> None:
        self._point, self._reader, self._optim, self._seed = point, reader, optim, seed
        self._stored = reader.tensors()
        self._new = {tensor.key: tensor for tensor in logical_tensors(point.after)}
        self._check()
        self._figures = measure(measured_tensors(point), self._parts)

    def boxes(self) -> Iterator[ShardedTensor]:
        """Every box of the grown checkpoint, without data."""
        has_states = any(split_state_key(key)[0] not in (None, "master") for key in self._stored)
        for tensor in self._new.values():
            source = self._point.tensor_map(tensor).source.key
            for name in (None, "master"):
                if state_key(name, source) in self._stored:
                    yield from cut(tensor, state_key(name, tensor.key), self._stored[state_key(name, source)][0])
            if has_states and tensor.trainable:
                rule = route(tensor, self._optim).rule
                for state in states_of(tensor, rule, self._optim).values():
                    yield from cut(state.tensor, state.tensor.key, torch.float32)

    def data_of(self, box: ShardedTensor) -> torch.Tensor:
        """The values of a box."""
        name, key = split_state_key(box.key)
        is_weight = name in (None, "master")
        values = torch.zeros(box.local_shape, dtype=torch.float32)
        offset = tuple(box.global_offset)
        target = target_of(self._point, self._new[key], None if is_weight else name, offset, values, self._optim)
        if target:
            for wanted in requests(self._point, target):
                read = most_precise(self._stored, wanted.key) if is_weight else wanted.key
                wanted.place(wanted.offset, self._reader.read(read, wanted.offset, wanted.shape))
            fill_new(self._point, [target], figures=self._figures, seed=self._seed)
        return values.to(box.dtype)

    def _check(self) -> None:
        where = self._reader.directory
        for key in self._stored:
            if split_state_key(key)[1] not in self._point.old_tensors:
                raise CheckpointError(f"{where}: {key} is no tensor of the model, so it has no rule for growing")
        experts = self._point.config.experts
        coarse = any(
            self._stored[most_precise(self._stored, key)][0] != torch.float32 for key in self._point.old_tensors
        )
        if coarse and experts and 0 < experts.noise < SMALLEST_BF16_NOISE:
            raise ConfigError(
                [
                    f"growth[{self._point.number - 1}].experts.noise = {experts.noise}: is lost in rounding, as "
                    f"{where} has no fp32 weights; use {SMALLEST_BF16_NOISE} or more, or 0"
                ]
            )

    def _parts(self) -> Iterator[Part]:
        for tensor in measured_tensors(self._point):
            for box in cut(tensor, tensor.key, torch.float32):
                offset = tuple(box.global_offset)
                yield Part(
                    tensor, offset, self._reader.read(most_precise(self._stored, tensor.key), offset, box.local_shape)
                )
