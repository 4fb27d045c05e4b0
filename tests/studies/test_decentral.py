"""The study of decentralized training: what it trains, that nothing is trained twice and no process outlives its run,
and that every verdict, table and picture follows from the numbers."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.errors import ConfigError, UserError
from pretrain.signals import DONE, REQUEUE
from pretrain.studies.decentral import command, running
from pretrain.studies.decentral.arms import ARMS, CENTRAL, FOUR, LOST, arm_config, arm_named
from pretrain.studies.decentral.claims import OWN, PAPER, judge
from pretrain.studies.decentral.report import markdown, to_json
from pretrain.studies.decentral.results import Outcome, Study
from pretrain.studies.decentral.running import Cores, Task, free_ports, train_sites
from pretrain.tuning.ledger import LEDGER_FILE
from tests.helpers.runs import VOCAB_SIZE, make_corpus
from tests.studies.decentral_runs import Change, made_up, made_up_study

CONFIG = Path(__file__).parents[2] / "configs" / "studies" / "decentral.toml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's file with a small corpus."""
    folder = tmp_path_factory.mktemp("decentral")
    corpus = make_corpus(folder)
    for path in (CONFIG, CONFIG.parent / "optimizers-run.toml"):
        # There is too little text for validation: any will do.
        text = (
            path.read_text().replace("runs/demo-data/valid", f"{corpus}/train").replace("runs/demo-data", str(corpus))
        )
        (folder / path.name).write_text(text.replace("vocab_size = 1024", f"vocab_size = {VOCAB_SIZE}"))
    return folder / CONFIG.name


@pytest.fixture
def base(file: Path) -> Config:
    return load_config(file)


def test_arms_differ_in_how_they_synchronise_alone(base: Config, tmp_path: Path) -> None:
    configs = {arm.name: arm_config(base, arm, seed=1, directory=tmp_path) for arm in ARMS}
    central = configs[CENTRAL]
    for name, config in configs.items():
        assert (config.model, config.optim, config.schedule) == (central.model, central.optim, central.schedule)
        assert (config.total_steps, config.batch.tokens_per_step) == (200, 2048)
        # Every process takes all of its part at once, and validation comes right after a round.
        assert config.batch.micro_batch_size * config.sites == config.batch.global_batch_size
        assert config.sites == arm_named(name).sites
        if config.decentral:
            assert config.eval.every_steps % config.decentral.sync_every_steps == 0
    merged = [name for name, config in configs.items() if config.decentral and config.decentral.merge.coefficient]
    assert merged == ["merge-10", "merge-50"]
    for name in merged:
        merge = configs[name].decentral.merge  # type: ignore[union-attr]
        assert merge.coefficient_at(50) > 0 == merge.coefficient_at(100)
    assert [name for name, config in configs.items() if config.checkpoint.every_steps] == [LOST]


def test_runs_are_told_apart_by_what_they_train(base: Config, tmp_path: Path) -> None:
    tasks = [command.make_task(base, arm, seed, tmp_path) for arm in ARMS for seed in (1, 2)]
    assert len({task.key for task in tasks}) == len({task.directory for task in tasks}) == len(tasks)
    # The loss of a site stands in no configuration.
    one, other = (command.make_task(base, arm_named(name), 1, tmp_path) for name in (FOUR, LOST))
    assert other.key == f"{one.key}-lost"
    assert [path.name for path in other.site_directories] == ["site_0", "site_1", "site_2", "site_3"]
    longer = base.model_copy(update={"optim": base.optim.model_copy(update={"lr": 1e-3})})
    assert command.make_task(longer, arm_named(FOUR), 1, tmp_path).key != one.key


def test_validation_has_to_follow_a_round(base: Config, tmp_path: Path) -> None:
    wrong = base.model_copy(update={"eval": base.eval.model_copy(update={"every_steps": 20})})
    arm_config(wrong, arm_named("spes-10"), seed=1, directory=tmp_path)
    with pytest.raises(ConfigError, match="must be multiples of 50"):
        arm_config(wrong, arm_named("spes-50"), seed=1, directory=tmp_path)


class Trainer:
    """Stands in for the processes that train."""

    def __init__(self, fails: Callable[[Task], bool] = lambda task: False) -> None:
        self.trained: list[str] = []
        self.fails = fails

    def __call__(self, task: Task, is_stopped: Callable[[], bool]) -> None:
        self.trained.append(task.label)
        if self.fails(task):
            raise UserError(f"{task.label} failed")


@pytest.fixture
def run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The study with made-up runs."""
    monkeypatch.setattr(command, "outcome", lambda task: made_up(task.arm, task.seed))
    monkeypatch.setattr(command, "machine", lambda config: {"device": "cpu"})

    def study(train: Trainer, **options: Any) -> int:
        options = {"seeds": 3, "jobs": 4} | options
        return command.decentral_study(out=tmp_path / "out", config_file=file, train=train, **options)

    return study


def test_nothing_is_trained_twice(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, more = Trainer(), Trainer(), Trainer()
    assert run(first) == DONE
    assert len({*first.trained}) == len(first.trained) == 3 * len(ARMS)
    report = (tmp_path / "out" / "README.md").read_text()
    assert run(again) == DONE
    assert again.trained == []
    assert (tmp_path / "out" / "README.md").read_text() == report
    assert run(more, seeds=4) == DONE
    assert [*{label[-1] for label in more.trained}] == ["4"]
    assert "**Reproduced** (11 of 11)" in capsys.readouterr().out
    for picture in ("gaps.png", "curves.png", "costs.png", "absence.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000


def test_a_failure_ends_the_study_and_what_was_trained_counts(run: Callable[..., int], tmp_path: Path) -> None:
    first, again = Trainer(lambda task: task.label == "merge-10 seed 2"), Trainer()
    with pytest.raises(UserError, match="merge-10 seed 2 failed"):
        run(first, jobs=2)
    assert not (tmp_path / "out" / "README.md").exists()
    done = {(row["cell"], row["seed"]) for row in map(json.loads, (tmp_path / "out" / LEDGER_FILE).open())}
    assert ("merge-10", 2) not in done
    assert len(done) >= 3
    assert run(again) == DONE
    assert len(again.trained) == 3 * len(ARMS) - len(done)


def test_goes_on_after_a_stop(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(task: Task, is_stopped: Callable[[], bool]) -> None:
        raise running.StoppedError

    assert run(stopped) == REQUEUE
    assert "give the command again" in capsys.readouterr().out
    assert run(Trainer()) == DONE


def test_processes_at_once() -> None:
    cores, busy, most, guard = Cores(4), 0, 0, threading.Lock()

    def take(count: int) -> None:
        nonlocal busy, most
        with cores.taken(count):
            with guard:
                busy += min(count, 4)
                most = max(most, busy)
            threading.Event().wait(0.01)
            with guard:
                busy -= min(count, 4)

    threads = [threading.Thread(target=take, args=(count,)) for count in (1, 2, 4, 9, 2, 2, 1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (busy, most) == (0, 4)


def test_no_two_runs_meet_at_one_port() -> None:
    ports = [free_ports() for _ in range(50)]
    assert len({port + offset for port in ports for offset in (0, 1)}) == 100


def test_a_run_that_fails_says_where_and_leaves_no_process(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Site 1 cannot read its data; site 0 would wait for it.
    task = command.make_task(base, arm_named("spes-10"), 1, tmp_path)
    broken = base.data.model_copy(update={"tokenizer": tmp_path / "nowhere.json"})
    task = dataclasses.replace(task, config=task.config.model_copy(update={"data": broken}))
    started: list[Any] = []
    end = running._end

    def ended(process: Any) -> None:
        started.append(process)
        end(process)

    monkeypatch.setattr(running, "_end", ended)
    with pytest.raises(UserError, match="ended with code 2"):
        train_sites(task, lambda: False)
    assert len(started) == 2
    assert all(process.exitcode is not None for process in started)
    assert "nowhere.json" in (task.directory / "site_0_output.txt").read_text()
    with pytest.raises(running.StoppedError):
        train_sites(task, lambda: True)
    assert not task.is_finished


def test_verdicts_when_all_is_as_claimed(base: Config, tmp_path: Path) -> None:
    study = made_up_study(base, tmp_path)
    assert {one.verdict for judged in judge(study) for one in judged} == {"reproduced"}
    # One seed tells nothing, however clear it looks.
    alone = made_up_study(base, tmp_path, seeds=(1,))
    assert {one.verdict for judged in judge(alone) for one in judged} == {"not resolved"}


def of(name: str, by: float) -> Change:
    """Some arms' losses are higher by so much."""
    return lambda arm, seed: by if arm.name.startswith(name) else 0.0


LOSS_TURNS = {
    "SPES reaches the quality of central training": of("merge-50", 0.2),
    "merging helps": of("merge-10", 0.1),
    "SPES reaches the quality of sites that train full replicas": of("merge-10", 0.1),
    "Nesterov momentum as the outer optimizer beats the mean (arXiv 2311.08105)": of("diloco-50", 0.2),
    "fewer rounds cost quality": of("diloco-10", 0.1),
    "more sites cost quality": of("spes-10", 0.1),
    "a site that is lost and comes back costs little": of("four-lost", 0.1),
}


@pytest.mark.parametrize("text", LOSS_TURNS)
def test_a_verdict_turns_with_the_losses(base: Config, tmp_path: Path, text: str) -> None:
    turned = made_up_study(base, tmp_path, change=LOSS_TURNS[text])
    assert verdict(turned, text) == "not reproduced"
    # What differs from seed to seed by more than arms do resolves nothing.
    noisy = made_up_study(base, tmp_path, change=lambda arm, seed: (-1) ** seed * LOSS_TURNS[text](arm, seed))
    assert verdict(noisy, text) == "not resolved"


def verdict(study: Study, text: str) -> str:
    (found,) = [one.verdict for judged in judge(study) for one in judged if one.claim.text == text]
    return found


HEAVY = dataclasses.replace(made_up(arm_named("spes-10"), 1).rounds[0], sent_bytes=900_000)
FIGURE_TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "SPES needs less memory than full replicas": ("spes-10", {"state_bytes": 3_000_000}),
    "SPES sends less than full replicas": ("spes-10", {"rounds": [HEAVY]}),
    "all sites end with one model": (FOUR, {"disagreement": 1e-3}),
    "a site keeps, and sends, as many bytes as the plan says": ("diloco-50", {"planned_state_bytes": 1_900_000}),
}


@pytest.mark.parametrize("text", FIGURE_TURNS)
def test_a_verdict_turns_with_the_figures(base: Config, tmp_path: Path, text: str) -> None:
    study = made_up_study(base, tmp_path)
    name, figures = FIGURE_TURNS[text]
    assert verdict(with_figures(study, name, figures), text) == "not reproduced"


def with_figures(study: Study, name: str, figures: dict[str, Any]) -> Study:
    changed: list[Outcome] = [dataclasses.replace(one, **figures) for one in study.outcomes[name]]
    return dataclasses.replace(study, outcomes={**study.outcomes, name: changed})


def test_every_claim_is_turned_by_a_test() -> None:
    assert {claim.text for claim in (*PAPER, *OWN)} == {*LOSS_TURNS, *FIGURE_TURNS}


def test_report(base: Config, tmp_path: Path) -> None:
    study = made_up_study(base, tmp_path)
    text = markdown(study)
    assert "| SPES with merging, H 10 | 4.2" in text
    assert "| DiLoCo, H 50 | 4.2" in text
    # Bytes of a round with a merge do not count as those of one without.
    assert "| SPES with merging, H 10 | 488.3 | 488.3 | 14,648.4 | 20 |" in text
    assert "- Seed 1: rounds without it: after steps 60 to 70 (2 of 20); back for the round after step 80" in text
    values = json.loads(json.dumps(to_json(study), allow_nan=False))
    assert values["arms"]["spes-50"]["seeds"][0]["loss"] == study.outcomes["spes-50"][0].loss
    assert len(values["claims"]["paper"]) == len(PAPER)
    never = with_figures(study, LOST, {"away": (60, 70), "returned": None})
    assert "not back before the end" in markdown(never)


def test_quick_from_end_to_end(file: Path) -> None:
    out = file.parent / "quick"
    assert command.decentral_study(seeds=1, out=out, jobs=4, quick=True, config_file=file) == DONE
    values = json.loads((out / "results.json").read_text())
    assert [*values["arms"]] == [CENTRAL, "diloco-10", "merge-10", FOUR, LOST]
    runs = {name: arm["seeds"][0] for name, arm in values["arms"].items()}
    for name, one in runs.items():
        # All sites have one model; what they keep and send is what the plan says.
        assert one["disagreement"] == 0
        assert one["state_bytes"] == one["planned_state_bytes"]
        assert len(one["rounds"]) == (0 if name == CENTRAL else 4)
        if name != CENTRAL:
            assert one["bytes_per_round"] == pytest.approx(one["planned_bytes_per_round"], rel=0.01)
    assert runs["merge-10"]["state_bytes"] < runs["diloco-10"]["state_bytes"] == runs[CENTRAL]["state_bytes"]
    assert [each["merged"] for each in runs["merge-10"]["rounds"]] == [True, False, False, False]
    # The site that was killed missed a round, and took part in the last one.
    members = [each["members"] for each in runs[LOST]["rounds"]]
    assert members[0] == members[-1] == [0, 1, 2, 3]
    assert [0, 1, 2] in members
    assert runs[FOUR]["away"] == [] != runs[LOST]["away"]
