"""The errors a user can cause and mend. Anything else that is raised is a bug of ours.

The command line prints a UserError as one line per problem, without a traceback, and exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input, in one line: the key or file, its value, the rule it breaks, the remedy."""


class ConfigError(UserError):
    """Every problem of one configuration, so that they can be mended in one go."""

    def __init__(self, problems: Sequence[str], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        where = f" in {source}" if source else ""
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n  ".join([f"{count}{where}:", *self.problems]))


class DataError(UserError):
    """A dataset or tokenizer is missing, damaged, or not the one a run was started with."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class RunDirectoryError(UserError):
    """The run directory is in use, not writable, or full."""
