"""Small runs that grow, and what their checkpoints hold."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import CheckpointReader
from pretrain.checkpoint.steps import list_moments, moment_of
from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from tests.helpers.runs import tiny_config


def growing_config(
    corpus: Path, directory: Path, growth: Sequence[dict[str, Any]], **sections: dict[str, Any]
) -> Config:
    """`tiny_config` with growth points."""
    tiny = tiny_config(corpus, directory, **sections)
    return Config.model_validate(tiny.model_dump(mode="json", exclude_unset=True) | {"growth": list(growth)})


def written(config: Config, folder: Path) -> Path:
    """The configuration as a file."""
    file = folder / f"{config.run.directory.name}.toml"
    file.write_text(dump_config(config))
    return file


def checkpoint(config: Config, name: str) -> Path:
    """The folder of a run's checkpoint: `3`, or `3_grown`."""
    step, *grown = name.split("_")
    return config.run.directory / "checkpoints" / "_".join([f"step_{int(step):08d}", *grown])


def tensor_bytes(path: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Key -> type and all bytes of every logical tensor of a checkpoint, however it is cut into boxes.

    leave_out: beginnings of keys.
    """
    with CheckpointReader(path) as reader:
        return {
            key: f"{dtype} {shape} ".encode() + _bytes(reader.read(key, [0] * len(shape), shape))
            for key, (dtype, shape) in reader.tensors().items()
            if not key.startswith(leave_out)
        }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def forget_after(directory: Path, copy: Path, name: str) -> None:
    """Copy a run as it was when it had written the checkpoint `name`, with the rows a crash soon after would leave."""
    shutil.copytree(directory, copy)
    last = moment_of(Path(name))
    assert last is not None
    for moment, path in list_moments(copy / "checkpoints").items():
        if moment > last:
            shutil.rmtree(path)
