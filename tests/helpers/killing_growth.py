"""Runs that are killed in the middle of a growth, at every place where that could matter.

`-m tests.helpers.killing_growth CORPUS FOLDER` kills a run of one rank at each of POINTS, and prints what came of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import growing
from pretrain.checkpoint import write
from pretrain.config.schema import Config
from pretrain.growth import values
from pretrain.growth.maps import TensorMap
from pretrain.metrics.events import events_in_force
from pretrain.metrics.recorder import Recorder
from tests.helpers.growing_runs import checkpoint, growing_config, tensor_bytes

GROWN_AT = 3
GROWTH = {
    "at_step": GROWN_AT,
    "depth": {"identity": True},
    "experts": {"factor": 2, "noise": 0.05},
    "hidden": {"factor": 2},
    "rewarm": {"steps": 1},
}
LAST = 5
RUN = {"budget": {"steps": LAST}, "checkpoint": {"every_steps": 2, "keep": 20}, "schedule": {"warmup_steps": 2}}
BEFORE, AT, GROWN = "step_00000002", "step_00000003", "step_00000003_grown"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner: Any, name: str, number: int = 1) -> None:
    """Die just before a call of a function, counted from 1."""
    original, seen = getattr(owner, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def die_after_event(event: str) -> None:
    """Die just after an event is written."""
    original = Recorder.event

    def dying(self: Recorder, name: str, **fields: Any) -> None:
        original(self, name, **fields)
        if name == event:
            die()

    Recorder.event = dying  # type: ignore[method-assign]


def die_in_save(folder: str) -> None:
    """Die when half of the tensors of a checkpoint are written."""
    original = write.save_file

    def dying(tensors: Any, path: Path) -> None:
        original(tensors, path)
        if path.parent.name == f"{folder}.partial":
            os.truncate(path, path.stat().st_size // 2)
            die()

    write.save_file = dying


def die_at_commit(*, after: bool) -> None:
    """Die just before, or after, the checkpoint of the grown model gets its name."""
    original = write.put_in_place

    def dying(partial: Path, directory: Path) -> None:
        if directory.name != GROWN or after:
            original(partial, directory)
        if directory.name == GROWN:
            die()

    write.put_in_place = dying


# Where it dies -> the checkpoint that the next process goes on from, and how to die there.
POINTS: dict[str, tuple[str, Callable[[], None]]] = {
    "in the save before": (BEFORE, lambda: die_in_save(AT)),
    "before the plan": (BEFORE, lambda: die_at_call(growing, "next_growth")),
    "after the first event": (AT, lambda: die_after_event("growing")),
    "in mid-transfer": (AT, lambda: die_at_call(TensorMap, "place", 40)),
    "in the save after": (AT, lambda: die_in_save(GROWN)),
    "before the commit": (AT, lambda: die_at_commit(after=False)),
    "after the commit": (GROWN, lambda: die_at_commit(after=True)),
    "after the event": (GROWN, lambda: die_after_event("growth")),
    "in the next save": (GROWN, lambda: die_in_save("step_00000004")),
}


def train_in_child(config: Config, prepare: Callable[[], None] = lambda: None) -> bool:
    """Fork, `prepare`, train. Whether the child was killed rather than done."""
    child = os.fork()
    if child == 0:
        from pretrain.train import train

        prepare()
        os._exit(train(config))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "training failed"
    return os.WIFSIGNALED(status)


def outcome(config: Config) -> dict[str, Any]:
    """What a run that was killed and started again has come to."""
    found = [json.loads(line) for line in (config.run.directory / "events.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (config.run.directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "restart": [event["checkpoint"] for event in found if event["event"] == "restart"][-1],
        "growths": [event["checkpoint"] for event in events_in_force(found, "growth")],
        "began": sum(event["event"] == "growing" for event in found),
        "steps": [row["step"] for row in rows if row["kind"] == "train"],
        "names": sorted(path.name for path in (config.run.directory / "checkpoints").iterdir()),
    }


def forgetful_restart() -> None:
    """A restart that does not look whether the event of its growth was written."""
    Recorder.has_event = lambda *_, **__: True  # type: ignore[method-assign]


def other_noise() -> None:
    """A growth that draws other numbers."""
    draw = values.draw_normal
    values.draw_normal = lambda seed, *rest: draw(seed + 1, *rest)


# Name -> where it dies, and what is broken in the process after: negative controls.
BROKEN = {
    "no second look": ("after the commit", forgetful_restart),
    "other numbers": ("in mid-transfer", other_noise),
}


def sweep(corpus: Path, folder: Path) -> None:
    """Kill a run at each point, start it again, and print its outcome and whether its tensors are the right ones."""
    whole = growing_config(corpus, folder / "whole", [GROWTH], **RUN)
    assert not train_in_child(whole)
    final = tensor_bytes(checkpoint(whole, str(LAST)))
    grown = tensor_bytes(checkpoint(whole, f"{GROWN_AT}_grown"))
    # All go on from a run that has made its first checkpoint, and not the one before the growth.
    base = growing_config(corpus, folder / "base", [GROWTH], **RUN)
    assert train_in_child(base, lambda: die_in_save(AT))
    cases = {point: (point, lambda: None) for point in POINTS} | BROKEN
    for number, (name, (point, damage)) in enumerate(cases.items()):
        config = growing_config(corpus, folder / str(number), [GROWTH], **RUN)
        shutil.copytree(base.run.directory, config.run.directory)
        assert train_in_child(config, POINTS[point][1]), f"{name}: not killed"
        assert not train_in_child(config, damage), f"{name}: killed again"
        same = {
            "grown": tensor_bytes(checkpoint(config, f"{GROWN_AT}_grown")) == grown,
            "final": tensor_bytes(checkpoint(config, str(LAST))) == final,
        }
        print(json.dumps({"case": name, "same": same, **outcome(config)}))


if __name__ == "__main__":
    sweep(*map(Path, sys.argv[1:]))
