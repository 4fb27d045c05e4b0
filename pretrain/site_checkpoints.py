"""One checkpoint out of those of all sites, and the other way round, where they lie and in bounded memory.

**Join.** After a synchronisation the sites hold the same shared weights, and each the state of its own experts. Weights
and masters that all sites train are compared bit by bit and taken once; weight, master and state of every expert come
from the site that trains it. Optimizer state of shared weights, and the count of updates, are those of the lowest site:
sites never synchronise them. The outer optimizer, which a run in one place has no use for, is left behind.

**Split.** Every site gets all weights, the optimizer state of the shared ones, and that of its own experts; they have
met, as it were, at this step. What a growth brought in does not have a learning rate of its own any more.

A run of N sites becomes one of N' by both, one after the other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.checkpoint import CheckpointReader, Moment, read_state, verify_checkpoint, write_checkpoint
from pretrain.checkpoint.pieces import SHAPING, Progress, counted, cut_experts, sound_checkpoint
from pretrain.checkpoint.steps import PARTIAL, list_moments, put_in_place
from pretrain.config.load import changed_keys, dump_config, load_config
from pretrain.config.ownership import owner_of, trained_experts
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.decentral.outer import OUTER_PREFIX
from pretrain.errors import CheckpointError, ConfigError
from pretrain.model.logical import logical_tensors
from pretrain.optim.states import split_state_key
from pretrain.run import NO_ROUNDS, TrainState, partial_keys
from pretrain.run_directory import CHECKPOINTS, CONFIG_FILE

# Keys that decide which tensors a checkpoint has, in which precision.
SAME_TENSORS = (*SHAPING, "run.precision")


@dataclass(frozen=True)
class _Site:
    """What one site has of a step."""

    path: Path
    config: Config
    state: TrainState


def join_sites(run: Path, out: Path, *, progress: Progress = lambda done, of: None) -> Path:
    """Make one checkpoint out of those of all sites.

    Args:
        run: run directory of the sites, which holds site_0, site_1, ... The newest synchronisation of which all sites
            have a sound checkpoint is taken; sites whose experts others have taken over need none.
        out: run directory to be made, which holds the joined checkpoint and nothing else. A run without [decentral]
            goes on from it: its configuration lies in the checkpoint.

    Returns:
        The joined checkpoint.

    Raises:
        CheckpointError: there is no such synchronisation, or the sites differ in what they have in common. Nothing is
            left behind.
    """
    with _folder(out) as aside, ExitStack() as stack:
        sites = _last_meeting(run)
        _check_same(sites)
        state, config = sites[0].state, sites[0].config
        joined = _Joined(config, state, [stack.enter_context(CheckpointReader(site.path)) for site in sites])
        boxes = list(joined.boxes())
        within = Path(CHECKPOINTS) / Moment(state.step).name
        write_checkpoint(
            aside / within,
            boxes,
            step=state.step,
            state=asdict(replace(state, decentral={}, clock={}, recorder={})),
            config_toml=dump_config(_at(out, config, decentral=None)),
            data_of=counted(joined.data_of, boxes, progress),
        )
    return out / within


def split_checkpoint(
    source: Path, config: Config, out: Path, *, progress: Progress = lambda done, of: None
) -> list[Path]:
    """Make a checkpoint of each site out of one of a run in one place.

    Args:
        source: a checkpoint, or a run directory, whose newest checkpoint is meant.
        config: of the sites, with [decentral]; model, optimizer and precision are those of the checkpoint.
        out: run directory of all sites to be made, in which each has its own: training with `run.directory = out` goes
            on from it.

    Returns:
        The sites' checkpoints, in order.

    Raises:
        CheckpointError, ConfigError: nothing is left behind.
    """
    if config.decentral is None:
        raise ConfigError(["decentral: missing, and says how many sites there are; add a [decentral] section"])
    with _folder(out) as aside:
        path = sound_checkpoint(source)
        state = TrainState(**read_state(path))
        _check_splittable(path, state, config)
        met = {**NO_ROUNDS, "round": 0, "round_step": state.step}
        state = replace(state, decentral=met, growths=[], scores={}, clock={}, recorder={})
        sites = [
            _at(out, config, decentral=config.decentral.model_copy(update={"site": number}))
            for number in range(config.sites)
        ]
        folders = [site.site_directory.relative_to(out) / CHECKPOINTS / Moment(state.step).name for site in sites]
        with CheckpointReader(path) as reader:
            boxes = [list(_boxes_of_site(site, reader)) for site in sites]
            data_of = counted(_Copy(reader), [box for of_site in boxes for box in of_site], progress)
            for site, folder, mine in zip(sites, folders, boxes, strict=True):
                write_checkpoint(
                    aside / folder,
                    mine,
                    step=state.step,
                    state=asdict(state),
                    config_toml=dump_config(site),
                    partial_keys=partial_keys(site, trained_experts(site)),
                    data_of=data_of,
                )
    return [out / folder for folder in folders]


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end of the block; an error in there leaves nothing behind."""
    if out.exists():
        raise CheckpointError(f"{out}: exists already; give a new folder")
    aside = out.with_name(out.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        put_in_place(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _at(out: Path, config: Config, **changes: object) -> Config:
    """The configuration of a run in `out`."""
    return config.model_copy(update={"run": config.run.model_copy(update={"directory": out}), **changes})


# ----- joining


def _last_meeting(run: Path) -> list[_Site]:
    """The sites at their newest synchronisation of which each has a sound checkpoint, lowest first."""
    folders = {int(match[1]): path for path in run.glob("site_*") if (match := re.fullmatch(r"site_(\d+)", path.name))}
    found = {number: list_moments(folder / CHECKPOINTS) for number, folder in sorted(folders.items())}
    reasons = []
    for moment in sorted({moment for moments in found.values() for moment in moments}, reverse=True):
        sites = _met({number: moments[moment] for number, moments in found.items() if moment in moments})
        if not isinstance(sites, str):
            return sites
        reasons.append(f"{moment.name}: {sites}")
    if not reasons:
        raise CheckpointError(
            f"{run}: no site in it (site_0, ...) has a checkpoint; give the run.directory of all sites"
        )
    raise CheckpointError(
        f"{run}: no synchronisation of which every site has a sound checkpoint ({'; '.join(reasons[:3])}); restore "
        "what is missing, or let the sites go on with checkpoint.every_steps a multiple of decentral.sync_every_steps"
    )


def _met(paths: Mapping[int, Path]) -> list[_Site] | str:
    """The sites at a step at which they met, from the checkpoints there are of it; or why that cannot be."""
    sites = {
        number: _Site(path, load_config(path / CONFIG_FILE), TrainState(**read_state(path)))
        for number, path in paths.items()
        if not verify_checkpoint(path, deep=False)
    }
    if not sites:
        return "damaged"
    met = {number for number, site in sites.items() if site.state.decentral.get("round_step") == site.state.step}
    if not met:
        return "no synchronisation"
    first = sites[min(met)]
    needed = [number for number in range(first.config.sites) if number not in first.state.decentral["dropped"]]
    # One that was dropped may have saved something of its own at this step.
    if not met.issuperset(sites.keys() & set(needed)):
        return "no synchronisation"
    for number in needed:
        # Last, as it reads everything.
        if number not in sites or verify_checkpoint(sites[number].path):
            return f"{'damaged' if number in paths else 'missing'} at site {number}"
    return [sites[number] for number in needed]


def _check_same(sites: Sequence[_Site]) -> None:
    """Raise CheckpointError where the sites are not of one run."""
    first = sites[0]
    for site in sites[1:]:
        keys = (*SAME_TENSORS, "decentral.kind", "decentral.sites")
        problems = [change for change in changed_keys(first.config, site.config) if change.startswith(keys)]
        position, other = _position(first.state), _position(site.state)
        problems += [f"{key}: {position[key]} -> {other[key]}" for key in position if position[key] != other[key]]
        if problems:
            raise CheckpointError(
                f"{site.path}: not of the run of {first.path} ({'; '.join(problems[:3])}); join the sites of one run"
            )


def _position(state: TrainState) -> dict[str, object]:
    """What sites that meet have in common."""
    own = {key: getattr(state, key) for key in ("step", "samples", "tokens", "data_fingerprint")}
    return own | {key: state.decentral[key] for key in ("round", "dropped")}


class _Joined:
    """The tensors of the joined checkpoint, box by box from those of the sites."""

    def __init__(self, config: Config, state: TrainState, readers: Sequence[CheckpointReader]) -> None:
        """config, state: of any site. readers: of those that own experts, lowest first."""
        self._sites, self._dropped = config.sites, state.decentral["dropped"]
        owners = [number for number in range(config.sites) if number not in self._dropped]
        self._reader_of = dict(zip(owners, readers, strict=True))
        self._lowest, self._others = readers[0], readers[1:]
        has_owners = trained_experts(config, self._dropped) is not None
        self._experts = {tensor.key for tensor in logical_tensors(config.model) if tensor.is_expert and has_owners}
        self._stored = _tensors(self._lowest)
        for reader in self._others:
            other = _tensors(reader)
            differing = [key for key in {**self._stored, **other} if self._stored.get(key) != other.get(key)]
            if differing:
                raise CheckpointError(
                    f"{reader.directory}: has other tensors than {self._lowest.directory} "
                    f"({', '.join(differing[:3])}); join the sites of one run"
                )

    def boxes(self) -> Iterator[ShardedTensor]:
        """Every box, without data."""
        for key, (dtype, shape) in self._stored.items():
            yield from cut_experts(key, shape, dtype, None)

    def data_of(self, box: ShardedTensor) -> torch.Tensor:
        """The values of a box."""
        name, key = split_state_key(box.key)
        offset, shape = tuple(box.global_offset), tuple(box.local_shape)
        if key in self._experts:
            return torch.cat([self._expert(box.key, offset[0] + i, offset[1:], shape[1:]) for i in range(shape[0])])
        values = self._lowest.read(box.key, offset, shape)
        if name in (None, "master"):
            for reader in self._others:
                if not _same_bits(reader.read(box.key, offset, shape), values):
                    raise CheckpointError(
                        f"{reader.directory}: {box.key} is not that of {self._lowest.directory}, as it is after a "
                        "synchronisation; join checkpoints that the sites have written then"
                    )
        return values

    def _expert(self, key: str, expert: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """What the owner of an expert has of it."""
        owner = owner_of(expert, self._sites, self._dropped)
        return self._reader_of[owner].read(key, (expert, *offset), (1, *shape))


def _tensors(reader: CheckpointReader) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Element type and shape by key, of what goes into a joined checkpoint."""
    return {key: tensor for key, tensor in reader.tensors().items() if not key.startswith(OUTER_PREFIX)}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# ----- splitting


def _check_splittable(path: Path, state: TrainState, config: Config) -> None:
    """Raise an error unless the checkpoint is of a run in one place with the model and optimizer of `config`."""
    own = load_config(path / CONFIG_FILE)
    if state.decentral:
        raise CheckpointError(f"{path}: is of one of {own.sites} sites; join them first, with pretrain ckpt join")
    changed = changed_keys(stages(own)[len(state.growths)].config, config)
    differing = [change for change in changed if change.startswith(SAME_TENSORS)]
    if differing:
        raise ConfigError([f"{change}: not what {path} was trained with; restore it" for change in differing])


def _boxes_of_site(config: Config, reader: CheckpointReader) -> Iterator[ShardedTensor]:
    """Every box of a site's checkpoint, without data: of the optimizer state of experts, its own."""
    trained = trained_experts(config)
    own = partial_keys(config, trained)
    for key, (dtype, shape) in reader.tensors().items():
        yield from cut_experts(key, shape, dtype, trained if key in own else None)


@dataclass(frozen=True)
class _Copy:
    """Gives boxes as they are stored."""

    reader: CheckpointReader

    def __call__(self, box: ShardedTensor) -> torch.Tensor:
        return self.reader.read(box.key, tuple(box.global_offset), tuple(box.local_shape))
