"""Optimizers: schedules (schedule), update rules (rules, muon), and state sharded over ranks (sharded)."""

from pretrain.optim.schedule import Schedule, Schedules
from pretrain.optim.sharded import ShardedOptimizer, StepResult

__all__ = ["Schedule", "Schedules", "ShardedOptimizer", "StepResult"]
