"""Which optional parts this machine has, and why not. The one place that looks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Part:
    """An optional part: present, with a version, or absent, with a reason."""

    present: bool
    detail: str
    """Its version, or why it cannot be used."""


def available() -> dict[str, Part]:
    """Look for every optional part, without importing any."""
    return {
        "CUDA": _cuda(),
        # The name of its compiled part: `transformer_engine` alone may be there without its PyTorch extension.
        "Transformer Engine": _distribution("transformer-engine", module="transformer_engine_torch", extra="cuda"),
        "apex": _apex(),
        "triton": _distribution("triton", module="triton", extra="cuda"),
        "wandb": _distribution("wandb", module="wandb", extra="wandb"),
    }


def table(parts: dict[str, Part]) -> str:
    """One line per part: name, yes or no, version or reason."""
    width = max(map(len, parts))
    return "\n".join(
        f"{name:<{width}}  {'yes' if part.present else 'no ':<3}  {part.detail}" for name, part in parts.items()
    )


def _cuda() -> Part:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Part(True, f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}")
    built = torch.version.cuda
    return Part(
        False, f"no GPU visible to torch {torch.__version__}" if built else f"torch {torch.__version__} has no CUDA"
    )


def _distribution(name: str, *, module: str, extra: str) -> Part:
    """A part that is installed under the distribution `name` and imported as the top-level `module`."""
    if importlib.util.find_spec(module) is None:
        return Part(False, f'not installed (pip install "meristem[{extra}]")')
    try:
        return Part(True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Part(True, "version unknown")


def _apex() -> Part:
    """NVIDIA's apex has fused CUDA kernels, compiled into `amp_C`; PyPI's package of that name is a web framework."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Part(False, "not installed (from NVIDIA's sources or their container, not from PyPI)")
    # Looking for a submodule by its name would import apex.
    folders = spec.submodule_search_locations or []
    if not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders):
        return Part(False, "PyPI's apex, which is another project (pip uninstall apex)")
    if importlib.util.find_spec("amp_C") is None:
        return Part(False, "built without its CUDA kernels (amp_C)")
    return Part(True, "with CUDA kernels")
