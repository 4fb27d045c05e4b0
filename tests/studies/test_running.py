"""Running the arms: what is done is not done again, growing runs start from the small one's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.studies.arms import ARMS, SMALL
from pretrain.studies.command import CONFIG_FILE, jobs_of, seed_configs
from pretrain.studies.running import run_jobs
from pretrain.tuning.running import is_finished
from tests.studies.synthetic import RATES

ROOT = Path(__file__).parents[2]


class Trainer:
    """Stands in for the process that trains: leaves what a finished run leaves."""

    def __init__(self, *, failing: str = "") -> None:
        self.failing = failing
        self.trained: list[str] = []

    def __call__(self, config_file: Path, log_file: Path) -> int:
        config = load_config(config_file)
        name = config.run.directory.name
        if name == self.failing:
            return 1
        if config.growth:
            folder = config.run.directory / "checkpoints" / f"step_{config.growth[0].at_step:08d}"
            assert (folder / "weights").read_text() == "of small-seed1"
        every = config.checkpoint.keep_every_steps
        for step in range(every, config.total_steps, every) if every else ():
            folder = config.run.directory / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            (folder / "weights").write_text(f"of {name}")
        (config.run.directory / "config.toml").write_text(config_file.read_text())
        row = {"event": "finished", "step": config.total_steps}
        (config.run.directory / "events.jsonl").write_text(json.dumps(row) + "\n")
        self.trained.append(name)
        return 0


def configs(folder: Path, *overrides: str) -> dict[str, Config]:
    return seed_configs(load_config(ROOT / CONFIG_FILE, overrides), 1, folder, rates=RATES)


def test_what_is_finished_is_skipped(tmp_path: Path) -> None:
    jobs, first = jobs_of(configs(tmp_path)), Trainer()
    assert len(run_jobs(jobs, at_once=2, train=first)) == len(ARMS)
    assert sorted(first.trained) == sorted(f"{arm.name}-seed1" for arm in ARMS)

    again = Trainer()
    assert run_jobs(jobs, at_once=2, train=again) == []
    assert again.trained == []

    # Negative control: a run without its end is trained again, and it alone.
    events = tmp_path / "width-full-seed1" / "events.jsonl"
    events.write_text(events.read_text().replace("finished", "stopped"))
    assert [path.name for path in run_jobs(jobs, at_once=2, train=again)] == ["width-full-seed1"]


def test_a_failure_stops_the_study_and_the_next_one_goes_on(tmp_path: Path) -> None:
    jobs = jobs_of(configs(tmp_path))
    failing = Trainer(failing="small-seed1")
    with pytest.raises(UserError, match=r"small-seed1: training ended with code 1 before its last step; see .*output"):
        run_jobs(jobs, at_once=1, train=failing)
    # What was waiting beside it may have begun; what grows from it has not.
    assert not {f"{arm.name}-seed1" for arm in ARMS if arm.grows} & {*failing.trained}
    assert len(failing.trained) + len(run_jobs(jobs, at_once=1, train=Trainer())) == len(ARMS)


def test_a_run_that_ends_early_without_an_error_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended with code 0 before its last step"):
        run_jobs(jobs_of(configs(tmp_path))[:1], at_once=1, train=lambda config, log: 0)


def test_another_configuration_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run_jobs(jobs_of(configs(tmp_path)), at_once=2, train=Trainer())
    other = configs(tmp_path, "budget.steps=64")
    with pytest.raises(UserError, match=r"holds a run of another configuration .*budget.steps"):
        is_finished(other[SMALL])


def test_the_checkpoint_of_a_run_under_way_is_left_alone(tmp_path: Path) -> None:
    of_arm = configs(tmp_path)
    small, full = jobs_of({name: of_arm[name] for name in (SMALL, "width-full")})
    run_jobs([small], at_once=1, train=Trainer())
    own = tmp_path / "width-full-seed1" / "checkpoints" / "step_00000700_grown"
    own.mkdir(parents=True)
    seen: list[list[str]] = []

    def look(config_file: Path, log_file: Path) -> int:
        seen.append([path.name for path in own.parent.iterdir()])
        return 75

    with pytest.raises(UserError, match="ended with code 75"):
        run_jobs([full], at_once=1, train=look)
    assert seen == [["step_00000700_grown"]]
