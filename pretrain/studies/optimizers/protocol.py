"""The protocol of the study of optimizers, on the ledger, the workers and the searches of `pretrain sweep`.

1. Noise: every optimizer's first guess with all seeds. The threshold of the search, D1, and the margin within which
   configurations count as optimal, D2, follow from the spread.
2. Tuning: coordinate descent of every optimizer in the first cell, with a seed that no comparison uses.
3. Comparison: the best configuration with all seeds. Some optimizers also with more tokens and in a larger model, with
   that learning rate and half of it; and cases that put a single finding to the test.
4. A mixture of experts: three learning rates with the seed of tuning, then the best of them with all seeds.

An optimizer goes on to 3 and 4 when its own search has ended; only 1 is waited for by all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.schema import Config
from pretrain.metrics.history import read_histories
from pretrain.studies.optimizers.cases import (
    FIRST,
    FULL,
    HALF,
    LARGE_DECAY,
    LARGER,
    LONGER,
    LONGEST,
    MOE,
    MUON_ROUTER,
    SCALED,
    SMALL_DECAY,
    START,
    UNDERTUNED,
    Case,
    Curve,
    Losses,
    MoeTuning,
    noise_of,
)
from pretrain.tuning.descent import Descent, Settings, changed, settings_of
from pretrain.tuning.ledger import Ledger
from pretrain.tuning.phases import RATE_FACTORS, Tuning, side_by_side, tune
from pretrain.tuning.running import Train
from pretrain.tuning.sweep import Budget, Workers
from pretrain.tuning.sweep_file import WARMUP, CellConfig, OptimizerConfig, Sweep, load_sweep
from pretrain.tuning.trials import make_trial

TUNING_SEED = 0
"""None of the comparison's own: the best of many runs with one seed is partly luck with that seed."""
UNDERTUNED_RATE = 6e-4
"""GPT-3's for its smallest model, which arXiv 2509.02046 finds in many a baseline (there 8e-3 is the best)."""
DECAY = "optim.weight_decay"
MOE_FILE = "optimizers-moe.toml"
"""Configuration of the mixture of experts, beside the study's file."""
MOE_TUNED_AS = {"adamw": "adamw", "muon": "muon", MUON_ROUTER: "muon"}
"""Whose hyperparameters of the first cell the optimizers of the mixture of experts start from."""
MOE_ROUTES = {MUON_ROUTER: {"*.router.weight": "muon"}}
"""Tensors that they route otherwise than the kind does."""
QUICK_SHRINK, QUICK_WARMUP = 20, 2
"""--quick: times fewer steps, and steps of warm-up."""


@dataclass(frozen=True)
class Lab:
    """Where runs come from: the ledger, or training, several at once."""

    ledger: Ledger
    pool: ThreadPoolExecutor
    budget: Budget
    train: Train
    jobs: int

    def workers(self, sweep: Sweep) -> Workers:
        """Workers for the runs of a sweep."""
        return Workers(sweep, self.ledger, self.pool, self.budget, self.train, self.jobs)


@dataclass(frozen=True)
class Compared:
    """Cases that were trained with every seed."""

    settings: Mapping[Case, Settings]
    losses: Losses


def joined(parts: Sequence[Compared]) -> Compared:
    """Several as one."""
    return Compared(
        {case: settings for part in parts for case, settings in part.settings.items()},
        {case: losses for part in parts for case, losses in part.losses.items()},
    )


@dataclass(frozen=True)
class Found:
    """What one optimizer came to."""

    descent: Descent
    compared: Compared
    curves: Mapping[Case, Mapping[int, Curve]]
    moe: Sequence[MoeTuning]


def load_study(file: Path, directory: Path, *, quick: bool) -> Sweep:
    """The study's sweep with this directory; `quick`: few steps, and two learning rates for all that is tuned. Raises
    ConfigError."""
    sweep = _with(load_sweep(file), directory=directory)
    if not quick:
        return sweep
    written = sweep.written
    cells = tuple(cell.model_copy(update={"set": _shrunk(cell)}) for cell in written.cell)
    return _with(sweep, cell=cells, optimizer={name: _quick(one) for name, one in written.optimizer.items()})


def _shrunk(cell: CellConfig) -> dict[str, object]:
    lengths = {key: max(1, cell.set[key] // QUICK_SHRINK) for key in ("budget.tokens", "eval.every_steps")}
    return cell.set | lengths | {"eval.batches": 1}


def _quick(optimizer: OptimizerConfig) -> OptimizerConfig:
    start = optimizer.start | ({WARMUP: QUICK_WARMUP} if WARMUP in optimizer.start else {})
    rate = start[optimizer.lr]
    grid = {key: [value] for key, value in start.items()} | {optimizer.lr: [rate, rate / 2]}
    return optimizer.model_copy(update={"start": start, "grid": grid})


def measure_noise(sweep: Sweep, lab: Lab, seeds: Sequence[int]) -> Compared:
    """Every optimizer's first guess."""
    workers = lab.workers(_with(sweep, seeds=tuple(seeds)))
    starts = {Case(name, FIRST, START): settings_of(one.start) for name, one in sweep.written.optimizer.items()}
    return _evaluate(workers, starts)


def with_thresholds(sweep: Sweep, noise: Losses) -> Sweep:
    """The sweep with D1 and D2 that follow from the noise of first guesses; its own where seeds tell nothing.

    D1 is the standard deviation of the difference of two runs that share their seed, as those of a search do; D2 twice
    as much, about as in arXiv 2509.02046 (3e-3 and 6.4e-3).
    """
    threshold = noise_of(noise)
    return _with(sweep, threshold=threshold, margin=2 * threshold) if threshold > 0 else sweep


def compare(sweep: Sweep, lab: Lab, seeds: Sequence[int], *, quick: bool) -> dict[str, Found]:
    """Steps 2 to 4 of all optimizers. `sweep` has the threshold of the search.

    Raises UnfinishedError, or UserError when nothing that an optimizer tried has worked.
    """
    names = [*sweep.written.optimizer]
    tuning = lab.workers(_only(sweep, FIRST, seeds=(TUNING_SEED,)))
    comparing = lab.workers(_with(sweep, seeds=tuple(seeds)))
    of_one = functools.partial(_compare_one, lab=lab, tuning=tuning, comparing=comparing, quick=quick)
    return dict(zip(names, side_by_side([functools.partial(of_one, name) for name in names]), strict=True))


def _compare_one(optimizer: str, *, lab: Lab, tuning: Workers, comparing: Workers, quick: bool) -> Found:
    search = Tuning(optimizer)
    tune(search, tuning.sweep, tuning.evaluate)
    descent = search.searches[FIRST]
    settings = dict(cases_of(comparing.sweep, optimizer, descent.best))
    arms = [arm for arm, tuned_as in MOE_TUNED_AS.items() if tuned_as == optimizer]
    of_moe = [
        functools.partial(_compare_moe, arm, descent.best, lab=lab, comparing=comparing, quick=quick) for arm in arms
    ]
    dense, moe = _evaluate(comparing, settings), side_by_side(of_moe)
    compared = joined([dense, *(one for _, one in moe)])
    long = [case for case in settings if case.cell == LONGEST]
    curves = {case: curves_of(comparing.sweep, case, settings[case], dense.losses[case]) for case in long}
    return Found(descent, compared, curves, [tuned for tuned, _ in moe])


def cases_of(sweep: Sweep, optimizer: str, best: Settings) -> Iterator[tuple[Case, Settings]]:
    """Everything an optimizer is trained as, the mixture of experts aside, from its best settings in the first cell."""
    lr = sweep.written.optimizer[optimizer].lr
    cells = (FIRST, LONGER, LONGEST, LARGER) if optimizer in SCALED else (FIRST,)
    for cell in cells:
        there = _in_cell(sweep, optimizer, cell, best)
        yield Case(optimizer, cell, FULL), there
        if optimizer in SCALED:
            yield Case(optimizer, cell, HALF), changed(there, {lr: _rate(best, lr) / 2})
    if optimizer == "adamw":
        yield Case(optimizer, FIRST, UNDERTUNED), changed(best, {lr: UNDERTUNED_RATE})
    if optimizer == "lion":
        yield Case(optimizer, FIRST, SMALL_DECAY), changed(best, {DECAY: 0.1})
        yield Case(optimizer, FIRST, LARGE_DECAY), changed(best, {DECAY: 0.7})


def curves_of(sweep: Sweep, case: Case, settings: Settings, losses: Mapping[int, float]) -> dict[int, Curve]:
    """Seed -> validations of the runs of a case that ended with a loss. `losses`: by seed."""
    curves: dict[int, Curve] = {}
    for seed in (seed for seed, loss in losses.items() if math.isfinite(loss)):
        config = make_trial(sweep, case.optimizer, case.cell, settings, seed).config
        (history,) = read_histories([config.run.directory])
        curves[seed] = [(row["step"] / config.total_steps, row["valid_loss"]) for row in history.valid]
    return curves


def _compare_moe(arm: str, best: Settings, *, lab: Lab, comparing: Workers, quick: bool) -> tuple[MoeTuning, Compared]:
    """The mixture of experts with one optimizer: the sweep of its rate, and the best with all seeds."""
    dense = comparing.sweep
    sweep = moe_sweep(dense, arm, quick=quick)
    lr = sweep.written.optimizer[arm].lr
    start = _with_warmup_of(dense.run_config(MOE_TUNED_AS[arm], FIRST, best), sweep.run_config(arm, MOE, best), best)
    rates = {factor * _rate(best, lr): changed(start, {lr: factor * _rate(best, lr)}) for factor in RATE_FACTORS}
    losses = lab.workers(_with(sweep, seeds=(TUNING_SEED,))).evaluate(arm, MOE, [*rates.values()])
    tuned = MoeTuning(arm, {rate: losses[one] for rate, one in rates.items()})
    return tuned, _evaluate(lab.workers(sweep), {Case(arm, MOE): rates[tuned.best]})


def moe_sweep(dense: Sweep, arm: str, *, quick: bool) -> Sweep:
    """The mixture of experts as a sweep of one cell and one optimizer, with the directory and seeds of `dense`."""
    first = dense.written.cell[0]
    keys = ("budget.tokens", "eval.every_steps", "eval.batches") if quick else ()
    tuned_as = dense.written.optimizer[MOE_TUNED_AS[arm]]
    routes = {"optim.routes": MOE_ROUTES[arm]} if arm in MOE_ROUTES else {}
    return _with(
        dense,
        config=Path(MOE_FILE),
        cell=(CellConfig(name=MOE, phase=1, set={key: first.set[key] for key in keys}),),
        optimizer={arm: tuned_as.model_copy(update={"set": tuned_as.set | routes})},
    )


def _evaluate(workers: Workers, cases: Mapping[Case, Settings]) -> Compared:
    """Every case with every seed of the workers' sweep."""
    sweep = workers.sweep
    side_by_side([functools.partial(workers.evaluate, case.optimizer, case.cell, [one]) for case, one in cases.items()])
    losses = {
        case: {
            seed: workers.ledger.rows[make_trial(sweep, case.optimizer, case.cell, one, seed).key].loss
            for seed in sweep.written.seeds
        }
        for case, one in cases.items()
    }
    return Compared(cases, losses)


def _with(sweep: Sweep, **keys: object) -> Sweep:
    """The same sweep with other keys in its file."""
    return dataclasses.replace(sweep, written=sweep.written.model_copy(update=keys))


def _only(sweep: Sweep, cell: str, *, seeds: tuple[int, ...]) -> Sweep:
    return _with(sweep, cell=tuple(one for one in sweep.written.cell if one.name == cell), seeds=seeds)


def _in_cell(sweep: Sweep, optimizer: str, cell: str, best: Settings) -> Settings:
    """The settings of the first cell in another one: warm-up is the same share of the steps."""
    return _with_warmup_of(sweep.run_config(optimizer, FIRST, best), sweep.run_config(optimizer, cell, best), best)


def _with_warmup_of(first: Config, other: Config, settings: Settings) -> Settings:
    """`settings` of the first run with the warm-up that is the same share of the other's steps."""
    if WARMUP not in dict(settings):
        return settings
    return changed(settings, {WARMUP: round(first.schedule.warmup_steps * other.total_steps / first.total_steps)})


def _rate(settings: Settings, lr: str) -> float:
    return float(dict(settings)[lr])
