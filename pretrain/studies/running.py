"""Running the arms of a study: a process each, several at once, nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.steps import Moment, list_moments, moment_of
from pretrain.config.load import dump_config
from pretrain.config.schema import Config
from pretrain.config.stages import growth_step
from pretrain.errors import UserError
from pretrain.run_directory import CHECKPOINTS
from pretrain.signals import DONE
from pretrain.tuning.running import LOG_FILE, Train, is_finished, train_in_process

CONFIGURATIONS = "configs"


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    config: Config
    after: Config | None = None
    """The run whose checkpoint it starts from, the one right before its growth."""

    @property
    def directory(self) -> Path:
        return self.config.run.directory


def run_jobs(jobs: Sequence[Job], *, at_once: int, train: Train = train_in_process) -> list[Path]:
    """Train every job that is not finished; returns the directories of those that were trained now.

    Raises UserError when a directory holds another run, or when training fails; what waits is then not started.
    """
    waiting = [job for job in jobs if not is_finished(job.config)]
    # First those that others start from.
    waiting.sort(key=lambda job: job.after is not None)
    trained: list[Path] = []
    pool = ThreadPoolExecutor(max_workers=at_once)
    try:
        for first in (True, False):
            futures = {pool.submit(_run, job, train): job for job in waiting if (job.after is None) is first}
            for future in as_completed(futures):
                future.result()
                trained.append(futures[future].directory)
                print(f"  {len(trained)}/{len(waiting)} {futures[future].directory.name}", flush=True)
    finally:
        # On an error or Ctrl-C, runs that have begun end by themselves: a terminal's Ctrl-C reaches them, too.
        pool.shutdown(cancel_futures=True)
    return trained


def _run(job: Job, train: Train) -> None:
    directory = job.directory
    config_file = directory.parent / CONFIGURATIONS / f"{directory.name}.toml"
    for folder in (config_file.parent, directory):
        folder.mkdir(parents=True, exist_ok=True)
    config_file.write_text(dump_config(job.config))
    if job.after is not None:
        _bring_checkpoint(job.after, job.config)
    code = train(config_file, directory / LOG_FILE)
    if code != DONE or not is_finished(job.config):
        raise UserError(
            f"{directory}: training ended with code {code} before its last step; see {directory / LOG_FILE}, and give "
            "the command again to go on"
        )


def _bring_checkpoint(source: Config, config: Config) -> None:
    """Put the checkpoint right before the growth of `config` into its run directory, unless that has one already."""
    folder = config.run.directory / CHECKPOINTS
    if list_moments(folder):
        return
    name = Moment(growth_step(config, config.growth[0])).name
    # Under another name until it is complete; a name that is no checkpoint's.
    partial = folder / f"{name}.copy"
    assert moment_of(partial) is None
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source.run.directory / CHECKPOINTS / name, partial)
    partial.rename(folder / name)
