"""A layout changes nothing: sharded optimizers against one process, on gloo."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.model.logical import LogicalTensor, logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim import exchange
from pretrain.optim.ages import Ages
from pretrain.optim.exchange import check_same, map_whole, spread
from pretrain.optim.muon import orthogonalise
from pretrain.optim.sharded import ShardedOptimizer
from tests.helpers.distributed import run_ranks
from tests.optim import moving
from tests.optim.build import (
    KINDS,
    MOE,
    Layout,
    boxes,
    config_of,
    full_value,
    grown_twice,
    here,
    make_groups,
    make_shards,
    part_of,
    set_grads,
)
from tests.optim.moving import moving_worker, straight

STEPS = 4
CONFIGS = {
    "adamw": OptimConfig(lr=1e-2),
    "muon": OptimConfig(kind="muon", lr=1e-2, muon=MuonConfig(lr=2e-2), routes={"*.router.weight": "muon"}),
    "cautious": config_of("cautious"),
    "muonh": config_of("muonh"),
}

# Name: world, tensor, expert and expert tensor parallel size, optimizer, precision.
LAYOUTS = {
    "dp2": (2, 1, 1, 1, "muon", torch.float32),
    "dp2 adamw bf16": (2, 1, 1, 1, "adamw", torch.bfloat16),
    "tp2": (2, 2, 1, 1, "muon", torch.float32),
    "dp3 bf16": (3, 1, 1, 1, "muon", torch.bfloat16),
    "tp4 ep2 etp2": (4, 4, 2, 2, "muon", torch.float32),
    "tp2 dp2 ep2": (4, 2, 2, 1, "muon", torch.float32),
    "tp2 dp2 ep2 adamw": (4, 2, 2, 1, "adamw", torch.float32),
    "dp4 ep2 etp2": (4, 1, 2, 2, "muon", torch.float32),
    "tp2 dp2 etp2": (4, 2, 1, 2, "muon", torch.float32),
}


NEWER = (1.3, 0.4)
"""Learning rates of newer entries, where there are any."""


def build(config: OptimConfig, layout: Layout, dtype: torch.dtype = torch.float32, *, ages: Ages | None = None):
    shards = make_shards(MOE, layout, dtype=dtype)
    return shards, ShardedOptimizer(shards, config, make_groups(layout), ages=ages)


def run(shards: list[Shard], optimizer: ShardedOptimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        set_grads(shards, str(step))
        norms.append(optimizer.step(1.0 - step / 20, NEWER).grad_norm)
    return norms


def single(kind: str, dtype: torch.dtype = torch.float32, *, ages: Ages | None = None):
    shards, optimizer = build(CONFIGS[kind], Layout(), dtype, ages=ages)
    norms = run(shards, optimizer, range(STEPS))
    return boxes(shards), norms


def naive_norm(shards: list[Shard]) -> float:
    """What comes out if every rank adds all it has: copies count as often as they exist."""
    grads = [s.tensor.main_grad.double() for s in shards if s.logical.trainable]
    squares = torch.stack([grad.square().sum() for grad in grads]).sum()
    dist.all_reduce(squares)
    return float(squares.sqrt())


def layout_worker(
    tp: int, ep: int, etp: int, kind: str, dtype: torch.dtype = torch.float32, *, ages: Ages | None = None
):
    """Weights as boxes with their offsets, norms, and what each rank owns, after a short run."""
    layout = here(tp, ep, etp)
    shards, optimizer = build(CONFIGS[kind], layout, dtype, ages=ages)
    norms = run(shards, optimizer, range(STEPS))
    set_grads(shards, "0")
    owned = [(s.key, s.global_offset, s.replica_id) for s in optimizer.named_state()]
    places = [(s.key, s.offset, s.shape) for s in shards]
    return boxes(shards), places, norms, naive_norm(shards), owned, optimizer.state_bytes()


def assert_parts_equal(results, full: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every rank's boxes are the unsharded tensors' parts, to a relative tolerance (0: bit for bit)."""
    for weights, places, *_ in results:
        for key, offset, shape in places:
            part = full[key][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            if tolerance == 0:
                assert torch.equal(weights[key], part), key
            else:
                assert float((weights[key] - part).norm() / part.norm()) <= tolerance, key


def assert_owned_once(results, dtype: torch.dtype) -> None:
    """Every entry of every state tensor has exactly one main replica in the world."""
    main = [(key, offset) for *_, owned, _ in results for key, offset, replica in owned if replica == (0, 0, 0)]
    assert len(main) == len(set(main))
    boxes_of: dict[str, int] = {}
    for key, _ in main:
        boxes_of[key] = boxes_of.get(key, 0) + 1
    places = {(key, offset) for _, places, *_ in results for key, offset, _ in places}
    for logical in logical_tensors(MOE):
        expected = sum(key == logical.key for key, _ in places) if logical.trainable else 0
        counts = {n for name, n in boxes_of.items() if name.endswith("." + logical.key)}
        assert counts == ({expected} if expected else set()), logical.key
    assert any("master" in key for key in boxes_of) == (dtype == torch.bfloat16)


TIED = MOE.model_copy(update={"tie_embeddings": True})
TABLE = "embedding.word_embeddings.weight"


def pipeline_worker():
    """Two pipeline stages of a model whose first and last stage hold the one embedding table."""
    rank = dist.get_rank()
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    groups = ProcessGroupCollection(tp=alone, dp_cp=alone, expt_tp=alone, expt_dp=alone)
    stages = {TABLE: rank, "decoder.final_layernorm.weight": 1}
    shards = [
        replace(shard, replica_id=(rank if shard.key == TABLE else 0, 0, 0))
        for shard in make_shards(TIED, Layout())
        if stages.get(shard.key, shard.logical.layer) == rank
    ]
    optimizer = ShardedOptimizer(shards, CONFIGS["adamw"], groups)
    norms = run(shards, optimizer, range(STEPS))
    set_grads(shards, "0")
    main = [s.key for s in optimizer.named_state() if s.replica_id == (0, 0, 0)]
    return boxes(shards), norms, naive_norm(shards), main


def test_tied_table_on_two_pipeline_stages(outcomes):
    results = outcomes(2, "pipeline")
    shards = make_shards(TIED, Layout())
    optimizer = ShardedOptimizer(shards, CONFIGS["adamw"], make_groups(Layout()))
    norms = run(shards, optimizer, range(STEPS))
    for weights, stage_norms, naive, _ in results:
        assert stage_norms == norms
        assert naive > 1.005 * norms[0], "the table counted twice shows"
        assert all(torch.equal(value, boxes(shards)[key]) for key, value in weights.items())
    assert TABLE in results[0][0]
    assert TABLE in results[1][0]
    assert sorted(results[0][3] + results[1][3]) == sorted(s.key for s in optimizer.named_state())


def all_workers(world: int, folder: str):
    """Everything that is tested on `world` ranks: processes take long to start, so they are started once."""
    outcomes = {name: layout_worker(*layout) for name, (ranks, *layout) in LAYOUTS.items() if ranks == world}
    if world == 2:
        outcomes["pipeline"] = pipeline_worker()
        first_half_worker(folder)
    if world == 3:
        outcomes["second half"] = second_half_worker(folder)
        outcomes["second half, forgetful"] = second_half_worker(folder, forget="momentum")
        outcomes["exchange"] = exchange_worker()
        outcomes["disagreeing"] = disagreeing_worker()
    if world == 4:
        outcomes["blockwise"] = blockwise_worker(tp=4)
        outcomes["non-finite"] = non_finite_worker()
        found = moving_worker()
        outcomes["moving"] = found if dist.get_rank() == 0 else None
        for kind in CONFIGS:
            outcomes[f"grown {kind}"] = layout_worker(2, 2, 1, kind, ages=grown_twice)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """A function (world size, name of a worker) -> its return values by rank."""
    folder = str(tmp_path_factory.mktemp("state"))

    @functools.cache
    def run_world(world: int):
        if world == 3:
            run_world(2)  # leaves the state that three ranks go on from
        return run_ranks(all_workers, world, world, folder)

    return lambda world, name: [result[name] for result in run_world(world)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(name, outcomes):
    world, tp, ep, etp, kind, dtype = LAYOUTS[name]
    results = outcomes(world, name)
    full, norms = single(kind, dtype)
    # Data parallelism only moves work: bit for bit. Other layouts sum the norm over other pieces.
    pure_data = tp == ep == etp == 1
    assert_parts_equal(results, full, 0 if pure_data else 1e-6)
    for _, _, layout_norms, naive, *_ in results:
        assert layout_norms == pytest.approx(norms, rel=0 if pure_data else 2e-7)
        assert layout_norms == results[0][2]
        assert naive > 1.005 * norms[0], "copies counted twice show"
    assert_owned_once(results, dtype)


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative distance of every tensor."""
    assert found.keys() == expected.keys()
    sizes = {key: float(value.double().norm()) or 1.0 for key, value in expected.items()}
    return {key: float((found[key].double() - value).norm()) / sizes[key] for key, value in expected.items()}


@pytest.mark.parametrize("move", moving.MOVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_any_kind_goes_on_on_any_layout(kind, move, outcomes):
    """Weights and states after a run that is broken off and goes on elsewhere are those of one on one process."""
    found = outcomes(4, "moving")[0]
    expected = straight(kind, moving.MOVES[move][0])
    assert max(off(found[f"{kind} {move}"], expected).values()) < 1e-6
    assert all(value.isfinite().all() for value in expected.values())


@pytest.mark.parametrize("kind", moving.SUMMING)
def test_sums_over_the_parts_of_a_matrix_count(kind, outcomes):
    """Negative control: without them, parts would go ways of their own."""
    found = outcomes(4, "moving")[0][f"{kind} without sums"]
    distances = off(found, straight(kind, torch.float32, moving.STEPS // 2))
    assert max(value for key, value in distances.items() if not key.startswith("optimizer")) > 1e-4


def upside_down(logical: LogicalTensor) -> list[np.ndarray]:
    """Ages whose blocks lie elsewhere in each axis."""
    return [vector[::-1] for vector in grown_twice(logical)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_layout_changes_nothing_for_entries_of_several_ages(kind, outcomes):
    results = outcomes(4, f"grown {kind}")
    full, norms = single(kind, ages=grown_twice)
    assert_parts_equal(results, full, 1e-6)
    assert results[0][2] == pytest.approx(norms, rel=2e-7)
    # Negative control: ages on other entries, and none at all, show.
    for other in (upside_down, None):
        with pytest.raises(AssertionError):
            assert_parts_equal(results, single(kind, ages=other)[0], 1e-4)


@pytest.mark.parametrize("name", [name for name, (_, *sizes, _, _) in LAYOUTS.items() if sizes == [1, 1, 1]])
def test_state_is_shared_out(name, outcomes):
    world, *_, kind, dtype = LAYOUTS[name]
    sizes = [result[-1] for result in outcomes(world, name)]
    _, optimizer = build(CONFIGS[kind], Layout(), dtype)
    assert sum(sizes) == optimizer.state_bytes()
    # Even up to one tensor in each of the two families, dense and experts.
    largest = max(s.data.numel() for s in optimizer.named_state()) * 4 * (3 if dtype == torch.bfloat16 else 2)
    assert max(sizes) - min(sizes) <= 2 * largest
    assert max(sizes) < 0.7 * sum(sizes)


def blockwise_worker(tp: int):
    """Relative error, per matrix, of orthogonalising the local part only instead of the whole."""
    layout = here(tp)
    group = make_groups(layout).tp
    config = MuonConfig()
    shards = [s for s in make_shards(MOE, layout) if s.logical.kind == "matrix" and not s.logical.is_expert]
    errors = {}
    for shard in shards:
        full = full_value(shard.logical, "direction")
        part, expected = part_of(shard, full), part_of(shard, orthogonalise(shard.logical, full, config))
        axis = next(i for i, n in enumerate(shard.shape) if n < shard.logical.shape[i])

        def whole(_, box, logical=shard.logical):
            return orthogonalise(logical, box, config)

        (gathered,) = map_whole([part], [axis], whole, group)
        blockwise = orthogonalise(shard.logical, part.contiguous(), config)
        errors[shard.key] = tuple(float((x - expected).norm() / expected.norm()) for x in (gathered, blockwise))
    return errors


def test_tensor_parallel_update_is_not_blockwise(outcomes):
    for errors in outcomes(4, "blockwise"):
        for key, (gathered, blockwise) in errors.items():
            assert gathered == 0.0, key
            assert blockwise > 0.1, key


def non_finite_worker():
    layout = here(tp=1, ep=2)
    shards, optimizer = build(CONFIGS["muon"], layout)
    run(shards, optimizer, range(2))
    weights = boxes(shards)
    state = {s.key: s.data.clone() for s in optimizer.named_state()}
    set_grads(shards, "2")
    if dist.get_rank() in (0, 2):  # one expert-parallel rank's experts, as all its data-parallel copies have them
        next(s for s in shards if s.logical.is_expert).tensor.main_grad[0, 0, 0] = math.inf
    result = optimizer.step(1.0)
    unchanged = all(torch.equal(value, weights[key]) for key, value in boxes(shards).items())
    unchanged &= all(torch.equal(s.data, state[s.key]) for s in optimizer.named_state())
    set_grads(shards, "2")
    after = optimizer.step(1.0)
    return result, unchanged, after.skipped, torch.equal(shards[0].view(), weights[shards[0].key])


def test_non_finite_on_one_rank_skips_on_all(outcomes):
    for result, unchanged, skipped_after, same_after in outcomes(4, "non-finite"):
        assert result.skipped
        assert not math.isfinite(result.grad_norm)
        assert unchanged
        assert not skipped_after
        assert not same_after


def first_half_worker(folder: str) -> None:
    """Leave the state after the first half of a run in `folder`, a file a rank."""
    shards, optimizer = build(CONFIGS["muon"], here(), torch.bfloat16)
    run(shards, optimizer, range(STEPS // 2))
    state = {s.key: s.data for s in optimizer.named_state()}
    torch.save((state, optimizer.state_dict()), Path(folder) / f"{dist.get_rank()}.pt")


def second_half_worker(folder: str, *, forget: str = ""):
    """The second half from that state, on another number of ranks; `forget` drops keys that contain it."""
    shards, optimizer = build(CONFIGS["muon"], here(), torch.bfloat16)
    saved: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.pt")):
        state, scalars = torch.load(path, weights_only=True)
        saved.update(state)
    for target in optimizer.named_state():
        if not forget or forget not in target.key:
            target.data.copy_(saved[target.key])
    optimizer.load_state_dict(scalars)
    optimizer.load_finished()
    run(shards, optimizer, range(STEPS // 2, STEPS))
    return boxes(shards)


def test_state_moves_to_another_number_of_ranks(outcomes):
    full, _ = single("muon", torch.bfloat16)
    trainable = [t.key for t in logical_tensors(MOE) if t.trainable]
    for weights in outcomes(3, "second half"):
        assert all(torch.equal(weights[key], full[key]) for key in trainable)
    for weights in outcomes(3, "second half, forgetful"):
        assert not all(torch.equal(weights[key], full[key]) for key in trainable)


def exchange_worker():
    """`spread` and `map_whole` on odd shapes, and the check that ranks agree."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    shapes = [(5,), (3, 4), (1,), (2, 2, 2), (7,), (9,)]
    owners = [0, 2, 2, 1, 0, 2]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32]

    def values(by):
        return [torch.full(s, float(10 * i + by), dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]

    for gather_numel in (exchange.GATHER_NUMEL, 6):  # in one go; in chunks of two elements, across tensors' ends
        tensors = values(rank)
        spread(tensors, owners, group, gather_numel=gather_numel)
        for tensor, owner, options in zip(
            tensors, owners, zip(*(values(r) for r in range(size)), strict=True), strict=True
        ):
            assert torch.equal(tensor, options[owner])

    # Two tensors on three ranks: rank 0 and 1 do one each, rank 2 none.
    full = [torch.arange(24.0).view(2, 6, 2), torch.arange(15.0).view(3, 5)]
    parts = [full[0][:, 2 * rank : 2 * rank + 2], full[1][rank : rank + 1]]
    done = []

    def scale(i, box):
        assert torch.equal(box, full[i])
        done.append(i)
        return box * (i + 2)

    results = map_whole(parts, [1, 0], scale, group)
    assert done == ([rank] if rank < 2 else [])
    assert all(torch.equal(result, part * (i + 2)) for i, (result, part) in enumerate(zip(results, parts, strict=True)))

    cpu = torch.device("cpu")
    check_same("equal", group, what="shards", device=cpu)
    with pytest.raises(RuntimeError, match="shards differ"):
        check_same(f"rank {rank}", group, what="shards", device=cpu)
    return True


def test_exchange(outcomes):
    assert outcomes(3, "exchange") == [True] * 3


def disagreeing_worker():
    layout = here()
    shards = make_shards(MOE, layout)
    with pytest.raises(RuntimeError, match="dense shards of data-parallel copies differ"):
        ShardedOptimizer(shards[dist.get_rank() :], CONFIGS["adamw"], make_groups(layout))
    return True


def test_ranks_with_other_tensors_are_told_apart(outcomes):
    assert outcomes(3, "disagreeing") == [True] * 3
