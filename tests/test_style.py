"""Limits that keep the code readable: short functions and files, docstrings on what is public, nothing left open."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Joined here, so that this file does not match itself.
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")


def package_files() -> list[Path]:
    files = sorted([*(ROOT / "pretrain").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    assert files
    return files


def long_parts(name: str, text: str) -> Iterator[str]:
    """The file and functions that are too long, counted from `def` to the last line, docstring included."""
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = function_lines(node)
            if length > MAX_FUNCTION_LINES:
                yield f"{name}: {node.name} has {length} lines"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def undocumented(name: str, text: str) -> Iterator[str]:
    """The module and its public functions and classes that have no docstring."""
    module = ast.parse(text)
    if ast.get_docstring(module) is None:
        yield name
    for node in module.body:
        public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_"
        if public and ast.get_docstring(node) is None:
            yield f"{name}: {node.name}"


def unfinished(name: str, text: str) -> Iterator[str]:
    """Lines with a mark of work left open."""
    for number, line in enumerate(text.splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{name}:{number}: {line.strip()}"


CHECKS = [long_parts, undocumented, unfinished]


@pytest.mark.parametrize("check", CHECKS)
def test_packages(check) -> None:
    problems = [problem for path in package_files() for problem in check(str(path.relative_to(ROOT)), path.read_text())]
    assert problems == []


def test_nothing_is_left_open_elsewhere() -> None:
    folders = ["tests", "launch", "configs", "docker", ".ci"]
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    texts = [path for path in files if path.suffix not in (".pyc", ".png")]
    assert [problem for path in texts for problem in unfinished(str(path), path.read_text(errors="replace"))] == []


def function_of(length: int) -> str:
    """A documented module with one documented function of so many lines."""
    return '"""."""\n\n\ndef f():\n    """."""\n' + "    pass\n" * (length - 2)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (long_parts, function_of(MAX_FUNCTION_LINES), function_of(MAX_FUNCTION_LINES + 1)),
        (long_parts, "x = 1\n" * MAX_FILE_LINES, "x = 1\n" * (MAX_FILE_LINES + 1)),
        (undocumented, function_of(3), function_of(3)[8:]),
        (undocumented, function_of(3), function_of(3).replace('    """."""\n', "")),
        (undocumented, '"""."""\nclass _A:\n    pass', '"""."""\nclass A:\n    pass'),
        (unfinished, "mastodon = 1", "x = 1  # TO" + "DO: more"),
    ],
)
def test_checks_tell_good_from_bad(check, good: str, bad: str) -> None:
    assert list(check("m", good)) == []
    assert len(list(check("m", bad))) == 1


def test_training_loop_reads_in_one_screen() -> None:
    module = ast.parse((ROOT / "pretrain" / "train.py").read_text())
    (train,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert function_lines(train) < 60
