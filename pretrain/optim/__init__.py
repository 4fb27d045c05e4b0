"""Optimizers: schedules (schedule), update rules (rules and those built on it), state sharded over ranks (sharded)."""
