"""Some arms trained for real: they grew, from the small run, and twins are what their arm makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.studies.arms import SMALL, arm_config, arm_named
from pretrain.studies.claims import LOCKED_DISTANCE
from pretrain.studies.command import CONFIG_FILE, jobs_of
from pretrain.studies.results import curve, outcome
from pretrain.studies.running import run_jobs
from tests.helpers.commands import command_process
from tests.helpers.runs import make_corpus
from tests.studies.synthetic import RATES

ROOT = Path(__file__).parents[2]
NAMES = (SMALL, "width-copied", "width-full", "experts-exact", "depth-stack-late")
STEPS = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Configurations of a few arms that have been trained, each for seconds."""
    folder = tmp_path_factory.mktemp("study")
    data = make_corpus(folder)
    overrides = [
        f"budget.steps={STEPS}",
        "batch={sequence_length=16, global_batch_size=2, micro_batch_size=2}",
        "eval.batches=2",
        "model.hidden_size=32",
        "model.num_layers=2",
        f'data.tokenizer="{data}/tokenizer.json"',
        f'data.train=[{{prefix="{data}/train"}}]',
        f'data.valid=[{{prefix="{data}/valid"}}]',
    ]
    base = load_config(ROOT / CONFIG_FILE, overrides)
    configs = {
        name: arm_config(base, arm_named(name), rates=RATES, seed=1, directory=folder / "runs" / name) for name in NAMES
    }
    with command_process() as run:

        def train(config_file: Path, log_file: Path) -> int:
            done = run("train", config_file)
            log_file.write_text(done.out + done.err)
            return done.code

        assert len(run_jobs(jobs_of(configs), at_once=1, train=train)) == len(NAMES)
    return configs


def test_growing_arms_train_only_what_follows_the_growth(trained) -> None:
    small = outcome(trained[SMALL], seed=1)
    whole = curve(trained[SMALL], None)
    assert [point.tokens for point in whole] == [32 * step for step in range(2, STEPS + 1, 2)]
    for name in NAMES[1:]:
        at = trained[name].growth[0].at_step
        assert curve(trained[name], None)[0].tokens == 32 * (at + 2)
        # With the small run's before it, a whole curve.
        joined = curve(trained[name], trained[SMALL])
        assert [point.tokens for point in joined] == [point.tokens for point in whole]
        assert joined[: at // 2] == whole[: at // 2]
        found = outcome(trained[name], seed=1)
        assert (found.steps, found.tokens) == (STEPS, small.tokens)
        assert found.flops > small.flops
        assert found.loss_before == pytest.approx(whole[at // 2 - 1].loss, rel=1e-6)


def test_loss_at_the_growth(trained) -> None:
    for name in ("width-copied", "width-full", "experts-exact"):
        found = outcome(trained[name], seed=1)
        assert found.loss_after == pytest.approx(found.loss_before, abs=1e-4)
    # Negative control: a stack is another function.
    stacked = outcome(trained["depth-stack-late"], seed=1)
    assert abs(stacked.loss_after - stacked.loss_before) > 1e-3


def test_twins_stay_equal_only_where_nothing_tells_them_apart(trained) -> None:
    pairs = {name: outcome(trained[name], seed=1).twins for name in NAMES[1:]}
    assert [key.rpartition("mlp.")[2] for key in pairs["width-copied"]] == [
        "experts.linear_fc1.weight",
        "experts.linear_fc2.weight",
    ]
    assert [key.rpartition("mlp.")[2] for key in pairs["experts-exact"]] == [
        "router.weight",
        "experts.linear_fc1.weight",
        "experts.linear_fc2.weight",
    ]
    assert pairs["depth-stack-late"] == {}
    for name in ("width-copied", "experts-exact"):
        assert all(pair.distance < LOCKED_DISTANCE for pair in pairs[name].values())
        assert all(pair.cosine == pytest.approx(1) for pair in pairs[name].values())
    assert all(pair.distance > LOCKED_DISTANCE for pair in pairs["width-full"].values())
