"""Whole runs of several sites: stopped and resumed, killed and healed, with other keys than the others'."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import read_state
from pretrain.config.decentral import DecentralConfig
from pretrain.config.schema import Config
from pretrain.decentral.coordinator import coordinate
from pretrain.decentral.transport import Round, StopWaitingError
from pretrain.signals import DONE, REQUEUE
from tests.decentral.recording import sites_config
from tests.decentral.sites import hurry
from tests.helpers.forks import forks
from tests.helpers.growing_runs import tensor_bytes
from tests.helpers.runs import events, make_corpus
from tests.helpers.sites import Site, at_site, free_port, run_sites


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def _train(config: Config) -> int:
    from pretrain.train import train

    hurry()
    return train(config)


def _coordinate(config: DecentralConfig) -> None:
    hurry()
    coordinate(config)


@contextmanager
def coordinator(config: Config) -> Iterator[None]:
    """A coordinator, which is killed in the end."""
    process = forks().Process(target=_coordinate, args=(config.decentral,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def checkpoint(config: Config, site: int, step: int) -> Path:
    return config.run.directory / f"site_{site}" / "checkpoints" / f"step_{step:08d}"


def weights(config: Config, site: int, step: int) -> dict[str, bytes]:
    """Key -> bytes of every weight and selection bias of a checkpoint."""
    return tensor_bytes(checkpoint(config, site, step), leave_out=("optimizer.", "outer."))


def everything(config: Config, site: int, step: int) -> dict[str, bytes]:
    """All files of tensors of a checkpoint."""
    return {path.name: path.read_bytes() for path in checkpoint(config, site, step).glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "delay"), [("spes", 0), ("spes", 1), ("diloco", 0)])
def test_resume_between_rounds_is_as_if_never_stopped(corpus: Path, tmp_path: Path, kind: str, delay: int) -> None:
    keys = {"kind": kind, "sync_every_steps": 3, "expert_delay_steps": delay}
    keys |= {"transport": "fixed", "coordinator": f"127.0.0.1:{free_port()}"}
    steps = {"budget": {"steps": 8}, "checkpoint": {"every_steps": 2, "keep": 10}, "run": {"precision": "bf16"}}
    whole = sites_config(corpus, tmp_path / "whole", decentral=keys, **steps)
    assert run_sites(_train, 1, [(at_site(whole, site),) for site in range(2)]) == [[0], [0]]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = sites_config(corpus, tmp_path / "again", decentral=keys, **steps)
    for site in range(2):
        for step in (6, 8):
            shutil.rmtree(checkpoint(again, site, step))
    assert run_sites(_train, 1, [(at_site(again, site),) for site in range(2)]) == [[0], [0]]
    for site in range(2):
        assert everything(again, site, 8) == everything(whole, site, 8)
        assert everything(again, site, 4) != everything(whole, site, 8)
    # The last step ends with a round, whatever the interval: all have one model.
    assert weights(whole, 0, 8) == weights(whole, 1, 8)
    assert weights(whole, 0, 4) != weights(whole, 1, 4)


def wait_for(site: Site, directory: Path, step: int, **fields: Any) -> None:
    """Until a site, whose run has this directory, has written a round after `step` or later, with these fields."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = events(directory, "sync") if (directory / "events.jsonl").exists() else []
        if any(event["step"] >= step and fields.items() <= event.items() for event in found):
            return
        if site.has_ended:
            break
        time.sleep(0.1)
    raise AssertionError(f"no round after step {step} with {fields}; {site.has_ended and site.results()}")


def _train_without_last_round(config: Config) -> int:
    """As if the site were asked to stop while it waits for the others after the last step."""
    from pretrain.syncing import Sites
    from pretrain.train import train

    meet = Sites._open

    def stops(sites: Sites) -> Round:
        if sites.state.step == config.total_steps:
            raise StopWaitingError
        return meet(sites)

    Sites._open = stops  # type: ignore[method-assign]
    return train(config)


def test_the_last_round_is_made_up_for_and_saved(corpus: Path, tmp_path: Path) -> None:
    keys = {"transport": "fixed", "coordinator": f"127.0.0.1:{free_port()}"}
    config = at_site(sites_config(corpus, tmp_path, sites=1, decentral=keys), 0)
    last = checkpoint(config, 0, config.total_steps)
    # It is not done: whoever starts it again, does so.
    assert run_sites(_train_without_last_round, 1, [(config,)]) == [[REQUEUE]]
    assert read_state(last)["decentral"]["round_step"] == 2
    assert run_sites(_train, 1, [(config,)]) == [[DONE]]
    assert read_state(last)["decentral"]["round_step"] == config.total_steps == 4
    assert run_sites(_train, 1, [(config,)]) == [[DONE]]


@pytest.mark.slow
def test_a_killed_site_and_a_killed_coordinator_come_back(corpus: Path, tmp_path: Path) -> None:
    keys = {"transport": "torchft", "coordinator": f"127.0.0.1:{free_port()}", "wait_seconds": 90.0}
    keys |= {"join_seconds": 6.0, "timeout_seconds": 10.0}
    sections = {"budget": {"steps": 60}, "checkpoint": {"every_steps": 2, "keep": 3}, "model": {"num_experts": 6}}
    config = sites_config(corpus, tmp_path, sites=3, decentral=keys, **sections)
    with ExitStack() as stack:

        def start(site: int) -> Site:
            begun = Site(_train, 1, at_site(config, site))
            stack.callback(begun.close)
            return begun

        with coordinator(config):
            sites = {site: start(site) for site in range(3)}
            wait_for(sites[0], tmp_path / "site_0", 4)
            sites[1].kill()
            wait_for(sites[0], tmp_path / "site_0", 6, absent=[1])
        # Nobody coordinates for a while; the sites come to their next round, and wait there.
        time.sleep(2)
        with coordinator(config):
            sites[1] = start(1)
            wait_for(sites[0], tmp_path / "site_0", 8, absent=[])
            assert [site.results() for site in sites.values()] == [[0]] * 3
    assert weights(config, 0, 60) == weights(config, 1, 60) == weights(config, 2, 60)
    syncs = events(tmp_path / "site_0", "sync")
    assert [event["round"] for event in syncs] == list(range(1, len(syncs) + 1)), "no round is lost or done twice"
    missed = [event for event in syncs if event["absent"] == [1]]
    assert missed, "the site was away"
    assert [event["step"] for event in syncs] == [*range(2, 62, 2)]
    back = next(event for event in events(tmp_path / "site_1", "sync") if event.get("stale") == [1])
    assert back["step"] == missed[-1]["step"] + 2


@pytest.mark.slow
def test_a_site_with_another_learning_rate_is_sent_away(corpus: Path, tmp_path: Path) -> None:
    keys = {
        "transport": "fixed",
        "coordinator": f"127.0.0.1:{free_port()}",
        "timeout_seconds": 5.0,
        "wait_seconds": 10.0,
    }
    config = sites_config(corpus, tmp_path, decentral=keys)
    other = at_site(config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})}), 1)
    with ExitStack() as stack:
        sites = [Site(_train, 1, of_one) for of_one in (at_site(config, 0), other)]
        for site in sites:
            stack.callback(site.close)
        with pytest.raises(AssertionError, match=r"optim\.lr = 0\.5: site 0 has 0\.003"):
            sites[1].results()
        with pytest.raises(AssertionError, match="SitesError"):
            sites[0].results()
