"""Other experts in training, in the middle of a run: the model stays, its optimizer is cut anew."""

from __future__ import annotations

import gc

from pretrain.config.ownership import trained_experts
from pretrain.decentral.reown import Held, with_other_experts
from pretrain.run import Run, TrainState, entry_ages, outer_of, schedule_of


def retrain(run: Run, state: TrainState) -> None:
    """Train the experts that are this site's by `state.decentral`, at the learning rates of their age. Collective."""
    trained = trained_experts(run.config, state.decentral["dropped"])
    mesh = run.mesh
    held = Held(run.engine.shards, run.optimizer.whole_state(), run.engine.trained, run.optimizer.state_dict())
    outer = run.outer.state() if run.outer else None
    # Only what moves stays: gradients make room.
    del run.engine, run.optimizer, run.outer
    gc.collect()
    run.engine, run.optimizer = with_other_experts(
        run.config, mesh, held, trained=trained, ages=entry_ages(run.written, state), ranks=run.ranks
    )
    run.outer = outer_of(run.config, run.optimizer)
    if run.outer and outer is not None:
        run.outer.take(outer)
    run.schedule = schedule_of(run.written, state)
