"""`pretrain`, of which rank 1 is killed twice: in the middle of a step, and after a restart in the middle of a save.

Started by torchrun as `-m tests.helpers.killing_train train CONFIG`, with a folder for marks in KILL_MARKS.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pretrain import cli
from pretrain.checkpoint import write
from pretrain.parallel.engine import Engine

KILLED_IN_STEP = 5


def die_once(name: str) -> None:
    """Leave a mark and die; do nothing where the mark is."""
    mark = Path(os.environ["KILL_MARKS"]) / name
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Train, with the two deaths built in on rank 1."""
    if os.environ["RANK"] != "1":
        return cli.main()
    forward_backward, save_file = Engine.forward_backward, write.save_file
    steps = []

    def dying_step(engine: Engine, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == KILLED_IN_STEP:
            die_once("step")
        return forward_backward(engine, batch)

    def dying_save(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if (Path(os.environ["KILL_MARKS"]) / "step").exists():
            os.truncate(path, path.stat().st_size // 2)
            die_once("save")
            save_file(tensors, path)

    Engine.forward_backward = dying_step  # type: ignore[method-assign]
    write.save_file = dying_save
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
