"""Benchmarks, each a command of its own: `python -m pretrain_kernels.bench.cpu`."""
