"""Growing a checkpoint where it lies, without a job: the same maps as in a run, to the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import CheckpointReader, Moment, read_state, verify_checkpoint, write_checkpoint
from pretrain.checkpoint.steps import list_moments
from pretrain.config.load import changed_keys, dump_config, load_config
from pretrain.config.optim import OptimConfig
from pretrain.config.schema import Config
from pretrain.config.stages import growth_step, stages
from pretrain.errors import CheckpointError, ConfigError
from pretrain.growth.history import check_history, growth_figures, next_growth, record_of
from pretrain.growth.maps import GrowthPoint
from pretrain.growth.transplant import fill_new, measured_tensors, requests, target_of
from pretrain.growth.values import Part, measure
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.routing import route
from pretrain.optim.states import split_state_key, state_key, states_of
from pretrain.run import TrainState
from pretrain.run_directory import CHECKPOINTS, CONFIG_FILE

# Entries of a box that is made and written as one.
BOX_ENTRIES = 1 << 26

# Keys that decide which tensors a checkpoint has.
SHAPING = ("model.", "optim.kind", "optim.routes", "optim.soap.block_size", "optim.kron.block_size")

# Noise of a smaller share of the standard deviation is mostly lost in bf16: at 0.001, 78 % of the entries round back.
SMALLEST_BF16_NOISE = 0.003

Progress = Callable[[int, int], None]
"""Called with the number of entries done and of all."""


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
    path = _checkpoint_in(source)
    if (out / CHECKPOINTS).exists():
        raise CheckpointError(f"{out}: has checkpoints already; give a new folder")
    findings = verify_checkpoint(path)
    if findings:
        raise CheckpointError(f"{path}: damaged ({'; '.join(findings[:3])}); give another checkpoint")
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
            data_of=_counted(grown.data_of, boxes, progress),
        )
    return destination


def _checkpoint_in(source: Path) -> Path:
    """The checkpoint that is meant: `source` itself, or the newest of a run directory."""
    found = list_moments(source / CHECKPOINTS)
    if found:
        return list(found.values())[-1]
    if not (source / "manifest.json").exists():
        raise CheckpointError(f"{source}: neither a checkpoint nor a run directory with one; check the path")
    return source


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
                    yield from _cut(tensor, state_key(name, tensor.key), self._stored[state_key(name, source)][0])
            if has_states and tensor.trainable:
                rule = route(tensor, self._optim).rule
                for state in states_of(tensor, rule, self._optim).values():
                    yield from _cut(state.tensor, state.tensor.key, torch.float32)

    def data_of(self, box: ShardedTensor) -> torch.Tensor:
        """The values of a box."""
        name, key = split_state_key(box.key)
        is_weight = name in (None, "master")
        values = torch.zeros(box.local_shape, dtype=torch.float32)
        offset = tuple(box.global_offset)
        target = target_of(self._point, self._new[key], None if is_weight else name, offset, values, self._optim)
        if target:
            for wanted in requests(self._point, target):
                read = self._weights_of(wanted.key) if is_weight else wanted.key
                wanted.place(wanted.offset, self._reader.read(read, wanted.offset, wanted.shape))
            fill_new(self._point, [target], figures=self._figures, seed=self._seed)
        return values.to(box.dtype)

    def _check(self) -> None:
        where = self._reader.directory
        for key in self._stored:
            if split_state_key(key)[1] not in self._point.old_tensors:
                raise CheckpointError(f"{where}: {key} is no tensor of the model, so it has no rule for growing")
        experts = self._point.config.experts
        coarse = any(self._stored[self._weights_of(key)][0] != torch.float32 for key in self._point.old_tensors)
        if coarse and experts and 0 < experts.noise < SMALLEST_BF16_NOISE:
            raise ConfigError(
                [
                    f"growth[{self._point.number - 1}].experts.noise = {experts.noise}: is lost in rounding, as "
                    f"{where} has no fp32 weights; use {SMALLEST_BF16_NOISE} or more, or 0"
                ]
            )

    def _weights_of(self, key: str) -> str:
        """Where the most precise weights of a tensor are stored."""
        master = state_key("master", key)
        return master if master in self._stored else key

    def _parts(self) -> Iterator[Part]:
        for tensor in measured_tensors(self._point):
            for box in _cut(tensor, tensor.key, torch.float32):
                offset = tuple(box.global_offset)
                yield Part(tensor, offset, self._reader.read(self._weights_of(tensor.key), offset, box.local_shape))


def _cut(tensor: LogicalTensor, key: str, dtype: torch.dtype) -> Iterator[ShardedTensor]:
    """A tensor in boxes of about BOX_ENTRIES along its first axis, on the meta device."""
    rows = max(1, BOX_ENTRIES // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], rows):
        shape = (min(rows, tensor.shape[0] - start), *tensor.shape[1:])
        offset = (start, *[0] * (len(shape) - 1))
        data = torch.empty(shape, dtype=dtype, device="meta")
        yield ShardedTensor(key, data, dtype, shape, tensor.shape, offset, None, (0, 0, 0))


def _counted(
    data_of: Callable[[ShardedTensor], torch.Tensor], boxes: Sequence[ShardedTensor], progress: Progress
) -> Callable[[ShardedTensor], torch.Tensor]:
    """`data_of`, telling of its progress."""
    total, done = sum(math.prod(box.local_shape) for box in boxes), 0

    def counted(box: ShardedTensor) -> torch.Tensor:
        nonlocal done
        values = data_of(box)
        done += values.numel()
        progress(done, total)
        return values

    return counted
