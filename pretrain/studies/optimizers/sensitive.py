"""Which hyperparameters matter: how the loss changes when one of them moves off its best value, and whether its best
value is another in other cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pretrain.studies.optimizers.cases import HALF, MOE, SCALED, Case, Study, mean_loss
from pretrain.tuning.descent import changed
from pretrain.tuning.sensitivity import Sensitivity, Trial, Value, find_sensitive


@dataclass(frozen=True)
class OneOff:
    """One hyperparameter of one optimizer in the first cell."""

    optimizer: str
    key: str
    best: Value
    """Its value in the last baseline of the search."""
    changes: Mapping[Value, float]
    """Other value -> loss less that of the baseline; inf when the run failed."""
    margin: float

    @property
    def matters(self) -> bool:
        """Whether some other value costs more than the margin."""
        return any(change > self.margin for change in self.changes.values())


def one_offs(study: Study) -> Iterator[OneOff]:
    """Every hyperparameter that was tuned, by optimizer."""
    for optimizer, descent in study.descents.items():
        grid = study.sweep.written.optimizer[optimizer].grid
        at = descent.losses[descent.baseline]
        for key, values in grid.items():
            best = dict(descent.baseline)[key]
            others = {value: changed(descent.baseline, {key: value}) for value in values if value != best}
            changes = {value: descent.losses[one] - at for value, one in others.items() if one in descent.losses}
            yield OneOff(optimizer, key, best, changes, study.sweep.written.margin)


def sensitive_rates(study: Study) -> dict[str, Sensitivity]:
    """Optimizer -> whether one learning rate is near-optimal in all cells; of those that have a finite loss in each."""
    found = {}
    for optimizer in SCALED:
        lr = study.sweep.written.optimizer[optimizer].lr
        trials: dict[str, list[Trial]] = {}
        for case, settings in study.settings.items():
            if case.cell != MOE and case in (Case(optimizer, case.cell), Case(optimizer, case.cell, HALF)):
                rate = {lr: dict(settings)[lr]}
                trials.setdefault(case.cell, []).append(Trial(rate, mean_loss(study.losses[case])))
        if all(any(math.isfinite(trial.loss) for trial in there) for there in trials.values()):
            found[optimizer] = find_sensitive(trials, study.sweep.written.margin)[lr]
    return found
