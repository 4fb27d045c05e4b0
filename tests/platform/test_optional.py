"""Optional parts are found without being imported, and their absence is explained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pretrain.platform import optional

ROOT = Path(__file__).parents[2]


def fake_modules(monkeypatch: pytest.MonkeyPatch, present: dict[str, Path]) -> None:
    """Only these top-level modules are installed."""

    def find_spec(name: str) -> ModuleSpec | None:
        assert "." not in name, "looking for a submodule imports its package"
        if name not in present:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(present[name])]
        return spec

    monkeypatch.setattr(optional.importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("modules", "folders", "expected"),
    [
        ((), (), (False, "not from PyPI")),
        (("apex",), (), (False, "another project")),
        (("apex",), ("multi_tensor_apply",), (False, "without its CUDA kernels")),
        (("apex", "amp_C"), ("multi_tensor_apply",), (True, "with CUDA kernels")),
    ],
)
def test_apex(
    modules: Iterable[str],
    folders: Iterable[str],
    expected: tuple[bool, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
    fake_modules(monkeypatch, dict.fromkeys(modules, tmp_path))
    part = optional.available()["apex"]
    assert part.present is expected[0]
    assert expected[1] in part.detail


def test_absent_parts_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {})
    parts = optional.available()
    assert 'pip install "meristem[cuda]"' in parts["Transformer Engine"].detail
    assert 'pip install "meristem[wandb]"' in parts["wandb"].detail
    assert not any(parts[name].present for name in ("Transformer Engine", "apex", "triton", "wandb"))


def test_present_parts_have_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, {"wandb": tmp_path, "triton": tmp_path})
    monkeypatch.setattr(optional.importlib.metadata, "version", {"wandb": "0.31.0", "triton": "3.6.0"}.__getitem__)
    parts = optional.available()
    assert parts["wandb"] == optional.Part(True, "0.31.0")
    assert parts["triton"] == optional.Part(True, "3.6.0")


def test_the_table_has_a_line_for_each() -> None:
    parts = {"CUDA": optional.Part(False, "none here"), "wandb": optional.Part(True, "1.2")}
    assert optional.table(parts) == "CUDA   no   none here\nwandb  yes  1.2"


def test_looking_imports_nothing() -> None:
    code = (
        "import sys, pretrain.platform.optional as optional; optional.available();"
        "print(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    )
    heavy = ["transformer_engine", "apex", "triton", "wandb", "megatron"]
    result = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    result = subprocess.run(
        [sys.executable, "-c", "import wandb;" + code, *heavy], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "['wandb']" or "No module named 'wandb'" in result.stderr


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, pretrain.platform; print('torch' in sys.modules, 'megatron' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
