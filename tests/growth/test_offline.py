"""`pretrain grow` makes, from the checkpoint before a growth, the one that a run writes after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import pieces, read_state, verify_checkpoint
from pretrain.config.schema import Config
from pretrain.errors import CheckpointError, ConfigError, UserError
from pretrain.grow_checkpoint import grow_checkpoint
from tests.helpers.commands import CommandProcess, command_process, contents
from tests.helpers.distributed import run_ranks
from tests.helpers.growing_runs import checkpoint, growing_config, tensor_bytes, written
from tests.helpers.runs import events, make_corpus, rows

pytestmark = pytest.mark.slow

GROWN_AT = 2
RUN = {"budget": {"steps": 6}, "checkpoint": {"every_steps": 4, "keep": 20}, "schedule": {"warmup_steps": 1}}
MANY = {
    "at_step": GROWN_AT,
    "depth": {"keep_last": 1},
    "experts": {"factor": 2, "noise": 0.05, "order": "interleave"},
    "hidden": {"factor": 2},
    "query_groups": {"factor": 2, "init": "random"},
    "rewarm": {"steps": 2},
}
UTILITY = {
    "at_step": GROWN_AT,
    "experts": {"top_k": "hold", "noise": 0.05, "bias_noise": 0.01, "utility": {"steps": 2}},
    "expert_ffn": {"factor": 1.5, "init": "copy-zero"},
}
BF16, MUON = {"precision": "bf16"}, {"kind": "muon", "lr": 1e-2}


@dataclass(frozen=True)
class Case:
    growth: dict[str, Any]
    run: dict[str, Any]
    optim: dict[str, Any]
    parallel: dict[str, Any]

    @property
    def ranks(self) -> int:
        return 2 if self.parallel else 1


CASES = {
    "adamw fp32": Case(MANY, {}, {}, {}),
    "muon bf16": Case(MANY | {"optimizer_state": "copy"}, BF16, MUON, {}),
    "muon fp32 reset": Case(MANY | {"optimizer_state": "reset"}, {}, MUON, {}),
    "adamw bf16 utility": Case(UTILITY, BF16, {}, {}),
    "TP2 to EP2": Case(MANY | {"parallel": {"tensor": 1, "expert": 2}}, BF16, {}, {"tensor": 2}),
    "PP2 utility": Case(UTILITY, {}, MUON, {"pipeline": 2}),
    "adam_mini bf16": Case(MANY, BF16, {"kind": "adam_mini"}, {}),
}
FIRST = "adamw fp32"


def config_of(case: Case, corpus: Path, directory: Path, growth: dict[str, Any] | None = None) -> Config:
    """The configuration of a case, perhaps with another growth."""
    config = growing_config(corpus, directory, [growth or case.growth], **RUN, optim=case.optim, parallel=case.parallel)
    return config.model_copy(update={"run": config.run.model_copy(update=case.run)})


def _train_all(configs: list[Config]) -> None:
    from pretrain.train import train

    for config in configs:
        assert train(config) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def command() -> Iterator[CommandProcess]:
    with command_process() as process:
        yield process


@pytest.fixture(scope="module")
def live(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Every case as a run that grows on the way."""
    folder = tmp_path_factory.mktemp("live")
    configs = {name: config_of(case, corpus, folder / name) for name, case in CASES.items()}
    for ranks in (1, 2):
        run_ranks(_train_all, ranks, [configs[name] for name, case in CASES.items() if case.ranks == ranks])
    return configs


def grown_offline(config: Config, out: Path) -> Path:
    return grow_checkpoint(checkpoint(config, str(GROWN_AT)), config, out)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_run(live: dict[str, Config], tmp_path: Path, name: str) -> None:
    config = live[name]
    path = grown_offline(config, tmp_path / "out")
    assert path == tmp_path / "out" / "checkpoints" / f"step_{GROWN_AT:08d}_grown"
    assert verify_checkpoint(path) == []
    of_run = checkpoint(config, f"{GROWN_AT}_grown")
    assert tensor_bytes(path) == tensor_bytes(of_run)
    # What is no tensor, too, but for what only a run measures.
    state, expected = read_state(path), read_state(of_run)
    for record in (state["growths"][0], expected["growths"][0]):
        assert {"summary", "preserves_function", "parameters_after", "state"} < record["figures"].keys()
        for measured in ("logits_change", "valid_loss_before", "valid_loss_after"):
            record["figures"].pop(measured, None)
    for changing in ("clock", "recorder"):
        state.pop(changing), expected.pop(changing)
    assert state == expected


def test_the_comparison_sees_another_seed(live: dict[str, Config], tmp_path: Path) -> None:
    """Negative control: then noise and fresh weights differ, and nothing else does."""
    config = live[FIRST]
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 8})})
    found = tensor_bytes(grown_offline(other, tmp_path / "out"))
    expected = tensor_bytes(checkpoint(config, f"{GROWN_AT}_grown"))
    differing = {key for key in expected if found[key] != expected[key]}
    assert found.keys() == expected.keys()
    assert differing
    assert all("experts" in key or "router" in key or "self_attention.linear" in key for key in differing)
    assert not [key for key in differing if key.startswith("optimizer")]


@pytest.mark.parametrize("name", [FIRST, "muon bf16", "adamw bf16 utility"])
def test_training_goes_on_as_in_the_run(
    live: dict[str, Config], tmp_path: Path, command: CommandProcess, name: str
) -> None:
    config, out = live[name], tmp_path / "out"
    source = checkpoint(config, str(GROWN_AT))
    file = written(config, tmp_path)
    result = command("grow", source, file, out)
    assert result.code == 0, result.err
    assert f"pretrain train {file} --set run.directory={out}" in result.out
    result = command("train", file, "--set", f"run.directory={out}")
    assert result.code == 0, result.err
    ended = config.model_copy(update={"run": config.run.model_copy(update={"directory": out})})
    assert tensor_bytes(checkpoint(ended, "6")) == tensor_bytes(checkpoint(config, "6"))
    losses = [row["loss"] for row in rows(out, "train")]
    assert losses == [row["loss"] for row in rows(config.run.directory, "train")][GROWN_AT:]
    # The event is there, without what a run measures, and the report can do with it.
    (event,) = events(out, "growth")
    of_run = events(config.run.directory, "growth")[0]
    known = {"summary", "parameters_before", "parameters_after", "flops_per_token_after", "state", "checkpoint"}
    assert {key: event[key] for key in known} == {key: of_run[key] for key in known}
    assert "seconds" not in event
    report = command("report", out)
    assert report.code == 0, report.err
    assert event["summary"] in report.out


def test_boxes_are_cut_to_size(live: dict[str, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = live["muon bf16"]
    whole = grown_offline(config, tmp_path / "whole")
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(pieces, "BOX_ENTRIES", 500)
    cut = grow_checkpoint(
        checkpoint(config, str(GROWN_AT)), config, tmp_path / "cut", progress=lambda done, of: seen.append((done, of))
    )
    assert tensor_bytes(cut) == tensor_bytes(whole)
    boxes = [len(tensor["boxes"]) for tensor in json.loads((cut / "index.json").read_text())["tensors"].values()]
    assert max(boxes) > 8
    assert len(seen) == sum(boxes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_the_newest_checkpoint_of_a_run_is_meant(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    """And a checkpoint that has grown can grow again."""
    config = live[FIRST]
    again = [CASES[FIRST].growth, {"at_step": 6, "query_groups": {"factor": 2}}]
    longer = growing_config(corpus, tmp_path / "run", again, **RUN | {"budget": {"steps": 9}})
    path = grow_checkpoint(config.run.directory, longer, tmp_path / "out")
    state = read_state(path)
    assert [record["parent"] for record in state["growths"]] == ["step_00000002", "step_00000006"]
    assert state["growths"][1]["model"]["num_query_groups"] == 8


# What is refused.


def refused(source: Path, config: Config, out: Path, words: str, error: type[UserError] = CheckpointError) -> None:
    """One line, and nothing is left behind."""
    before, there = contents(source), contents(out) if out.exists() else None
    with pytest.raises(error, match=words):
        grow_checkpoint(source, config, out)
    assert contents(source) == before
    assert (contents(out) if out.exists() else None) == there


def copied(config: Config, tmp_path: Path) -> Path:
    """A copy, to be damaged, of the checkpoint before the growth."""
    source = checkpoint(config, str(GROWN_AT))
    return Path(shutil.copytree(source, tmp_path / source.name))


def test_refused_a_folder_with_checkpoints(live: dict[str, Config], tmp_path: Path) -> None:
    config, out = live[FIRST], tmp_path / "out"
    grown_offline(config, out)
    refused(checkpoint(config, "2"), config, out, "out: has checkpoints already; give a new folder")


def test_refused_another_step(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    source, case = checkpoint(live[FIRST], "2"), CASES[FIRST]
    later = config_of(case, corpus, tmp_path / "run", {**case.growth, "at_step": 3})
    words = r"growth\[0\]: due at step 3, but .*step_00000002 is at step 2; give a checkpoint of step 3"
    refused(source, later, tmp_path / "out", words, ConfigError)
    earlier = config_of(case, corpus, tmp_path / "run", {**case.growth, "at_step": 1})
    words = r"growth\[0\]: due at step 1, but .*step_00000002 is at step 2 and has not been through it"
    refused(source, earlier, tmp_path / "out", words)


def test_refused_a_checkpoint_that_has_grown(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    config = live[FIRST]
    words = r"growth: .*step_00000002_grown has been through all 1 points; add one at_step = 2"
    refused(checkpoint(config, "2_grown"), config, tmp_path / "out", words, ConfigError)
    case = CASES[FIRST]
    edited = config_of(case, corpus, tmp_path / "run", {**case.growth, "hidden": {"factor": 3}})
    refused(checkpoint(config, "2_grown"), edited, tmp_path / "out", r"with other keys \(hidden: .*\); restore them")


def test_refused_nothing_to_grow(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    none = growing_config(corpus, tmp_path / "run", [], **RUN)
    refused(checkpoint(live[FIRST], "2"), none, tmp_path / "out", "has been through all 0 points", ConfigError)


def test_refused_another_model(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    case = CASES[FIRST]
    sections = {"model": {"num_attention_heads": 8}, "optim": MUON}
    other = growing_config(corpus, tmp_path / "run", [case.growth], **RUN, **sections)
    words = "model.num_attention_heads: 4 -> 8: not what .*step_00000002 was trained with; restore it"
    refused(checkpoint(live[FIRST], "2"), other, tmp_path / "out", words, ConfigError)
    with pytest.raises(ConfigError, match=r"optim\.kind: adamw -> muon"):
        grow_checkpoint(checkpoint(live[FIRST], "2"), other, tmp_path / "out")


def test_refused_a_damaged_checkpoint(live: dict[str, Config], tmp_path: Path) -> None:
    source = copied(live[FIRST], tmp_path)
    shard = next(source.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(source, live[FIRST], tmp_path / "out", r"step_00000002: damaged \(shard_00000_000.safetensors.*\)")
    refused(tmp_path / "none", live[FIRST], tmp_path / "out", "none: neither a checkpoint nor a run directory with one")


def test_refused_utility_without_a_measure(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    case = Case(UTILITY, {}, {}, {})
    config = config_of(case, corpus, tmp_path / "run")
    words = r"growth\[0\].experts.utility: .*step_00000002 has not measured its experts in the 2 steps before it"
    refused(checkpoint(live[FIRST], "2"), config, tmp_path / "out", words)


def rewrite(source: Path, tensors: Any) -> None:
    """Change a checkpoint's tensors and its index, with a new manifest, so that it is sound."""
    from pretrain.checkpoint.format import manifest_digest, to_json
    from pretrain.checkpoint.write import _seal

    (shard,) = source.glob("*.safetensors")
    index = json.loads((source / "index.json").read_text())
    content = load_file(shard)
    tensors(content, index["tensors"])
    save_file(content, shard)
    (source / "index.json").write_bytes(to_json(index))
    manifest = json.loads((source / "manifest.json").read_text())
    for name in (shard.name, "index.json"):
        manifest["files"][name] = _seal(source / name).model_dump()
    manifest["sha256"] = manifest_digest({key: value for key, value in manifest.items() if key != "sha256"})
    (source / "manifest.json").write_bytes(to_json(manifest))


def test_refused_a_tensor_without_a_rule(live: dict[str, Config], tmp_path: Path) -> None:
    source = copied(live[FIRST], tmp_path)

    def add(content: dict[str, Any], index: dict[str, Any]) -> None:
        entry = index["decoder.final_layernorm.weight"]
        (box,) = entry["boxes"]
        content["adapter@0"] = content[box["name"]].clone()
        index["adapter"] = {**entry, "boxes": [{**box, "name": "adapter@0"}]}

    rewrite(source, add)
    assert verify_checkpoint(source) == []
    words = "step_00000002: adapter is no tensor of the model, so it has no rule for growing"
    refused(source, live[FIRST], tmp_path / "out", words)


def test_refused_noise_that_bf16_rounds_away(live: dict[str, Config], corpus: Path, tmp_path: Path) -> None:
    """A checkpoint of bf16 weights alone; with masters, or enough noise, it grows."""
    name = "muon bf16"
    case, config = CASES[name], live[name]
    quiet = config_of(case, corpus, tmp_path / "run", {**MANY, "experts": {"factor": 2, "noise": 0.001}})
    grow_checkpoint(checkpoint(config, str(GROWN_AT)), quiet, tmp_path / "with masters")
    source = copied(config, tmp_path)

    def drop_masters(content: dict[str, Any], index: dict[str, Any]) -> None:
        for key in [key for key in index if key.startswith("optimizer.")]:
            for box in index.pop(key)["boxes"]:
                del content[box["name"]]

    rewrite(source, drop_masters)
    words = (
        r"growth\[0\].experts.noise = 0.001: is lost in rounding, as .* has no fp32 weights; use 0.003 or more, or 0"
    )
    refused(source, quiet, tmp_path / "out", words, ConfigError)
    grow_checkpoint(source, config, tmp_path / "loud enough")
