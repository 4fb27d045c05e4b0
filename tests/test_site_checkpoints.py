"""Checkpoints of all sites become one of a run in one place, and back; each expert's state exists exactly once."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import cli
from pretrain.checkpoint import CheckpointReader, read_state, verify_checkpoint
from pretrain.config.load import changed_keys, dump_config, load_config
from pretrain.config.ownership import owned_experts
from pretrain.config.schema import Config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.optim.states import split_state_key
from pretrain.site_checkpoints import join_sites, split_checkpoint
from tests.checkpoint.test_verify import register
from tests.helpers.commands import contents
from tests.helpers.growing_runs import checkpoint, tensor_bytes
from tests.helpers.runs import make_corpus, tiny_config
from tests.helpers.sites import at_site, free_port, run_sites

SPLIT_AT, STEPS, EXPERTS = 3, 6, 4
MUON = {"kind": "muon", "lr": 1e-2}


def central(corpus: Path, directory: Path, **sections: dict[str, Any]) -> Config:
    return tiny_config(
        corpus, directory, **{"checkpoint": {"every_steps": 3, "keep": 20}, "eval": {"every_steps": 0}, **sections}
    )


def of_sites(config: Config, directory: Path, sites: int = 2, **keys: Any) -> Config:
    """The same run as one of several sites that meet every two steps and save after every step."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["run"]["directory"] = str(directory)
    values["checkpoint"]["every_steps"] = 1
    values["decentral"] = {
        "kind": "spes",
        "sites": sites,
        "sync_every_steps": 2,
        "transport": "fixed",
        "coordinator": f"127.0.0.1:{free_port()}",
        **keys,
    }
    return Config.model_validate(values)


def train_all(*configs: Config) -> None:
    from pretrain.train import train

    for config in configs:
        assert train(config) == 0


@dataclass(frozen=True)
class Runs:
    """A run in one place, split into two sites that trained on, and joined again."""

    folder: Path
    config: Config
    sites: Config
    split: dict[int, Path]
    """The checkpoints that the sites began from."""
    joined: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sites")
    config = central(make_corpus(folder / "corpus"), folder / "central", run={"precision": "bf16"}, optim=MUON)
    run_sites(train_all, 1, [[config]])
    sites = of_sites(config, folder / "trained")
    split_checkpoint(checkpoint(config, str(SPLIT_AT)), sites, folder / "split")
    shutil.copytree(folder / "split", folder / "trained")
    run_sites(train_all, 1, [[at_site(sites, 0)], [at_site(sites, 1)]])
    split = {site: site_checkpoint(folder / "split", site, SPLIT_AT) for site in range(2)}
    joined = join_sites(folder / "trained", folder / "joined")
    return Runs(folder, config, sites, split, joined)


def site_checkpoint(run: Path, site: int, step: int) -> Path:
    return run / f"site_{site}" / "checkpoints" / f"step_{step:08d}"


def rows_of(path: Path) -> Counter[str]:
    """How often a checkpoint has each expert's part of each tensor."""
    tensors = json.loads((path / "index.json").read_text())["tensors"]
    return Counter(
        f"{key} {box['offset'][0] + i}"
        for key, tensor in tensors.items()
        if ".experts." in key
        for box in tensor["boxes"]
        for i in range(box["shape"][0])
    )


@functools.cache
def reader_of(path: Path) -> CheckpointReader:
    return CheckpointReader(path)


def read(path: Path, key: str, expert: int | None = None) -> torch.Tensor:
    reader = reader_of(path)
    shape = reader.tensors()[key][1]
    if expert is None:
        return reader.read(key, [0] * len(shape), shape)
    return reader.read(key, [expert] + [0] * (len(shape) - 1), (1, *shape[1:]))


def keys_of(path: Path) -> list[str]:
    return list(reader_of(path).tensors())


def test_every_site_has_all_weights_and_the_state_of_its_experts(runs: Runs) -> None:
    whole = checkpoint(runs.config, str(SPLIT_AT))
    found: Counter[str] = Counter()
    for site, path in runs.split.items():
        assert verify_checkpoint(path) == []
        assert keys_of(path) == keys_of(whole)
        own = owned_experts(EXPERTS, 2, site)
        for key in keys_of(whole):
            name, weight = split_state_key(key)
            if ".experts." not in weight or name is None:
                assert torch.equal(read(path, key), read(whole, key)), key
                continue
            for expert in range(EXPERTS):
                if expert in own:
                    assert torch.equal(read(path, key, expert), read(whole, key, expert)), key
                else:
                    with pytest.raises(CheckpointError, match=f"has no entries {expert}"):
                        read(path, key, expert)
        found += Counter({row: n for row, n in rows_of(path).items() if row.startswith("optimizer.")})
    states = {row for row in rows_of(whole) if row.startswith("optimizer.")}
    assert found == Counter(dict.fromkeys(states, 1))


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_split_and_joined_is_what_it_was(sites: int, runs: Runs, tmp_path: Path) -> None:
    """Bit for bit, from any number of sites to any other."""
    source = checkpoint(runs.config, str(SPLIT_AT))
    split_checkpoint(source, of_sites(runs.config, tmp_path, sites), tmp_path / "split")
    joined = join_sites(tmp_path / "split", tmp_path / "joined")
    assert verify_checkpoint(joined) == []
    assert not any("partial" in t for t in json.loads((joined / "index.json").read_text())["tensors"].values())
    assert tensor_bytes(joined) == tensor_bytes(source)
    state = read_state(source)
    assert read_state(joined) == {**state, "clock": {}, "recorder": {}}
    config = load_config(joined / "config.toml")
    assert changed_keys(runs.config, config) == ["checkpoint.every_steps: 3 -> 1"]
    assert config.run.directory == tmp_path / "joined"


def test_full_replicas_split_and_join_as_well(runs: Runs, tmp_path: Path) -> None:
    source = checkpoint(runs.config, str(SPLIT_AT))
    config = of_sites(runs.config, tmp_path, kind="diloco")
    for path in split_checkpoint(source, config, tmp_path / "split"):
        assert tensor_bytes(path) == tensor_bytes(source)
    assert tensor_bytes(join_sites(tmp_path / "split", tmp_path / "joined")) == tensor_bytes(source)


def test_a_run_goes_on_from_the_joined_checkpoint_as_if_nothing_had_happened(runs: Runs, tmp_path: Path) -> None:
    source = checkpoint(runs.config, str(SPLIT_AT))
    split_checkpoint(source, runs.sites, tmp_path / "split")
    joined = join_sites(tmp_path / "split", tmp_path / "joined")
    config = load_config(joined / "config.toml")
    run_sites(train_all, 1, [[config]])
    straight = checkpoint(runs.config, str(STEPS))
    assert tensor_bytes(checkpoint(config, str(STEPS))) == tensor_bytes(straight)
    assert tensor_bytes(source) != tensor_bytes(straight)


def test_sites_that_have_trained_are_joined_expert_by_expert(runs: Runs) -> None:
    assert runs.joined.name == f"step_{STEPS:08d}"
    assert verify_checkpoint(runs.joined) == []
    paths = [site_checkpoint(runs.folder / "trained", site, STEPS) for site in range(2)]
    assert set(rows_of(runs.joined).values()) == {1}
    differing = set()
    for key in keys_of(runs.joined):
        name, weight = split_state_key(key)
        if ".experts." in weight:
            for expert in range(EXPERTS):
                assert torch.equal(read(runs.joined, key, expert), read(paths[expert % 2], key, expert)), key
        else:
            assert torch.equal(read(runs.joined, key), read(paths[0], key)), key
            if not torch.equal(read(paths[0], key), read(paths[1], key)):
                differing.add(name)
    # Each site has moments of its own; all else that is shared is the same, as the join has seen.
    assert differing == {"momentum", "exp_avg", "exp_avg_sq"}
    state, (first, _) = read_state(runs.joined), map(read_state, paths)
    assert first["decentral"]["round_step"] == STEPS
    assert state == {**first, "decentral": {}, "clock": {}, "recorder": {}}


def test_the_newest_synchronisation_that_all_have_counts(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "trained"
    shutil.copytree(runs.folder / "trained", run)
    shutil.rmtree(site_checkpoint(run, 1, 6))
    # Step 5 has both, but is no synchronisation.
    assert join_sites(run, tmp_path / "joined").name == "step_00000004"
    # That of the split counts as one, too.
    shutil.rmtree(site_checkpoint(run, 0, SPLIT_AT))
    damaged = next(site_checkpoint(run, 1, 4).glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError) as error:
        join_sites(run, tmp_path / "again")
    reasons = "step_00000006: missing at site 1; step_00000005: no synchronisation; step_00000004: damaged at site 1)"
    assert reasons in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined", "trained"]


def test_weights_that_differ_between_sites_are_refused(runs: Runs, tmp_path: Path) -> None:
    """What calls itself a synchronisation and is none."""
    run = tmp_path / "trained"
    for site in range(2):
        path = site_checkpoint(run, site, 5)
        shutil.copytree(site_checkpoint(runs.folder / "trained", site, 5), path)
        state = read_state(path)
        state["decentral"] |= {"round_step": 5}
        (path / "state.json").write_text(json.dumps(state))
        register(path, "state.json")
        assert verify_checkpoint(path) == []
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight is not that of .*site_0") as error:
        join_sites(run, tmp_path / "joined")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_sites_of_other_runs_are_refused(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "trained"
    for site in range(2):
        shutil.copytree(site_checkpoint(runs.folder / "trained", site, 6), site_checkpoint(run, site, 6))
    path = site_checkpoint(run, 1, 6)
    state = read_state(path)
    (path / "state.json").write_text(json.dumps(state | {"samples": 7}))
    register(path, "state.json")
    with pytest.raises(CheckpointError, match=r"site_1.*not of the run of .*site_0.* \(samples: 48 -> 7\)"):
        join_sites(run, tmp_path / "joined")
    with pytest.raises(CheckpointError, match=r"no site in it \(site_0, \.\.\.\) has a checkpoint"):
        join_sites(tmp_path, tmp_path / "joined")
    shutil.rmtree(run / "site_1")
    with pytest.raises(CheckpointError, match="step_00000006: missing at site 1"):
        join_sites(run, tmp_path / "joined")


def test_experts_of_a_site_that_was_dropped_come_from_who_has_them(runs: Runs, tmp_path: Path) -> None:
    """Of three sites, as written by hand; the third is away, and the others train its expert."""
    source = checkpoint(runs.config, str(SPLIT_AT))
    config = of_sites(runs.config, tmp_path, sites=2)
    split_checkpoint(source, config, tmp_path / "split")
    # Site 1 of two is dropped: site 0 trains everything, as the checkpoint in one place does.
    path = site_checkpoint(tmp_path / "split", 0, SPLIT_AT)
    state = read_state(path)
    for name in ("index.json", *(file.name for file in source.glob("*.safetensors"))):
        (path / name).unlink(missing_ok=True)
        shutil.copy(source / name, path / name)
        register(path, name)
    state["decentral"] |= {"dropped": [1]}
    (path / "state.json").write_text(json.dumps(state))
    register(path, "state.json")
    # It trained on for a while, and saved at the same step.
    stray = site_checkpoint(tmp_path / "split", 1, SPLIT_AT)
    state = read_state(stray)
    state["decentral"] |= {"round_step": SPLIT_AT - 1}
    (stray / "state.json").write_text(json.dumps(state))
    register(stray, "state.json")
    assert tensor_bytes(join_sites(tmp_path / "split", tmp_path / "joined")) == tensor_bytes(source)
    shutil.rmtree(tmp_path / "split" / "site_1")
    assert tensor_bytes(join_sites(tmp_path / "split", tmp_path / "again")) == tensor_bytes(source)


def test_what_cannot_be_split_is_refused(runs: Runs, tmp_path: Path) -> None:
    source = checkpoint(runs.config, str(SPLIT_AT))
    with pytest.raises(ConfigError, match=r"add a \[decentral\] section"):
        split_checkpoint(source, runs.config, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is of one of 2 sites; join them first"):
        split_checkpoint(runs.split[0], runs.sites, tmp_path / "out")
    other = of_sites(central(runs.folder, tmp_path, run={"precision": "fp32"}, optim={"kind": "lion"}), tmp_path)
    with pytest.raises(ConfigError) as error:
        split_checkpoint(source, other, tmp_path / "out")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["run.precision", "optim.kind"]
    (tmp_path / "out").mkdir()
    before = contents(tmp_path)
    for convert in (
        lambda: split_checkpoint(source, runs.sites, tmp_path / "out"),
        lambda: join_sites(runs.folder / "trained", tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match="out: exists already; give a new folder"):
            convert()
    assert contents(tmp_path) == before


def test_a_failure_half_way_leaves_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(10**6))

    def failing(self: CheckpointReader, *arguments: Any) -> torch.Tensor:
        if next(reads) == 100:
            raise OSError(5, "Input/output error")
        return original(self, *arguments)

    original = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        split_checkpoint(checkpoint(runs.config, str(SPLIT_AT)), runs.sites, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_commands(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sites.toml"
    file.write_text(dump_config(runs.sites))
    source, split, joined = checkpoint(runs.config, str(SPLIT_AT)), tmp_path / "split", tmp_path / "joined"
    assert cli.main(["ckpt", "split", str(source), str(file), str(split)]) == 0
    assert f"site 1: {site_checkpoint(split, 1, SPLIT_AT)}\n" in capsys.readouterr().out
    assert cli.main(["ckpt", "join", str(split), str(joined)]) == 0
    assert f"to go on: pretrain train {joined}/checkpoints/" in capsys.readouterr().out
    assert tensor_bytes(joined / "checkpoints" / source.name) == tensor_bytes(source)
    assert cli.main(["ckpt", "join", str(split), str(joined)]) == 2
    assert capsys.readouterr().err == f"error: {joined}: exists already; give a new folder\n"
