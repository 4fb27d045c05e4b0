"""`pretrain upcycle`: a mixture of experts that begins as the dense model it was made of, and trains on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointReader, pieces, read_checkpoint, read_state, verify_checkpoint
from pretrain.checkpoint.verify import read_manifest
from pretrain.config.decentral import DecentralConfig
from pretrain.config.load import load_config
from pretrain.config.rules import check
from pretrain.config.schema import Config
from pretrain.errors import CheckpointError, ConfigError, DataError, UserError
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.run import checkpoint_tensors
from pretrain.site_checkpoints import join_sites
from pretrain.train import train
from pretrain.upcycle import UpcycleOptions, misfits, upcycle
from tests.helpers.commands import CommandProcess, command_process, contents
from tests.helpers.distributed import run_ranks
from tests.helpers.growing_runs import checkpoint, tensor_bytes, written
from tests.helpers.layouts import engine_of, microbatches, single_process
from tests.helpers.runs import events, make_corpus, rows, tiny_config
from tests.helpers.sites import at_site, free_port, run_sites

CONFIGS = Path(__file__).parents[1] / "configs"

NOT_MOE = {"num_experts": 0, "top_k": 0, "expert_ffn_size": 0, "ffn_size": 48, "router": {}}
EXPERTS = {"expert_ffn_size": 48}
STEPS, TRAINED = 4, 3
EXACT = UpcycleOptions()


def dense_config(corpus: Path, directory: Path, *, precision: str = "fp32", tied: bool = True) -> Config:
    run = {"directory": str(directory), "precision": precision, "seed": 7}
    return tiny_config(corpus, directory, run=run, model={**NOT_MOE, "tie_embeddings": tied}, budget={"steps": TRAINED})


def moe_config(
    corpus: Path, directory: Path, *, model: dict[str, Any] | None = None, precision: str = "fp32", **sections: Any
) -> Config:
    run = {"directory": str(directory), "precision": precision, "seed": 11}
    return tiny_config(
        corpus, directory, run=run, model={**EXPERTS, **(model or {})}, budget={"steps": STEPS}, **sections
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def command() -> Iterator[CommandProcess]:
    with command_process() as process:
        yield process


@pytest.fixture(scope="module")
def trained(
    corpus: Path, command: CommandProcess, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Path]:
    """Run directory of a dense model of a precision, with tied tables or not; each is trained once."""
    folder, done = tmp_path_factory.mktemp("dense"), {}

    def run(precision: str, tied: bool) -> Path:
        directory = folder / f"{precision}-{tied}"
        if directory not in done:
            config = dense_config(corpus, directory, precision=precision, tied=tied)
            done[directory] = command("train", written(config, folder))
            assert done[directory].code == 0, done[directory].err
        return directory

    return run


@pytest.fixture(scope="module")
def dense(trained: Callable[[str, bool], Path]) -> Path:
    """A dense run in fp32 with tied tables."""
    return trained("fp32", True)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(path) as reader:
        return {key: reader.read(key, [0] * len(shape), shape) for key, (_, shape) in reader.tensors().items()}


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def logits_of(path: Path) -> torch.Tensor:
    """What the model of a checkpoint computes of a batch."""
    config = load_config(path / "config.toml")
    with single_process(), engine_of(config) as engine:
        boxes = [shard.sharded() for shard in engine.shards]
        read_checkpoint(path, boxes, leave_out=["optimizer."])
        return engine.logits(next(microbatches(config, engine.mesh, 0)), config.batch.sequence_length)


def change(old: torch.Tensor, new: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((new - old).abs().max() / old.abs().max())


# fp32 sums of the experts' outputs in place of one of them.
ROUNDING = 1e-6


def test_the_commands_make_a_model_that_computes_the_same_and_trains(
    corpus: Path, dense: Path, command: CommandProcess, tmp_path: Path
) -> None:
    config, out = moe_config(corpus, tmp_path / "elsewhere"), tmp_path / "out"
    file = written(config, tmp_path)
    made = command("upcycle", dense, file, out)
    path = out / "checkpoints" / "step_00000000"
    assert (made.code, made.err) == (0, "")
    assert made.out.split("\n")[-4:-1] == [
        f"upcycled: {path}",
        "computes what the dense model does",
        f"to go on: pretrain train {file} --set run.directory={out}",
    ]
    assert verify_checkpoint(path) == []
    assert change(logits_of(newest(dense)), logits_of(path)) < ROUNDING

    result = command("train", file, "--set", f"run.directory={out}")
    assert result.code == 0, result.err
    assert f"resumed from {path} at step 0 of {STEPS}" in result.out
    found = rows(out, "train")
    assert [(row["step"], row["tokens"]) for row in found] == [(step, 256 * step) for step in range(1, STEPS + 1)]
    # It goes on where the dense model was, and that was no longer at the start.
    (*_, last), first = rows(dense, "train"), rows(dense, "train")[0]
    assert abs(found[0]["loss"] - last["loss"]) < 0.5 * (first["loss"] - last["loss"])
    assert [event["checkpoint"] for event in events(out, "restart")] == ["step_00000000"]
    for name in ("step_00000000", f"step_{STEPS:08d}"):
        state = read_state(out / "checkpoints" / name)
        assert state["origin"] == {
            "upcycled_from": str(newest(dense).resolve()),
            "sha256": read_manifest(newest(dense)).sha256,
            "step": TRAINED,
            "tokens": 256 * TRAINED,
            "noise_std": 0.0,
            "noise_fraction": 0.5,
            "router_std": 0.02,
            "seed": 11,
        }
        assert state["optimizer"] == {"kind": "adamw", "step": state["step"]}


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ({"router": {"normalize_top_k": False}}, [], "model.router.normalize_top_k = false"),
        ({"top_k": 1, "router": {"score_function": "sigmoid"}}, [], "a sigmoid score that is not normalised"),
        ({"router": {"scaling_factor": 2.5}}, [], "model.router.scaling_factor = 2.5"),
        ({}, ["--noise-std", "0.02", "--noise-fraction", "0.1"], "noise"),
    ],
)
def test_what_computes_something_else_says_so(
    corpus: Path,
    dense: Path,
    command: CommandProcess,
    tmp_path: Path,
    model: dict[str, Any],
    options: list[str],
    reason: str,
) -> None:
    """And, as a negative control, the comparison of logits sees it."""
    file = written(moe_config(corpus, tmp_path / "run", model=model), tmp_path)
    made = command("upcycle", dense, file, tmp_path / "out", *options)
    assert made.code == 0, made.err
    assert f"not the dense model's function: {reason}" in made.out
    assert change(logits_of(newest(dense)), logits_of(newest(tmp_path / "out"))) > 1000 * ROUNDING


@pytest.mark.parametrize("kind", ["adamw", "muon", "soap", "adam_mini"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_finds_all_it_looks_for_as_if_fresh(
    corpus: Path, dense: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    """The very tensors of a run that begins, with the states of the optimizer at zero."""
    config = moe_config(corpus, tmp_path / "run", precision=precision, optim={"kind": kind, "lr": 1e-3})
    found = tensors(upcycle(dense, config, tmp_path / "out", EXACT))
    with single_process(), engine_of(config) as engine:
        optimizer = ShardedOptimizer(engine.shards, config.optim, engine.mesh.groups)
        fresh = {box.key: box for box in checkpoint_tensors(engine, optimizer)}
        assert {key: (values.dtype, tuple(values.shape)) for key, values in found.items()} == {
            key: (box.dtype, tuple(box.global_shape)) for key, box in fresh.items()
        }
    states = [key for key in found if key.startswith("optimizer.") and not key.startswith("optimizer.master.")]
    biases = [key for key in found if key.endswith("expert_bias")]
    assert len(states) > len(fresh) // 3
    assert len(biases) == 2
    assert not any(found[key].any() for key in [*states, *biases])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_is_a_copy(
    corpus: Path, trained: Callable[[str, bool], Path], tmp_path: Path, precision: str, tied: bool
) -> None:
    source = newest(trained(precision, tied))
    config = moe_config(corpus, tmp_path / "run", precision=precision)
    old, new = tensors(source), tensors(upcycle(source, config, tmp_path / "out", EXACT))
    prefixes = ["", "optimizer.master."] if precision == "bf16" else [""]
    for prefix in prefixes:
        for key, values in new.items():
            plain = key.removeprefix(prefix)
            if not key.startswith(prefix) or plain.startswith("optimizer.") or "router" in plain:
                continue
            if tied and plain == "output_layer.weight":
                expected = old[prefix + "embedding.word_embeddings.weight"]
            else:
                expected = old[prefix + plain.replace(".mlp.experts.", ".mlp.")]
            assert torch.equal(values, expected.expand(values.shape)), key
    kept = {key for key in new if "experts" in key and not key.startswith("optimizer.exp")}
    assert len(kept) == 4 * len(prefixes)
    if precision == "bf16":
        for key in (key for key in new if f"optimizer.master.{key}" in new):
            assert torch.equal(new[key], new[f"optimizer.master.{key}"].bfloat16()), key


def test_tables_stay_tied(corpus: Path, dense: Path, tmp_path: Path) -> None:
    config = moe_config(corpus, tmp_path / "run", model={"tie_embeddings": True})
    new = tensors(upcycle(dense, config, tmp_path / "out", EXACT))
    assert not [key for key in new if "output_layer" in key]


def test_dense_layers_of_the_mixture_are_copies_too(corpus: Path, dense: Path, tmp_path: Path) -> None:
    config = moe_config(corpus, tmp_path / "run", model={"first_dense_layers": 1, "ffn_size": 48})
    old, new = tensors(newest(dense)), tensors(upcycle(dense, config, tmp_path / "out", EXACT))
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(new[key], old[key])
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight" in new


# ----- what tells experts apart


def experts_and_source(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> Iterator[tuple[Any, Any]]:
    """(matrix of an expert, that of the dense model) of all experts and layers."""
    for layer in range(2):
        for i in (1, 2):
            key = f"decoder.layers.{layer}.mlp.experts.linear_fc{i}.weight"
            for expert in new[key]:
                source = old[key.replace(".experts.", ".")]
                yield from zip(expert, source, strict=True) if i == 1 else [(expert, source)]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_noise_touches_the_share_it_is_told_to(corpus: Path, dense: Path, tmp_path: Path, fraction: float) -> None:
    config = moe_config(corpus, tmp_path / "run")
    options = UpcycleOptions(noise_std=0.01, noise_fraction=fraction)
    old, new = tensors(newest(dense)), tensors(upcycle(dense, config, tmp_path / "out", options))
    noise = torch.stack([(expert - source).flatten() for expert, source in experts_and_source(new, old)])
    touched = noise != 0
    # Of 24 matrices of 1536 entries: five standard deviations of a binomial share.
    assert (touched.float().mean(dim=1) - fraction).abs().max() <= 5 * (fraction * (1 - fraction) / 1536) ** 0.5
    assert float(noise[touched].std()) == pytest.approx(0.01, rel=0.03)
    assert float(noise[touched].mean()) == pytest.approx(0.0, abs=3e-4)
    # Every matrix has its own, in places of its own.
    assert len(torch.unique(touched, dim=0)) == (1 if fraction == 1 else len(noise))
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.2
    # All else is as without noise.
    plain = tensors(upcycle(dense, config, tmp_path / "plain", EXACT))
    assert {key for key in new if not torch.equal(new[key], plain[key])} == {
        f"decoder.layers.{layer}.mlp.experts.linear_fc{i}.weight" for layer in (0, 1) for i in (1, 2)
    }


@pytest.mark.parametrize(("std", "expected"), [(None, 0.02), (0.5, 0.5), (0.0, 0.0)])
def test_router(corpus: Path, dense: Path, tmp_path: Path, std: float | None, expected: float) -> None:
    config = moe_config(corpus, tmp_path / "run")
    new = tensors(upcycle(dense, config, tmp_path / "out", UpcycleOptions(router_std=std)))
    for layer in range(2):
        router = new[f"decoder.layers.{layer}.mlp.router.weight"]
        assert float(router.std()) == pytest.approx(expected, rel=0.25)
    assert not torch.equal(*(new[f"decoder.layers.{layer}.mlp.router.weight"] for layer in (0, 1))) or not expected


def test_bytes_depend_on_the_seed_alone(
    corpus: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moe_config(corpus, tmp_path / "run", precision="bf16")
    options = UpcycleOptions(noise_std=0.02, seed=3)
    whole = tensor_bytes(upcycle(dense, config, tmp_path / "whole", options))
    other = tensor_bytes(upcycle(dense, config, tmp_path / "other", options.model_copy(update={"seed": 4})))
    differing = {key.removeprefix("optimizer.master.") for key in whole if whole[key] != other[key]}
    assert len(differing) == 6
    assert all("experts" in key or "router" in key for key in differing)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(pieces, "BOX_ENTRIES", 4000)
    cut = upcycle(dense, config, tmp_path / "cut", options, progress=lambda done, of: seen.append((done, of)))
    assert tensor_bytes(cut) == whole
    index = json.loads((cut / "index.json").read_text())["tensors"]
    assert len(index["decoder.layers.0.mlp.experts.linear_fc1.weight"]["boxes"]) == 4
    assert len(seen) == sum(len(tensor["boxes"]) for tensor in index.values())
    assert seen[-1][0] == seen[-1][1]


def _train(config: Config) -> None:
    assert train(config) == 0


def test_any_layout_starts_from_it(corpus: Path, dense: Path, tmp_path: Path) -> None:
    losses = {}
    for name, ranks, parallel in (("one", 1, {}), ("EP2 in TP2", 2, {"expert": 2, "tensor": 2})):
        config = moe_config(corpus, tmp_path / name, parallel=parallel)
        upcycle(dense, config, tmp_path / name, UpcycleOptions(noise_std=0.02))
        run_ranks(_train, ranks, config)
        losses[name] = [row["loss"] for row in rows(tmp_path / name, "train")]
    assert losses["EP2 in TP2"] == pytest.approx(losses["one"], rel=1e-5)
    assert len(set(losses["one"])) == STEPS


def test_every_site_starts_from_the_same_bytes(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """And trains on, its frozen experts without a state."""
    plain, options = moe_config(corpus, tmp_path / "out"), UpcycleOptions(noise_std=0.02)
    alone = tensor_bytes(upcycle(dense, plain, tmp_path / "alone", options))
    keys = DecentralConfig(
        kind="spes", sites=2, sync_every_steps=2, transport="fixed", coordinator=f"127.0.0.1:{free_port()}"
    )
    sites = [at_site(plain.model_copy(update={"decentral": keys}), site) for site in (0, 1)]
    for site, config in enumerate(sites):
        path = upcycle(dense, config, tmp_path / "out", options)
        assert path == tmp_path / "out" / f"site_{site}" / "checkpoints" / "step_00000000"
        assert verify_checkpoint(path) == []
    # Together they have what a run in one place begins with, each state once.
    assert tensor_bytes(join_sites(tmp_path / "out", tmp_path / "joined")) == alone
    run_sites(_train, 1, [[config] for config in sites])
    first, second = (rows(config.site_directory, "train") for config in sites)
    # Each with its part of the batch, from where the dense model was.
    assert first[0]["loss"] != second[0]["loss"]
    dense_losses = [row["loss"] for row in rows(dense, "train")]
    for losses in (first, second):
        assert abs(losses[0]["loss"] - dense_losses[-1]) < 0.5 * (dense_losses[0] - dense_losses[-1])
    assert [len(losses) for losses in (first, second)] == [STEPS, STEPS]
    for config in sites:
        assert read_state(newest(config.site_directory))["origin"]["noise_std"] == 0.02


# ----- what is refused


def refused(source: Path, config: Config, out: Path, error: type[UserError], words: str) -> UserError:
    """Nothing is left behind, and the source is as it was."""
    before, there = contents(source), contents(out) if out.exists() else None
    with pytest.raises(error, match=words) as raised:
        upcycle(source, config, out, EXACT)
    assert contents(source) == before
    assert (contents(out) if out.exists() else None) == there
    return raised.value


def test_every_misfit_is_named_at_once(corpus: Path, trained: Callable[[str, bool], Path], tmp_path: Path) -> None:
    source = newest(trained("fp32", False))
    wrong = {
        "num_layers": 3,
        "head_dim": 8,
        "num_query_groups": 4,
        "qk_norm": False,
        "norm_eps": 1e-6,
        "expert_ffn_size": 32,
        "first_dense_layers": 1,
        "ffn_size": 64,
        "shared_expert_ffn_size": 16,
        "tie_embeddings": True,
    }
    config = moe_config(corpus, tmp_path / "run", model=wrong)
    assert check(config, 1) == []
    error = refused(source, config, tmp_path / "out", ConfigError, "9 problems")
    assert isinstance(error, ConfigError)
    assert list(error.problems) == [
        f"model.num_layers = 3: must be that of {source}; set 2",
        f"model.num_query_groups = 4: must be that of {source}; set 2",
        f"model.head_dim = 8: must be that of {source}; set 16",
        f"model.qk_norm = false: must be that of {source}; set true",
        f"model.norm_eps = 1e-06: must be that of {source}; set 1e-05",
        f"model.expert_ffn_size = 32: must be model.ffn_size of {source}, whose MLP is copied; set 48",
        f"model.ffn_size = 64: must be model.ffn_size of {source}, whose MLP is copied; set 48",
        f"model.shared_expert_ffn_size = 16: nothing in {source} makes shared experts; set 0",
        f"model.tie_embeddings = true: {source} has an output layer of its own; set false",
    ]


def test_refused_what_is_not_dense_and_what_is_no_mixture(corpus: Path, dense: Path, tmp_path: Path) -> None:
    none = dense_config(corpus, tmp_path / "run")
    refused(dense, none, tmp_path / "out", ConfigError, r"model.num_experts = 0: a dense model; give")
    made = upcycle(dense, moe_config(corpus, tmp_path / "run"), tmp_path / "moe", EXACT)
    words = r"step_00000000: has 4 experts a layer; give that of a dense model, or grow this one"
    refused(made, moe_config(corpus, tmp_path / "run"), tmp_path / "out", ConfigError, words)
    words = "moe: has checkpoints already; give a new folder"
    refused(dense, moe_config(corpus, tmp_path / "run"), tmp_path / "moe", CheckpointError, words)


def test_refused_data_that_is_not_there(corpus: Path, dense: Path, tmp_path: Path) -> None:
    absent = {"train": [{"prefix": str(tmp_path / "absent")}]}
    refused(dense, moe_config(corpus, tmp_path / "run", data=absent), tmp_path / "out", DataError, "absent")


def test_another_blend_cannot_go_on_from_it(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """As any checkpoint, it is of a run with its data: its position means the samples of these."""
    config = moe_config(corpus, tmp_path / "out")
    upcycle(dense, config, tmp_path / "out", EXACT)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 12})})
    with pytest.raises(AssertionError, match=r"data\.train: another blend"):
        run_ranks(_train, 1, other)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--noise-std", "-1", "--noise-std -1: must be greater than or equal to 0; give another value"),
        ("--noise-fraction", "1.5", "--noise-fraction 1.5: must be less than or equal to 1; give another value"),
        ("--router-std", "wide", "--router-std wide: must be a valid number"),
        ("--seed", "x", "--seed x: must be a valid integer"),
    ],
)
def test_options_are_checked(
    corpus: Path, dense: Path, command: CommandProcess, tmp_path: Path, option: str, value: str, message: str
) -> None:
    file = written(moe_config(corpus, tmp_path / "run"), tmp_path)
    made = command("upcycle", dense, file, tmp_path / "out", f"{option}={value}")
    assert made.code == 2
    assert message in made.err
    assert not (tmp_path / "out").exists()


def test_the_published_start_fits() -> None:
    """Qwen3-1.7B as SPES upcycles it; with other sizes it does not."""
    dense, moe = (load_config(CONFIGS / "models" / f"{name}.toml").model for name in ("qwen3-1.7b", "spes-9b"))
    assert misfits(dense, moe, where="it") == []
    smaller = load_config(CONFIGS / "models" / "spes-7b.toml").model
    assert len(misfits(dense, smaller, where="it")) == 6


def test_a_checkpoint_of_a_run_is_meant_by_its_folder(corpus: Path, dense: Path, tmp_path: Path) -> None:
    config = moe_config(corpus, tmp_path / "run")
    assert tensor_bytes(upcycle(dense, config, tmp_path / "a", EXACT)) == tensor_bytes(
        upcycle(newest(dense), config, tmp_path / "b", EXACT)
    )
    assert newest(dense) == checkpoint(dense_config(corpus, dense), str(TRAINED))
