"""Tuning by sweeps: the three-phase method, and what its losses and hyperparameters say."""
