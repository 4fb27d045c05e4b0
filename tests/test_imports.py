"""Imports point one way, optional packages stay optional, and each of them has one home."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part may import itself and the parts of the lines above its own; parts of one line do not import each other.
LEVELS = [
    {"errors", "arguments"},
    {"config"},
    {"platform", "run_directory", "signals"},
    {"model"},
    {"parallel"},
    {"data", "optim"},
    {"checkpoint", "metrics", "plan"},
    {"growth"},
    {"decentral"},
    {"run"},
    {"restore", "retraining"},
    {"growing", "grow_checkpoint", "site_checkpoints", "syncing", "upcycle"},
    {"train", "demo"},
    {"tuning", "bench", "checkpoint_commands"},
    {"studies"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

TRITON = "pretrain_kernels.triton_"  # modules so named may import Triton
OPTIONAL = ["transformer_engine", "apex", "wandb", "triton", "torchft"]


def sources() -> dict[str, str]:
    """Source text by dotted module name, of our two packages."""
    found = {}
    for base, package in ((ROOT, "pretrain"), (ROOT / "kernels", "pretrain_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imported(text: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere: also in functions, for types only, and by import_module.

    `from a import b` yields `a.b`, as b may be a module.
    """
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield from (f"{module}.{name.name}" for name in names)
            case ast.ImportFrom():
                yield "a relative import"
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def part_of(module: str, names: Mapping[str, str]) -> str | None:
    """`config` for pretrain.config.schema.Config; None for pretrain itself and what it defines in __init__."""
    first, *rest = module.split(".")
    assert first == "pretrain"
    known = {name.split(".")[1] for name in names if name.startswith("pretrain.")} | set(LEVEL_OF)
    return rest[0] if rest and rest[0] in known else None


def wrong_directions(modules: Mapping[str, str]) -> list[str]:
    """Every import that points upwards or sideways, and every part that has no level."""
    problems = []
    for module, text in modules.items():
        package = module.split(".")[0]
        part = part_of(module, modules) if package == "pretrain" else None
        if part is not None and part not in LEVEL_OF:
            problems.append(f"{module}: {part} has no level")
            continue
        for name in imported(text):
            root = name.split(".")[0]
            if root == "a relative import":
                problems.append(f"{module} has {name}")
            elif root == "pretrain" and package == "pretrain_kernels":
                problems.append(f"{module} imports {name}")
            elif root == "pretrain":
                target = part_of(name, modules)
                if target is not None and target != part and LEVEL_OF[target] >= (LEVEL_OF[part] if part else 0):
                    problems.append(f"{module} imports {name}")
    return problems


def homes(modules: Mapping[str, str], package: str) -> list[str]:
    """Modules that import `package`, directly or through megatron-core's wrapper of that name."""
    wrapper = f"megatron.core.extensions.{package}"
    return [
        module
        for module, text in modules.items()
        if any(name.split(".")[0] == package or name.startswith(wrapper) for name in imported(text))
    ]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_imports_point_one_way() -> None:
    assert wrong_directions(sources()) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("pretrain.config.rules", "from pretrain.model.counts import count"),
        ("pretrain.config.rules", "def f():\n    import pretrain.cli"),
        ("pretrain.optim.muon", "from pretrain.data import order"),
        ("pretrain.data.order", "from pretrain import optim"),
        ("pretrain.model.build", "if TYPE_CHECKING:\n    from pretrain.train import Run"),
        ("pretrain.model.build", "import importlib\nimportlib.import_module('pretrain.cli')"),
        ("pretrain.model.build", "from .experts import x"),
        ("pretrain.newcomer", ""),
        ("pretrain", "from pretrain.errors import UserError"),
        ("pretrain_kernels.grouped", "from pretrain.errors import UserError"),
    ],
)
def test_wrong_direction_is_seen(module: str, text: str) -> None:
    assert len(wrong_directions({module: text})) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("pretrain.config.rules", "from pretrain.errors import ConfigError\nfrom pretrain import __version__"),
        ("pretrain.optim.muon", "from pretrain.optim.rules import AdamW\nfrom pretrain import model"),
        ("pretrain.model.experts", "import pretrain_kernels"),
        ("pretrain_kernels.grouped", "import torch, pretrain_kernels.reference"),
    ],
)
def test_right_direction_passes(module: str, text: str) -> None:
    assert wrong_directions({module: text}) == []


def test_optional_packages_have_one_home() -> None:
    modules = sources()
    assert len(homes(modules, "wandb")) == 1
    assert homes(modules, "torchft") == ["pretrain.decentral.torchft_transport"]
    assert len(homes(modules, "transformer_engine")) <= 1
    assert len(homes(modules, "apex")) <= 1
    assert [module for module in homes(modules, "triton") if not module.startswith(TRITON)] == []


def test_homes_are_counted() -> None:
    modules = {
        "pretrain.a": "def f():\n    import wandb.sdk",
        "pretrain.b": "from wandb import init",
        "pretrain.c": "import wandbish\nfrom megatron.core.extensions.transformer_engine import TENorm",
    }
    assert homes(modules, "wandb") == ["pretrain.a", "pretrain.b"]
    assert homes(modules, "transformer_engine") == ["pretrain.c"]
    assert homes(modules, "apex") == []


# Arguments: packages to block, "--", modules. Loads the heavy third-party packages once, then imports each module in a
# process of its own, so that none works only because another was imported before it.
IMPORT_EACH = """
import os, sys
cut = sys.argv.index("--")
blocked, modules = sys.argv[1:cut], sys.argv[cut + 1:]

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Block())
import torch, megatron.core.dist_checkpointing, megatron.core.models.gpt, megatron.core.optimizer
import matplotlib.pyplot, pydantic, rich.progress, safetensors.torch, tokenizers
for module in modules:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
        except BaseException as error:
            print(f"{module}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


def importable() -> list[str]:
    """Our modules, without those that run something when imported, and without kernels written in Triton."""
    kernels = [module for module in sources() if module.startswith(TRITON) and module != f"{TRITON}support"]
    return [module for module in sources() if not module.endswith("__main__") and module not in kernels]


def test_every_module_imports_without_the_optional_packages() -> None:
    modules = importable()
    assert "pretrain" in modules
    result = python(IMPORT_EACH, *OPTIONAL, "--", *modules)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_blocking_is_effective() -> None:
    result = python(IMPORT_EACH, "wandb", "--", "wandb", "pretrain.errors")
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["wandb"], result.stderr


def loads_torch(module: str) -> bool:
    result = python("import sys; __import__(sys.argv[1]); print('torch' in sys.modules)", module)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() == "True"


@pytest.mark.parametrize("module", ["pretrain.plan", "pretrain.cli"])
def test_planning_does_not_load_torch(module: str) -> None:
    assert not loads_torch(module)


def test_loading_torch_is_seen() -> None:
    assert loads_torch("pretrain.signals")
