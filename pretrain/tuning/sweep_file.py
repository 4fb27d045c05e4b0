"""What a sweep tries: its file, the checks of it, and the configuration of any one of its runs.

    config = "dense-run.toml"        # relative to the file
    directory = "runs/sweep"
    seeds = [1, 2]

    [[cell]]                         # a model size with a number of tokens
    name = "xs-1x"
    phase = 1
    set = { model.hidden_size = 32, budget.tokens = 980_000 }

    [optimizer.adamw]
    set = { optim.kind = "adamw" }
    start = { optim.lr = 8e-3, optim.weight_decay = 0.1 }
    grid = { optim.lr = [4e-3, 8e-3, 16e-3], optim.weight_decay = [0, 0.1, 0.2] }

Keys of configurations may be written dotted, quoted or not, or as nested tables.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from pretrain.config.base import PositiveFloat, Section
from pretrain.config.load import dotted, explain, load_config, read_toml
from pretrain.config.published import data_ratio
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.errors import ConfigError
from pretrain.model.counts import count_parameters
from pretrain.tuning.descent import Settings, neighbours, settings_of

WARMUP = "schedule.warmup_steps"
OWN_KEYS = ("run.directory", "run.seed")
"""Set by the sweep itself."""
TABLES = ("optim.routes",)
"""Keys whose value is a table."""


def _flat(value: Any) -> Any:
    """Nested tables as one table of dotted keys; anything else as it is."""
    return dict(_leaves(value, "")) if isinstance(value, dict) else value


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, entry in table.items():
        key = prefix + name
        if isinstance(entry, dict) and key not in TABLES:
            yield from _leaves(entry, f"{key}.")
        else:
            yield key, entry


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("scalar", "must be a number, text, true or false; write one value")
    return value


Scalar = Annotated[Any, AfterValidator(_scalar)]
Keys = Annotated[dict[str, Any], BeforeValidator(_flat)]
Start = Annotated[dict[str, Scalar], BeforeValidator(_flat)]
Values = Annotated[dict[str, Annotated[list[Scalar], Field(min_length=1)]], BeforeValidator(_flat)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]


class CellConfig(Section):
    """A model size with a number of tokens: what hyperparameters are tuned for."""

    name: Name
    phase: Literal[1, 2, 3]
    """1: tune everything; 2: only what is sensitive to size and tokens; 3: predict from the others, and check."""
    set: Keys = Field(default_factory=dict)
    """Configuration keys of the cell."""


class OptimizerConfig(Section):
    """An optimizer with the hyperparameters that are tuned."""

    set: Keys = Field(default_factory=dict)
    """Configuration keys that stay."""
    start: Start
    """The first baseline: a value for every key of the grid."""
    grid: Values
    """Values to try, by configuration key."""
    lr: str = "optim.lr"
    """Key of the learning rate, which phase 3 halves and doubles."""


class SweepConfig(Section):
    """A file of `pretrain sweep`."""

    config: Path
    """Configuration that every run starts from; relative to the file."""
    directory: Path
    """Folder of the ledger, the runs and the report."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Every configuration is trained with each; losses are means over them."""
    threshold: PositiveFloat = 3e-3
    """Nats by which a change has to lower the loss to be accepted (D1; published for 130M to 1.2B parameters). It must
    exceed what another seed changes, as the report says."""
    margin: PositiveFloat = 6.4e-3
    """Nats above the best that still count as optimal where sensitive hyperparameters are told (D2; published). It must
    exceed what another seed changes, too."""
    cell: Annotated[tuple[CellConfig, ...], Field(min_length=1)]
    optimizer: Annotated[dict[Name, OptimizerConfig], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """A cell with what follows from its configuration."""

    name: str
    phase: int
    model_size: int
    """Active non-embedding parameters; of the final model where it grows."""
    tokens: int

    @property
    def ratio(self) -> float:
        """Tokens over 20 for each of these parameters."""
        return data_ratio(self.tokens, self.model_size)


@dataclass(frozen=True)
class Sweep:
    """A sweep whose file has been checked."""

    file: Path
    written: SweepConfig

    def run_config(self, optimizer: str, cell: str, settings: Settings, *, seed: int | None = None) -> Config:
        """The configuration of a run, with the base's run directory. Raises ConfigError when it breaks a rule."""
        of_cell = next(one.set for one in self.written.cell if one.name == cell)
        keys = of_cell | self.written.optimizer[optimizer].set | dict(settings)
        if seed is not None:
            keys["run.seed"] = seed
        overrides = [f"{key}={_toml(value)}" for key, value in keys.items()]
        return load_config(self.file.parent / self.written.config, overrides, world_size=1)

    def allows(self, optimizer: str, cell: str, settings: Settings) -> bool:
        """Whether these hyperparameters make a configuration; a warm-up longer than the run for example does not."""
        try:
            self.run_config(optimizer, cell, settings)
        except ConfigError:
            return False
        return True

    @functools.cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order of the file."""
        found = []
        for one in self.written.cell:
            name, optimizer = next(iter(self.written.optimizer.items()))
            config = self.run_config(name, one.name, settings_of(optimizer.start))
            size = count_parameters(stages(config)[-1].config.model).active_non_embedding
            found.append(Cell(one.name, one.phase, size, config.total_steps * config.batch.tokens_per_step))
        return tuple(found)

    def cells_of(self, *phases: int) -> list[Cell]:
        """The cells of some phases."""
        return [cell for cell in self.cells if cell.phase in phases]


def load_sweep(path: Path) -> Sweep:
    """Read and check a file of `pretrain sweep`. Raises ConfigError with every problem found."""
    raw = read_toml(path)
    try:
        written = SweepConfig.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError([*_explain_all(error)], str(path)) from error
    sweep = Sweep(path, written)
    # What runs would be is only looked at when the file itself makes sense.
    problems = [*_key_problems(written), *_cell_problems(written)] or _run_problems(sweep)
    if problems:
        raise ConfigError(problems, str(path))
    return sweep


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _explain_all(error: ValidationError) -> Iterator[str]:
    """A line for each problem of a file that does not fit the schema."""
    found = error.errors(include_url=False)
    for problem in found:
        loc = problem["loc"]
        # An array none of whose entries is right counts as empty, too.
        if problem["type"] != "too_short" or not any(
            other["loc"][: len(loc)] == loc != other["loc"] for other in found
        ):
            yield _explain_one(problem)


def _explain_one(problem: Any) -> str:
    key, kind = dotted(problem["loc"]), problem["type"]
    if kind == "missing":
        return f"{key}: missing; give it a value"
    if kind == "extra_forbidden":
        return f"{key}: unknown key; see the example in pretrain/tuning/sweep_file.py"
    if kind == "too_short":
        return f"{key}: empty; give at least one"
    if kind == "string_pattern_mismatch":
        return f"{key}: must be letters, digits, points and dashes, as it names files; choose another"
    if kind == "scalar":
        return f"{key} = {json.dumps(problem['input'])}: {problem['msg']}"
    return explain(key, problem)


def _key_problems(written: SweepConfig) -> Iterator[str]:
    """What is wrong with the keys that optimizers and cells set."""
    of_cells = {key: f"cell {cell.name}" for cell in written.cell for key in cell.set}
    for cell in written.cell:
        yield from (f"cell {cell.name}: {key}: set by the sweep itself; leave it out" for key in _own(cell.set))
    for name, optimizer in written.optimizer.items():
        where, grid = f"optimizer.{name}", optimizer.grid
        for key in _own(optimizer.set | grid):
            yield f"{where}: {key}: set by the sweep itself; leave it out"
        for key in grid.keys() - optimizer.start.keys():
            yield f"{where}.start: {key} is missing; give it a value of its grid"
        for key in optimizer.start.keys() - grid.keys():
            yield f"{where}.start: {key} has no grid; give it one, or put it into {where}.set"
        for key, value in optimizer.start.items():
            if key in grid and value not in grid[key]:
                yield f"{where}.start: {key} = {json.dumps(value)}: not among its grid {list(grid[key])}; add it there"
        for key, values in grid.items():
            if len(set(values)) < len(values):
                yield f"{where}.grid: {key} = {list(values)}: a value is given twice; remove one"
            if key in optimizer.set:
                yield f"{where}: {key} is in `set` and in `grid`; choose one"
        for key in (optimizer.set | grid).keys() & of_cells.keys():
            yield f"{where}: {key} is set by {of_cells[key]}, too; choose one"
        if any(cell.phase == 3 for cell in written.cell) and optimizer.lr not in grid:
            yield f"{where}.lr = {optimizer.lr}: must be in the grid, as phase 3 halves and doubles it; add it there"


def _own(keys: Mapping[str, Any]) -> list[str]:
    return [key for key in OWN_KEYS if key in keys]


def _cell_problems(written: SweepConfig) -> Iterator[str]:
    """Whether there are the cells that each phase needs."""
    names = [cell.name for cell in written.cell]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"cell: {name} is given twice; rename one"
    if len(set(written.seeds)) < len(written.seeds):
        yield f"seeds = {list(written.seeds)}: one is given twice; remove it"
    first = [cell for cell in written.cell if cell.phase == 1]
    if len(first) < 1 + (len(first) < len(written.cell)):
        yield (
            f"cell: {len(first)} of phase 1; phases 2 and 3 need at least two of them, to see what changes with size "
            "and tokens, and a sweep at least one; add some"
        )


def _run_problems(sweep: Sweep) -> list[str]:
    """What is wrong with the runs that the sweep would make: each cell's first, and in one cell each value of the grid.
    A problem that many runs share is told once."""
    found: dict[str, list[str]] = {}
    first_cell = next(cell.name for cell in sweep.written.cell if cell.phase == 1)
    for (name, optimizer), cell in itertools.product(sweep.written.optimizer.items(), sweep.written.cell):
        start = settings_of(optimizer.start)
        try:
            config = sweep.run_config(name, cell.name, start)
        except ConfigError as error:
            problems = list(error.problems)
        else:
            problems = list(_measurable(config, optimizer))
            problems += _grid_problems(sweep, name, cell.name, start) if cell.name == first_cell else []
        for problem in problems:
            found.setdefault(problem, []).append(f"optimizer.{name} in cell {cell.name}")
    return [
        f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {problem}"
        for problem, where in found.items()
    ]


def _grid_problems(sweep: Sweep, optimizer: str, cell: str, start: Settings) -> Iterator[str]:
    """Values of the grid that no run can have, a warm-up that is only too long for this cell aside."""
    for settings in neighbours(start, sweep.written.optimizer[optimizer].grid):
        try:
            sweep.run_config(optimizer, cell, settings)
        except ConfigError as error:
            without = settings_of(dict(settings) | {WARMUP: 0})
            if not sweep.allows(optimizer, cell, without):
                yield from error.problems


def _measurable(config: Config, optimizer: OptimizerConfig) -> Iterator[str]:
    """Whether runs end with a validation loss, all of them after the same tokens."""
    if not config.data.valid or not config.eval.every_steps:
        yield (
            f"eval.every_steps = {config.eval.every_steps}, data.valid with {len(config.data.valid)} datasets: a sweep "
            "compares final validation losses; set both"
        )
    if config.budget.steps and any(key.startswith("batch.") for key in optimizer.grid):
        yield (
            f"budget.steps = {config.budget.steps}: runs with other batches would see other numbers of tokens; set "
            "budget.steps = 0 and budget.tokens"
        )
