"""Processes that begin with the heavy imports done: importing them would take each about 5 seconds of CPU time."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# Of one process that has loaded these and done nothing else, all others are forks.
PRELOADED = ["torch._dynamo", "megatron.core.models.gpt", "megatron.core.optimizer", "pretrain.train"]
LAST = "tests.helpers.frozen"


def forks() -> ForkServerContext:
    """The way to start them. Their environment is that of the first one's start: pass on what matters."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, LAST])
    return context
