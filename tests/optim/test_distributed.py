"""A layout changes nothing: sharded optimizers against one process, on gloo."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from pretrain.config.schema import MuonConfig, OptimConfig
from pretrain.model.logical import logical_tensors
from pretrain.model.shards import Shard
from pretrain.optim import exchange
from pretrain.optim.exchange import check_same, map_whole, spread
from pretrain.optim.muon import orthogonalise
from pretrain.optim.sharded import ShardedOptimizer
from tests.helpers.distributed import run_ranks
from tests.optim.build import MOE, Layout, boxes, full_value, here, make_groups, make_shards, part_of, set_grads

STEPS = 4
CONFIGS = {
    "adamw": OptimConfig(lr=1e-2),
    "muon": OptimConfig(kind="muon", lr=1e-2, muon=MuonConfig(lr=2e-2, router=True)),
}


def build(config: OptimConfig, layout: Layout, dtype: torch.dtype = torch.float32):
    shards = make_shards(MOE, layout, dtype=dtype)
    return shards, ShardedOptimizer(shards, config, make_groups(layout))


def run(shards: list[Shard], optimizer: ShardedOptimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        set_grads(shards, str(step))
        norms.append(optimizer.step(1.0 - step / 20).grad_norm)
    return norms


def single(kind: str, dtype: torch.dtype = torch.float32, steps: int = STEPS):
    shards, optimizer = build(CONFIGS[kind], Layout(), dtype)
    norms = run(shards, optimizer, range(steps))
    return boxes(shards), norms


def naive_norm(shards: list[Shard]) -> float:
    """What comes out if every rank adds all it has: copies count as often as they exist."""
    grads = [s.tensor.main_grad.double() for s in shards if s.logical.trainable]
    squares = torch.stack([grad.square().sum() for grad in grads]).sum()
    dist.all_reduce(squares)
    return float(squares.sqrt())


def layout_worker(tp: int, ep: int, etp: int, kind: str, dtype: torch.dtype):
    """Weights as boxes with their offsets, norms, and what each rank owns, after a short run."""
    layout = here(tp, ep, etp)
    shards, optimizer = build(CONFIGS[kind], layout, dtype)
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


@pytest.mark.parametrize(
    ("world", "tp", "ep", "etp", "kind", "dtype"),
    [
        (2, 1, 1, 1, "muon", torch.float32),
        (3, 1, 1, 1, "muon", torch.bfloat16),
        (2, 1, 1, 1, "adamw", torch.bfloat16),
        (2, 2, 1, 1, "muon", torch.float32),
        (4, 4, 2, 2, "muon", torch.float32),
        (4, 2, 2, 1, "muon", torch.float32),
        (4, 1, 2, 2, "muon", torch.bfloat16),
        (4, 2, 2, 1, "adamw", torch.float32),
    ],
)
def test_layout_changes_nothing(world, tp, ep, etp, kind, dtype):
    results = run_ranks(layout_worker, world, tp, ep, etp, kind, dtype)
    full, norms = single(kind, dtype)
    # Data parallelism only moves work: bit for bit. Other layouts sum the norm over other pieces.
    pure_data = tp == ep == etp == 1
    assert_parts_equal(results, full, 0 if pure_data or dtype == torch.bfloat16 else 1e-6)
    for _, _, layout_norms, naive, *_ in results:
        assert layout_norms == pytest.approx(norms, rel=0 if pure_data else 2e-7)
        assert layout_norms == results[0][2]
        assert naive > 1.1 * norms[0], "copies counted twice show"
    assert_owned_once(results, dtype)
    if pure_data:
        sizes = [result[-1] for result in results]
        _, optimizer = build(CONFIGS[kind], Layout(), dtype)
        assert sum(sizes) == optimizer.state_bytes()
        assert max(sizes) <= 1.25 * sum(sizes) / world


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


def test_tensor_parallel_update_is_not_blockwise():
    for errors in run_ranks(blockwise_worker, 4, 4):
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


def test_non_finite_on_one_rank_skips_on_all():
    for result, unchanged, skipped_after, same_after in run_ranks(non_finite_worker, 4):
        assert result.skipped
        assert not math.isfinite(result.grad_norm)
        assert unchanged
        assert not skipped_after
        assert not same_after


def resume_worker(path: str, steps: tuple[int, int], dtype: torch.dtype):
    """Run `steps`, starting from the state in the folder if there is any, and leave the state there."""
    layout = here()
    shards, optimizer = build(CONFIGS["muon"], layout, dtype)
    begin, end = steps
    if begin:
        for rank in range(4):
            try:
                saved = torch.load(f"{path}/{begin}_{rank}.pt", weights_only=True)
            except FileNotFoundError:
                break
            for target in optimizer.named_state():
                if target.key in saved["state"]:
                    target.data.copy_(saved["state"].pop(target.key))
            assert optimizer.state_dict()["step"] in (0, saved["scalars"]["step"])
            optimizer.load_state_dict(saved["scalars"])
        optimizer.load_finished()
    run(shards, optimizer, range(begin, end))
    state = {s.key: s.data for s in optimizer.named_state()}
    torch.save({"state": state, "scalars": optimizer.state_dict()}, f"{path}/{end}_{dist.get_rank()}.pt")
    return boxes(shards)


def test_state_moves_to_another_number_of_ranks(tmp_path):
    run_ranks(resume_worker, 2, str(tmp_path), (0, 2), torch.bfloat16)
    results = run_ranks(resume_worker, 3, str(tmp_path), (2, STEPS), torch.bfloat16)
    full, _ = single("muon", torch.bfloat16)
    for weights in results:
        for shard in make_shards(MOE, Layout()):
            if shard.logical.trainable:
                assert torch.equal(weights[shard.key], full[shard.key]), shard.key
    other, _ = single("muon", torch.bfloat16, steps=STEPS - 1)
    assert not torch.equal(other["output_layer.weight"], full["output_layer.weight"])


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


def test_exchange():
    run_ranks(exchange_worker, 3)


def disagreeing_worker():
    layout = here()
    shards = make_shards(MOE, layout)
    with pytest.raises(RuntimeError, match="dense shards of data-parallel copies differ"):
        ShardedOptimizer(shards[dist.get_rank() :], CONFIGS["adamw"], make_groups(layout))


def test_ranks_with_other_tensors_are_told_apart():
    run_ranks(disagreeing_worker, 2)
