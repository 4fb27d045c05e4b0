"""Commands in the READMEs parse, and what they and the links name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config.load import load_config

ROOT = Path(__file__).parent.parent
READMES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts))


def commands(text: str) -> list[list[str]]:
    """Arguments of every `pretrain` command in indented lines, continued lines joined."""
    found = []
    for line in re.findall(r"^    .*$", text.replace("\\\n", " "), re.MULTILINE):
        before_comment = re.split(r"\s#\s", line)[0]
        start = re.search(r"(?:^|/|-m |\s)pretrain (?=[a-z])", before_comment)
        if start:
            found.append(shlex.split(before_comment[start.end() :]))
    return found


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", readme.read_text()):
        assert "://" in target or (readme.parent / target).exists(), target


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse_and_configs_load(readme: Path) -> None:
    for arguments in commands(readme.read_text()):
        if any(word.isupper() for word in arguments):
            continue  # A form, such as `pretrain train CONFIG`.
        options = cli._parser().parse_args(arguments)
        config = getattr(options, "config", None)
        if config is not None and str(config).startswith("configs/"):
            load_config(ROOT / config, options.set)


def test_the_first_readme_has_commands() -> None:
    found = commands((ROOT / "README.md").read_text())
    assert ["ckpt", "ls", "runs/demo"] in found
    assert len(found) >= 8


def test_a_wrong_command_is_seen() -> None:
    (arguments,) = commands("    pretrain tran configs/demo.toml   # a comment\n")
    with pytest.raises(SystemExit):
        cli._parser().parse_args(arguments)
