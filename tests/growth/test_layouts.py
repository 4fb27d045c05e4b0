"""A model grown from any layout to any other is, byte for byte, the one that a single process grows.

All layouts start from the same weights and states, drawn for the logical tensors: training itself rounds differently
on each.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica

from pretrain.checkpoint import read_checkpoint, write_checkpoint
from pretrain.checkpoint.ranks import Ranks
from pretrain.config.rules import check
from pretrain.config.schema import Config, ParallelConfig
from pretrain.config.stages import BUFFER_BYTES, stages
from pretrain.growth import live, values
from pretrain.growth.history import next_growth
from pretrain.growth.live import Grown, grow_model, moving_tensors
from pretrain.growth.maps import ages
from pretrain.growth.scores import Scores, add_scores, no_scores
from pretrain.model.initialise import draw_normal
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.optim.states import split_state_key
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import Mesh, build_mesh
from pretrain.platform import cpu_adapter
from pretrain.run import checkpoint_tensors
from tests.helpers.configs import make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import CPU, microbatches, single_process
from tests.helpers.replicas import differing_replicas

STEPS_BEFORE = 5
TINY_BUFFER = 2048

Tensors = Mapping[str, torch.Tensor]

START: dict[str, Any] = {
    "run": {"directory": "runs/test", "precision": "fp32", "seed": 3},
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 2,
        "first_dense_layers": 1,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 8,
        "qk_norm": True,
        "ffn_size": 24,
        "num_experts": 4,
        "top_k": 2,
        "expert_ffn_size": 8,
        "shared_expert_ffn_size": 8,
        "router": {"score_function": "sigmoid", "bias_update_rate": 1e-3, "aux_loss": 1e-2},
    },
    "batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 2},
    "budget": {"steps": 10},
    "optim": {"lr": 1e-3},
}

EVERYTHING: dict[str, Any] = {
    "depth": {"keep_first": 1, "factor": 3},
    "experts": {"factor": 2, "noise": 0.05, "order": "interleave"},
    "hidden": {"factor": 2},
    "ffn": {"factor": 1.5, "init": "random"},
    "expert_ffn": {"factor": 2, "noise": 0.05},
    "shared_expert_ffn": {"factor": 1.5},
    "query_groups": {"factor": 2},
    "rewarm": {"steps": 3},
}
HELD = {"top_k": "hold", "noise": 0.01, "bias_noise": 0.01, "utility": {"steps": 2}}
UNREACHED = {"top_k": "hold", "noise": 0.05, "exact_start": True}
PRESERVING: dict[str, Any] = {
    "depth": {"identity": True},
    "experts": {"noise": 0.0},
    "hidden": {"factor": 2},
    "ffn": {"factor": 2, "init": "uneven", "split": 0.25},
    "expert_ffn": {"factor": 2},
    "shared_expert_ffn": {"factor": 2},
    "query_groups": {"factor": 2},
}


def case(growth: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Config:
    return make_config(START | {"growth": [{"at_step": STEPS_BEFORE, **growth}]}, {**(changes or {})})


BF16, MUON = {"run.precision": "bf16"}, {"optim.kind": "muon"}
CASES: dict[str, Config] = {
    "adamw fp32": case(EVERYTHING),
    "adamw bf16": case(EVERYTHING | {"optimizer_state": "copy"}, BF16),
    "muon fp32": case(EVERYTHING | {"optimizer_state": "reset"}, MUON),
    "muon bf16": case(EVERYTHING | {"optimizer_state": "copy"}, MUON | BF16 | {"model.tie_embeddings": True}),
    "utility": case({"depth": {"method": "stack"}, "experts": HELD}),
    "exact start": case({"experts": UNREACHED, "hidden": {}}),
    "exact state": case({"experts": {"noise": 0.0}, "optimizer_state": "exact"}, MUON),
    "preserving": case(PRESERVING),
    "preserving, tied": case(PRESERVING, {"model.tie_embeddings": True}),
    # Enough layers for interleaved stages before it, too.
    "four layers": case({"experts": {"noise": 0.05}, "hidden": {}}, {"model.num_layers": 4}),
    # States that are sums over an axis, of one number a matrix, or of blocks.
    "adam_mini": case(EVERYTHING, {"optim.kind": "adam_mini"}),
    "muonh bf16": case(EVERYTHING | {"optimizer_state": "copy"}, BF16 | {"optim.kind": "muonh"}),
    "soap": case(EVERYTHING, {"optim.kind": "soap", "optim.soap": {"block_size": 2}}),
}
FIRST = "adamw fp32"
# Those after which the model computes what it did.
PRESERVED = ("preserving", "preserving, tied", "exact start", "exact state")
# fp32 sums in another order: some times 2**-24 of the largest logit; weights in bf16 are exact copies all the same.
ROUNDING = 2e-5

LAYOUTS: dict[str, dict[str, int]] = {
    "DP4": {},
    "EP4": {"expert": 4},
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "ETP2": {"tensor": 2, "expert_tensor": 2},
    "PP2x2": {"pipeline": 2, "pipeline_chunks": 2},
}
OF_TWO: dict[str, dict[str, int]] = {"DP2": {}, "EP2": {"expert": 2}, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}


def pairs(name: str, size: int) -> list[tuple[str, str]]:
    """Layouts before and after, for a case. The first case goes from each to each; the function is watched on each."""
    if name == "four layers":
        return [("PP2x2", "TP2 EP2"), ("PP2x2", "PP2x2"), ("EP4", "PP2x2")] if size == 4 else []
    after = [*(LAYOUTS if size == 4 else OF_TWO)]
    # Two layers make no interleaved stages.
    before = [layout for layout in after if layout != "PP2x2"]
    after = after if CASES[name].growth[0].depth else before
    if name == FIRST and size == 4:
        return list(product(before, after))
    number = [*CASES].index(name)
    ring = [(before[(index + number) % len(before)], layout) for index, layout in enumerate(after)]
    return ring if name == "preserving" else ring[number % 2 :: 2]


def on(config: Config, layout: Mapping[str, int]) -> Config:
    return config.model_copy(update={"parallel": ParallelConfig(**layout)})


def draw(tensors: Sequence[ShardedTensor], logical: Mapping[str, LogicalTensor]) -> None:
    """Give boxes of weights, states and biases the values that their keys stand for."""
    for tensor in tensors:
        state, key = split_state_key(tensor.key)
        box = draw_normal(11, tensor.key, tensor.global_shape, tensor.global_offset, tensor.local_shape)
        if state is None:
            base, scale = {"norm": (1.0, 0.1), "router_bias": (0.0, 0.01)}.get(logical[key].kind, (0.0, 0.1))
            tensor.data.copy_(base + scale * box)
        else:
            tensor.data.copy_(box.square() if state == "exp_avg_sq" else box)


class KeptMeshes:
    """Meshes of all layouts asked for so far, of which one is in force: making one takes dozens of process groups."""

    def __init__(self) -> None:
        self._meshes: dict[str, tuple[Mesh, dict[str, Any]]] = {}

    def of(self, parallel: ParallelConfig) -> Mesh:
        """The mesh of a layout, which megatron-core takes for the only one. Collective."""
        name = repr(parallel)
        if name not in self._meshes:
            parallel_state.destroy_model_parallel()
            self._meshes[name] = build_mesh(parallel, CPU), {**vars(parallel_state)}
        mesh, state = self._meshes[name]
        vars(parallel_state).update(state)
        return mesh


@contextmanager
def layouts_of_ranks() -> Iterator[KeptMeshes]:
    cpu_adapter.apply()
    try:
        yield KeptMeshes()
    finally:
        parallel_state.destroy_model_parallel()


class Before:
    """The model before it grows, on a layout: its tensors, and what it computes."""

    def __init__(self, config: Config, layout: Mapping[str, int], meshes: KeptMeshes) -> None:
        mesh = meshes.of(ParallelConfig(**layout))
        engine = build_engine(on(config, layout), mesh)
        optimizer = ShardedOptimizer(engine.shards, config.optim, mesh.groups)
        optimizer.load_state_dict({"kind": config.optim.kind, "step": STEPS_BEFORE})
        self.tensors = moving_tensors(engine.shards, optimizer)
        draw(self.tensors, {tensor.key: tensor for tensor in logical_tensors(config.model)})
        optimizer.load_finished()
        self.counter = optimizer.state_dict()
        self.logits = logits_of(engine, config)


def logits_of(engine: Engine, config: Config) -> torch.Tensor:
    """Of one batch, the same for every layout."""
    return engine.logits(probe(config), config.batch.sequence_length // 2)


def probe(config: Config) -> dict[str, torch.Tensor]:
    tokens = torch.arange(2 * config.batch.sequence_length).mul(7) % config.model.vocab_size
    return {"tokens": tokens.view(2, -1)}


def grow(
    config: Config, before: Before, target: Mapping[str, int], meshes: KeptMeshes, *, buffer_bytes: int = BUFFER_BYTES
) -> Grown:
    scores: Scores = {str(layer): [2.0, 1.0, 4.0, 3.0] for layer in config.model.moe_layers}
    stage = on(stages(config)[1].config, target)
    return grow_model(
        [next_growth(config, 0, scores=scores)],
        list(before.tensors),
        stage,
        meshes.of(stage.parallel),
        optimizer_state=before.counter,
        ranks=Ranks(),
        buffer_bytes=buffer_bytes,
    )


def held(grown: Grown) -> list[ShardedTensor]:
    """All that a rank has of the grown model: masters, states, biases and, in the model's precision, the weights."""
    weights = [shard.sharded(key=f"model.{shard.key}") for shard in grown.engine.shards]
    return [*moving_tensors(grown.engine.shards, grown.optimizer), *weights]


def problems(tensors: Sequence[ShardedTensor], expected: Tensors) -> list[str]:
    """Keys of which this rank has other bytes than expected, or all ranks together not every entry. Collective."""
    wrong = []
    entries = dict.fromkeys(expected, 0)
    for tensor in tensors:
        box = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, tensor.local_shape, strict=True))
        if bits(tensor.data) != bits(expected[tensor.key][box]):
            wrong.append(tensor.key)
        if is_main_replica(tensor.replica_id):
            entries[tensor.key] += math.prod(tensor.local_shape)
    total = torch.tensor(list(entries.values()))
    dist.all_reduce(total)
    sizes = [tensor.numel() for tensor in expected.values()]
    return wrong + [
        f"{key}: {n} of {size}" for key, n, size in zip(entries, total.tolist(), sizes, strict=True) if n != size
    ]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def step_after(config: Config) -> int:
    return 0 if config.growth[0].optimizer_state == "reset" else STEPS_BEFORE


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change of a logit over the largest logit."""
    return float((after - before).abs().max() / before.abs().max())


def grow_alone(folder: Path) -> dict[str, Any]:
    """Grow every case in this process; writes the tensors to `folder`, returns figures."""
    figures: dict[str, Any] = {"changes": {}, "scores": {}}
    with single_process(), layouts_of_ranks() as meshes:
        for name, config in CASES.items():
            assert check(config, 1) == []
            before = Before(config, {}, meshes)
            grown = grow(config, before, {}, meshes)
            torch.save({tensor.key: tensor.data for tensor in held(grown)}, folder / f"{name}.pt")
            assert grown.optimizer.state_dict()["step"] == step_after(config)
            figures["changes"][name] = change(before.logits, logits_of(grown.engine, config))
        figures["scores"] = scores_on(CASES["utility"], {}, meshes)
    return figures


def scores_on(config: Config, layout: Mapping[str, int], meshes: KeptMeshes) -> Scores:
    """Utility of the experts in one step of the untrained model."""
    mesh = meshes.of(ParallelConfig(**layout))
    engine = build_engine(on(config, layout), mesh)
    engine.forward_backward(microbatches(on(config, layout), mesh, 0))
    scores = no_scores(config.model.moe_layers, config.model.num_experts)
    add_scores(scores, engine.shards, config.model.num_experts)
    return scores


def check_growth(name: str, before: Before, target: str, meshes: KeptMeshes, expected: Tensors, **how: Any) -> Grown:
    config = CASES[name]
    grown = grow(config, before, {**LAYOUTS, **OF_TWO}[target], meshes, **how)
    assert problems(held(grown), expected) == [], (name, target)
    assert differing_replicas(grown.engine.shards) == []
    assert grown.optimizer.state_dict() == {"kind": config.optim.kind, "step": step_after(config)}
    if name in PRESERVED:
        assert change(before.logits, logits_of(grown.engine, config)) < ROUNDING, (name, target)
    return grown


def check_pairs(name: str, size: int, folder: Path, meshes: KeptMeshes) -> None:
    expected = torch.load(folder / f"{name}.pt")
    for source, of_source in groupby(sorted(pairs(name, size)), key=lambda pair: pair[0]):
        before = Before(CASES[name], {**LAYOUTS, **OF_TWO}[source], meshes)
        for _, target in of_source:
            check_growth(name, before, target, meshes, expected)


def check_tiny_buffers(folder: Path, meshes: KeptMeshes) -> None:
    """The same through buffers of a few hundred entries."""
    expected = torch.load(folder / f"{FIRST}.pt")
    before = Before(CASES[FIRST], LAYOUTS["PP2 EP2"], meshes)
    large = check_growth(FIRST, before, "TP2 EP2", meshes, expected).traffic
    tiny = check_growth(FIRST, before, "TP2 EP2", meshes, expected, buffer_bytes=TINY_BUFFER).traffic
    assert large.rounds == 1
    assert tiny.rounds > 10
    assert 0 < tiny.buffer_bytes <= 2 * TINY_BUFFER
    assert (tiny.received_bytes, tiny.local_bytes) == (large.received_bytes, large.local_bytes)


def check_through_a_checkpoint(folder: Path, meshes: KeptMeshes) -> None:
    """Grown without expert parallelism, saved, and loaded with it: as if grown with it."""
    name = "adamw bf16"
    config, expected = CASES[name], torch.load(folder / f"{name}.pt")
    before = Before(config, LAYOUTS["DP4"], meshes)
    grown = grow(config, before, LAYOUTS["DP4"], meshes)
    path = folder / "checkpoint"
    write_checkpoint(path, checkpoint_tensors(grown.engine, grown.optimizer), step=1, state={}, config_toml="")
    stage = on(stages(config)[1].config, LAYOUTS["EP4"])
    mesh = meshes.of(stage.parallel)
    engine = build_engine(stage, mesh)
    optimizer = ShardedOptimizer(
        engine.shards, stage.optim, mesh.groups, ages=ages([next_growth(config, 0, scores={})])
    )
    loaded = Grown(engine, optimizer, grown.traffic)
    assert problems(held(loaded), expected) != [], "a fresh model is another one"
    read_checkpoint(path, checkpoint_tensors(engine, optimizer))
    optimizer.load_finished()
    assert problems(held(loaded), expected) == []


def check_controls(folder: Path, meshes: KeptMeshes) -> None:
    """What would go unseen by a comparison that does not look."""
    config, expected, layout = CASES[FIRST], torch.load(folder / f"{FIRST}.pt"), LAYOUTS["TP2 EP2"]
    before = Before(config, layout, meshes)
    # Noise of each rank's own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "draw_normal", lambda seed, tag, shape, offset, extent: torch.randn(extent))
        torch.manual_seed(dist.get_rank())
        grown = grow(config, before, layout, meshes)
    assert "decoder.layers.1.mlp.router.weight" in differing_replicas(grown.engine.shards)
    assert any("experts.linear_fc1" in key for key in problems(held(grown), expected))
    # State that stays behind, on one rank.
    with pytest.MonkeyPatch.context() as patch:
        transplant = live.transplant

        def forgetful(point: Any, old: Any, new: list[ShardedTensor], **rest: Any) -> Any:
            if dist.get_rank() == 1:
                new = [tensor for tensor in new if not tensor.key.startswith("optimizer.exp_avg.")]
            return transplant(point, old, new, **rest)

        patch.setattr(live, "transplant", forgetful)
        wrong = problems(held(grow(config, before, layout, meshes)), expected)
    assert bool(wrong) == (dist.get_rank() == 1)
    assert all(key.startswith("optimizer.exp_avg.") for key in wrong)
    # A rank that says nothing of what it has: all know, and nothing is built.
    if dist.get_rank() == 2:
        before.tensors = [tensor for tensor in before.tensors if "experts" not in tensor.key]
    with pytest.raises(RuntimeError, match=r"experts.linear_fc\d.weight: the held boxes do not cover the wanted one"):
        grow(config, before, layout, meshes)


def all_checks(size: int, folder: Path) -> dict[str, Scores]:
    """Returns the utility of the experts on every layout."""
    with layouts_of_ranks() as meshes:
        for name in CASES:
            check_pairs(name, size, folder, meshes)
        if size == 4:
            check_tiny_buffers(folder, meshes)
            check_through_a_checkpoint(folder, meshes)
            check_controls(folder, meshes)
        layouts = {name: layout for name, layout in (LAYOUTS if size == 4 else OF_TWO).items() if name != "PP2x2"}
        return {name: scores_on(CASES["utility"], layout, meshes) for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[Path, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), grow_alone(Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_layout_to_any_other(alone: tuple[Path, dict[str, Any]], size: int) -> None:
    folder, figures = alone
    for scores in run_ranks(all_checks, size, size, folder):
        for layout, of_layers in scores.items():
            for layer, row in of_layers.items():
                # Sums of squares of gradients that round differently.
                assert row == pytest.approx(figures["scores"][layer], rel=1e-4), layout


def test_one_process_preserves_what_should_be_preserved(alone: tuple[Path, dict[str, Any]]) -> None:
    """And, as a negative control, the comparison of logits sees all other growths."""
    _, figures = alone
    assert {name for name, changed in figures["changes"].items() if changed < ROUNDING} == set(PRESERVED)
    assert all(changed > 50 * ROUNDING for name, changed in figures["changes"].items() if name not in PRESERVED)
    # Every expert's utility is its own, so that a wrong order would be seen.
    assert all(len(set(row)) == len(row) for row in figures["scores"].values())


def test_every_layout_is_grown_from_and_to() -> None:
    for size, layouts in ((2, OF_TWO), (4, LAYOUTS)):
        before, after = (
            {name: {pair[end] for pair in pairs(name, size)} for name in CASES if pairs(name, size)} for end in (0, 1)
        )
        assert set().union(*before.values()) == set().union(*after.values()) == set(layouts)
        assert after["preserving"] == set(layouts)
    assert len(set(pairs(FIRST, 4))) == 6 * 7


def test_what_is_compared_tells_cases_apart(alone: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = alone
    first, copied = (torch.load(folder / f"{name}.pt") for name in ("adamw fp32", "adamw bf16"))
    assert first.keys() == copied.keys()
    different = {key for key in first if bits(first[key]) != bits(copied[key])}
    # Another policy for the state, and weights of another precision; masters and biases are the same.
    assert {key.split(".")[0] for key in different} == {"optimizer", "model"}
    assert any(first[key].abs().max() > 0 for key in first if key.startswith("optimizer.exp_avg_sq."))
