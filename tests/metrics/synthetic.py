"""A run directory with made-up rows, written through the real writers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from pretrain.config.schema import MetricsConfig
from pretrain.metrics.moe import BalanceWindow
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.rows import TrainRow, ValidRow

TOKENS_PER_STEP = 1024


FLOPS_PER_STEP = 1e12
# What a growth event says beside its step; the grown model has 1.75 times the FLOPs.
GROWTH = {
    "summary": "2 to 4 layers",
    "parameters_before": 12_300_000,
    "parameters_after": 23_400_000,
    "active_before": 4_560_000,
    "active_after": 8_120_000,
    "flops_per_token_before": FLOPS_PER_STEP / TOKENS_PER_STEP,
    "flops_per_token_after": 1.75 * FLOPS_PER_STEP / TOKENS_PER_STEP,
    "valid_loss_before": 3.3,
    "valid_loss_after": 3.412,
    "logits_change": 0.183,
    "seconds": 1.26,
    "state": "asymmetric",
    "checkpoint": "step_00000020_grown",
}


def train_row(step: int, **fields) -> TrainRow:
    values = {
        "tokens": step * TOKENS_PER_STEP,
        "flops": step * FLOPS_PER_STEP,
        "loss": 3 + math.exp(-step / 10),
        "lr": 1e-3,
        "grad_norm": 0.5,
        "step_seconds": 0.1,
        "data_seconds": 0.01,
        "tokens_per_second": TOKENS_PER_STEP / 0.1,
        "model_tflops": 10.0,
        "memory_bytes": 1 << 30,
    }
    return TrainRow(step=step, **(values | fields))


def valid_row(step: int, loss: float, bits_per_byte: float | None = None, *, flops: float | None = None) -> ValidRow:
    return ValidRow(
        step=step,
        tokens=step * TOKENS_PER_STEP,
        flops=step * FLOPS_PER_STEP if flops is None else flops,
        valid_loss=loss,
        valid_bits_per_byte=bits_per_byte,
    )


def write_run(directory: Path, *, steps: int = 40, experts: int = 4, grow_at: int = 0, baselines: bool = True) -> Path:
    """Steps 1 to `steps`, validated every ten; two MoE layers, four after `grow_at` steps, and new entries warm up for
    five steps then; dense without experts."""
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"parameters": {"total": 12_300_000, "active": 4_560_000}}))
    recorder = Recorder(directory, metrics=MetricsConfig(), config={}, total_steps=steps)
    window, rng, layers = BalanceWindow(), np.random.default_rng(0), 2
    if baselines:
        recorder.event("baselines", step=0, unigram_bits_per_byte=2.5, bigram_bits_per_byte=2.0)
    for step in range(1, steps + 1):
        moe = window.add(rng.integers(50, 100, (layers, experts))) if experts else {}
        grown = max(0, step - grow_at) if grow_at else 0
        flops = (step + 0.75 * grown) * FLOPS_PER_STEP
        lr_new = [1.3e-3 * min(1.0, grown / 5)] if grown else ()
        recorder.train(train_row(step, moe=moe, flops=flops, lr_new=lr_new))
        if step % 10 == 0:
            recorder.valid(valid_row(step, 3.5 - step / 100, (3.5 - step / 100) * 0.4, flops=flops))
        if step == grow_at:
            layers *= 2
            recorder.event("growth", step=step, **GROWTH)
    recorder.close()
    return directory
