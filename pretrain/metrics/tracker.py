"""Weights & Biases: the rows of a run in its dashboard. The one file that imports wandb, and only when asked to.

What leaves the process is decided here: the redacted configuration and numbers. wandb is told not to record the
command line, the environment, source code, git state, installed packages, the machine or the console.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from pretrain.errors import UserError

logger = logging.getLogger(__name__)

# Whole words of a key: `tokens` and `tokenizer` are ordinary keys here, `hf_token` is not.
SECRET_WORD = re.compile(r"(api)?keys?|token|secrets?|pass(words?|wd|phrase)|credentials?|auth")
REDACTED = "<redacted>"
# Rows waiting for a wandb that does not take them; then rows are dropped, with one warning.
MAX_QUEUED_ROWS = 10_000
PRIVACY_SETTINGS: dict[str, Any] = {
    "disable_code": True,
    "save_code": False,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_meta": True,  # command line, program, host, user
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "console": "off",  # nor does it get between us and the terminal
    "silent": True,
}


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of keys that are named like a secret (hf_token, apiKey, db-password) replaced."""
    return {key: REDACTED if _is_secret(key) else _redact_value(value) for key, value in config.items()}


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row under flat names (`moe/entropy_mean`); lists, text and empty values are left out, so that
    the number of names does not grow with the model."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            flat[prefix + key] = float(value) if isinstance(value, bool) else value
    return flat


class WandbTracker:
    """One wandb run, fed from a thread of its own: a wandb that is slow, down or dead never holds up training.

    Online when WANDB_API_KEY is set (and WANDB_MODE does not say otherwise), else offline, in `directory`/wandb, for
    `wandb sync` later. Never asks for anything and reads no netrc. Raises UserError when wandb is not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
        logged_step: int = -1,
        init_timeout_seconds: float = 30.0,
        finish_timeout_seconds: float = 60.0,
    ) -> None:
        """`run_id`: of the run to go on with (None: a new one). `logged_step`: last step it was sent before; wandb
        cannot take a step back, so rows up to it are not sent again."""
        # Crash reports of wandb's own go to its makers with whatever they hold.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # noqa: PLC0415  imported only when asked for
        except ImportError as error:
            raise UserError(
                "metrics.wandb = true: wandb is not installed: pip install meristem[wandb], or set it to false"
            ) from error
        self.run_id = run_id or secrets.token_hex(4)
        """Belongs into the run state, so that a restart continues the same run."""
        self._logged_step = logged_step
        self._finish_timeout = finish_timeout_seconds
        self._settings: dict[str, Any] = {
            "root_dir": str(directory),
            "init_timeout": init_timeout_seconds,
            "finish_timeout": finish_timeout_seconds,
            **PRIVACY_SETTINGS,
        }
        self._run = self._open(wandb, project=project, name=name, config=redact(config), id=self.run_id, resume="allow")
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_QUEUED_ROWS)
        self._dropped = 0
        self._exit_code = 0
        self._thread = threading.Thread(target=self._feed, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of `row`, which has a `step`. Steps never go back; the same step may come twice (its
        validation)."""
        step = row["step"]
        if step <= self._logged_step:
            return
        numbers = scalars({key: value for key, value in row.items() if key not in ("step", "time")})
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            if not self._dropped:
                logger.warning("wandb takes no more rows; training goes on, metrics.jsonl has them all")
            self._dropped += 1

    def close(self, *, exit_code: int = 0) -> None:
        """Finish the run, which wandb shows as failed unless `exit_code` is 0; gives up after
        `finish_timeout_seconds`."""
        self._exit_code = exit_code
        with suppress(queue.Full):  # then it is stuck, as the join finds out
            self._queue.put(None, timeout=self._finish_timeout)
        self._thread.join(self._finish_timeout)
        if self._thread.is_alive():
            logger.warning("wandb did not finish within %.0f s and was ended", self._finish_timeout)
            # It would hold up the end of this process, too: wandb waits for its service at exit.
            for child in psutil.Process().children(recursive=True):
                if child.name() == "wandb-core":
                    child.kill()
            self._thread.join(self._finish_timeout)

    def _open(self, wandb: Any, **arguments: Any) -> Any:
        mode = _mode()
        try:
            return wandb.init(mode=mode, settings=wandb.Settings(**self._settings), **arguments)
        except wandb.Error as error:
            if mode != "online":
                raise
            reason = str(error).splitlines()[0]
            logger.warning("wandb cannot be reached (%s); logging offline, `wandb sync` sends it later", reason)
            wandb.teardown()  # else its service holds the run id for the failed attempt
            return wandb.init(mode="offline", settings=wandb.Settings(**self._settings), **arguments)

    def _feed(self) -> None:
        working = True
        while (item := self._queue.get()) is not None:
            if working:  # else the queue is only emptied
                step, numbers = item
                working = self._attempt(partial(self._run.log, numbers, step=step))
        if working:
            self._attempt(partial(self._run.finish, exit_code=self._exit_code))

    def _attempt(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # whatever broke in wandb, training goes on
            logger.warning("wandb stopped working (%s: %s); training goes on without it", type(error).__name__, error)
            return False
        return True


def _mode() -> Literal["online", "offline", "disabled"]:
    asked = os.environ.get("WANDB_MODE", "online")
    if asked == "disabled":
        return "disabled"
    return "online" if asked == "online" and os.environ.get("WANDB_API_KEY") else "offline"


def _is_secret(name: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    return any(SECRET_WORD.fullmatch(word) for word in re.split(r"[^a-z0-9]+", words))


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(entry) for entry in value]
    return value
