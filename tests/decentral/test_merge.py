"""Merging of experts against a slow reference in fp64, on every layout, and whatever the numbers of the experts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.config.decentral import MergeConfig
from pretrain.config.rules import check
from pretrain.config.schema import Config
from pretrain.decentral.merge import Similarity, _layers, cosines, merged, neighbours, similarity
from pretrain.model.initialise import draw_normal
from pretrain.model.shards import Shard
from pretrain.optim.rules import Slot
from pretrain.optim.sharded import ShardedOptimizer
from pretrain.parallel.engine import Engine, build_engine
from pretrain.parallel.mesh import mesh_of
from pretrain.platform import cpu_adapter
from tests.helpers.configs import MOE, make_config
from tests.helpers.distributed import run_ranks
from tests.helpers.layouts import CPU, Box, assemble, engine_of, microbatches, single_process

E, K, SHARE = 8, 3, 0.25
MERGE = MergeConfig(coefficient=2 * SHARE, every_steps=10, until_step=100, neighbours=K)
STEP = 50
"""Half-way, where the coefficient is half of its first value."""
BUCKET = 1 << 12
"""Some ten parts of every tensor."""

Tensors = Mapping[str, torch.Tensor]

LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"DP2": {}, "EP2": {"expert": 2}, "ETP2": {"tensor": 2, "expert_tensor": 2}, "PP2": {"pipeline": 2}},
    4: {"EP4": {"expert": 4}, "EP2 DP2": {"expert": 2}, "ETP2 EP2": {"tensor": 2, "expert": 2, "expert_tensor": 2}},
}


def configuration(precision: str = "fp32", **parallel: int) -> Config:
    keys: dict[str, Any] = {"model.num_layers": 2, "model.hidden_size": 16, "model.expert_ffn_size": 8}
    keys |= {f"parallel.{key}": size for key, size in parallel.items()}
    return make_config(MOE, {**keys, "run.precision": precision, "model.init_std": 0.3})


def experts_of(shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if shard.logical.is_expert]


@torch.no_grad()
def diversify(engine: Engine) -> None:
    """Experts that are alike to various degrees: what all have, and more of their own the higher their number."""
    for shard in experts_of(engine.shards):
        own = draw_normal(1, shard.key, shard.logical.shape, shard.offset, shard.shape)
        common = draw_normal(2, shard.key, (1, *shard.logical.shape[1:]), (0, *shard.offset[1:]), (1, *shard.shape[1:]))
        numbers = torch.arange(shard.offset[0], shard.offset[0] + shard.shape[0])
        amount = 0.3 + 0.1 * numbers.view(-1, *[1] * (own.dim() - 1))
        shard.view().copy_(0.2 * (common + amount * own))


def slots_of(engine: Engine, config: Config) -> list[Slot]:
    """Those of experts that this rank owns. In bf16, masters get digits that the weights do not have."""
    optimizer = ShardedOptimizer(engine.shards, config.optim, engine.mesh.groups)
    slots = [slot for slot in optimizer.slots if slot.shard.logical.is_expert]
    if config.run.precision == "bf16":
        for slot in slots:
            shard = slot.shard
            digits = draw_normal(3, shard.key, shard.logical.shape, shard.offset, shard.shape)
            slot.master.mul_(1 + 1e-3 * digits.view_as(slot.master))
    return slots


def boxes_of(slots: Sequence[Slot], values: Sequence[torch.Tensor]) -> list[Box]:
    return [Box(s.shard.key, s.shard.offset, s.shard.view(new)) for s, new in zip(slots, values, strict=True)]


def merge_on(config: Config, prepare: Callable[[Engine], None] = diversify, bucket: int = BUCKET) -> tuple[Any, ...]:
    """(masters before, after, similarity) on the ranks that run; boxes."""
    with engine_of(config) as engine:
        prepare(engine)
        slots = slots_of(engine, config)
        before = [slot.master.clone() for slot in slots]
        result = merged(engine, config.model, MERGE, STEP, slots=slots, bucket_bytes=bucket)
        assert similarity(engine, config.model, bucket_bytes=bucket) == result.similarity
        assert all(torch.equal(old, slot.master) for old, slot in zip(before, slots, strict=True)), "not staged"
        return boxes_of(slots, before), boxes_of(slots, result.masters), result.similarity


def merge_alone(config: Config, prepare: Callable[[Engine], None] = diversify) -> tuple[Tensors, Tensors, Any]:
    """`merge_on` in this process, as whole tensors."""
    with single_process():
        before, after, figures = merge_on(config, prepare)
    return assemble(config.model, [before]), assemble(config.model, [after]), figures


# ----- the reference, expert by expert


def reference_cosines(fc1: torch.Tensor) -> list[list[float]]:
    gates = [fc1[j, 0].double().flatten() for j in range(len(fc1))]
    return [[float(torch.cosine_similarity(a, b, dim=0)) for b in gates] for a in gates]


def reference_neighbours(fc1: torch.Tensor, count: int) -> list[list[int]]:
    similar = reference_cosines(fc1)
    others = [[k for k in range(len(fc1)) if k != j] for j in range(len(fc1))]
    return [sorted(row, key=lambda k, j=j: -similar[j][k])[:count] for j, row in enumerate(others)]


def reference(
    fc1: torch.Tensor, fc2: torch.Tensor, masters: Sequence[torch.Tensor], chosen: Sequence[Sequence[int]] | None = None
) -> list[torch.Tensor]:
    """New masters in fp64 of one layer from published weights and old masters; `chosen`: other neighbours."""
    nearest = chosen or reference_neighbours(fc1, K)
    new = [master.double().clone() for master in masters]
    for published, master, out in zip((fc1, fc2), masters, new, strict=True):
        for j, mine in enumerate(nearest):
            mean = torch.stack([published[k].double() for k in mine]).mean(dim=0)
            out[j] = master[j].double() + SHARE * (mean - master[j].double())
    return new


def one_after_another(fc1: torch.Tensor, fc2: torch.Tensor, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gauss-Seidel: later experts meet what earlier ones have become."""
    nearest = reference_neighbours(fc1, K)
    new = [master.double().clone() for master in masters]
    for out in new:
        for j, mine in enumerate(nearest):
            out[j] += SHARE * (out[mine].mean(dim=0) - out[j])
    return new


def with_itself(fc1: torch.Tensor, fc2: torch.Tensor, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """An expert as its own nearest neighbour."""
    return reference(fc1, fc2, masters, [[j, *mine[:-1]] for j, mine in enumerate(reference_neighbours(fc1, K))])


def by_up_projection(fc1: torch.Tensor, fc2: torch.Tensor, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return reference(fc1, fc2, masters, reference_neighbours(fc1.flip(1), K))


def concatenated(fc1: torch.Tensor, fc2: torch.Tensor, masters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Experts as vectors of gate, up and down laid end to end in the order of a dictionary, which differs between them:
    the sizes are the same, so nothing fails, but gates meet other experts' up projections."""
    shuffle = random.Random(0)
    orders = [shuffle.sample(range(3), 3) for _ in range(E)]
    parts = [[masters[0][j, 0], masters[0][j, 1], masters[1][j].T] for j in range(E)]
    flat = torch.stack([torch.cat([parts[j][i].double().flatten() for i in orders[j]]) for j in range(E)])
    nearest = reference_neighbours(fc1, K)
    new = flat + SHARE * (torch.stack([flat[mine].mean(dim=0) for mine in nearest]) - flat)
    out = [master.double().clone() for master in masters]
    for j, order in enumerate(orders):
        for i, values in zip(order, new[j].chunk(3), strict=True):
            target = out[1][j].T if i == 2 else out[0][j, i]
            target.copy_(values.view(target.shape))
    return out


BROKEN = {
    "one after another": one_after_another,
    "with itself": with_itself,
    "by up projection": by_up_projection,
    "concatenated": concatenated,
}


def keys_of(layer: int) -> list[str]:
    return [f"decoder.layers.{layer}.mlp.experts.linear_fc{i}.weight" for i in (1, 2)]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def alone(request: pytest.FixtureRequest) -> tuple[Config, Tensors, Tensors, dict[int, Similarity]]:
    config = configuration(request.param)
    return config, *merge_alone(config)


def largest_error(alone: tuple[Config, Tensors, Tensors, Any], formula: Callable[..., list[torch.Tensor]]) -> float:
    """Of all masters, relative to the largest change of one."""
    config, before, after, _ = alone
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    with single_process(), engine_of(config) as engine:
        diversify(engine)
        published = {shard.key: shard.view().detach().clone() for shard in experts_of(engine.shards)}
    errors, changes = [], []
    for layer in range(config.model.num_layers):
        fc1, fc2 = (published[key] for key in keys_of(layer))
        assert fc1.dtype == dtype
        old = [before[key] for key in keys_of(layer)]
        for key, expected in zip(keys_of(layer), formula(fc1, fc2, old), strict=True):
            errors.append(float((after[key].double() - expected).abs().max()))
            changes.append(float((expected - before[key].double()).abs().max()))
    return max(errors) / max(changes)


def test_equals_the_formula(alone: tuple[Config, Tensors, Tensors, Any]) -> None:
    # fp32 arithmetic: a few roundings of 6e-8 each.
    assert largest_error(alone, reference) < 1e-6


@pytest.mark.parametrize("name", BROKEN)
def test_the_comparison_sees_another_formula(alone: tuple[Config, Tensors, Tensors, Any], name: str) -> None:
    assert largest_error(alone, BROKEN[name]) > 0.01


def test_similarity_is_that_of_the_gates_before(alone: tuple[Config, Tensors, Tensors, Any]) -> None:
    config, before, _, figures = alone
    assert [*figures] == [0, 1]
    # Masters in bf16 differ from what is published by 1e-3.
    tolerance = 1e-9 if config.run.precision == "fp32" else 1e-3
    for layer, found in figures.items():
        similar = reference_cosines(before[keys_of(layer)[0]])
        pairs = [similar[j][k] for j in range(E) for k in range(E) if j != k]
        assert found.mean == pytest.approx(sum(pairs) / len(pairs), abs=tolerance)
        assert found.largest == pytest.approx(max(pairs), abs=tolerance)
        assert 0.3 < found.mean < found.largest < 0.99


# ----- neighbours and cosines


def test_neighbours_are_the_most_alike_and_never_oneself() -> None:
    cosine = torch.tensor([[1.0, 0.2, 0.9, 0.5], [0.2, 1.0, 0.1, -0.3], [0.9, 0.1, 1.0, 0.4], [0.5, -0.3, 0.4, 1.0]])
    assert neighbours(cosine, 2).tolist() == [[2, 3], [0, 2], [0, 3], [0, 2]]
    assert neighbours(cosine, 9).tolist() == [[2, 3, 1], [0, 2, 3], [0, 3, 1], [0, 2, 1]]
    assert neighbours(cosine[:2, :2], 4).tolist() == [[1], [0]]
    # An expert of zeros is not even like itself.
    assert neighbours(torch.zeros(3, 3), 2).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_of_equals_the_lowest_number_is_chosen() -> None:
    """In whatever order their products are added up: here, in another one for each pair."""
    one = torch.randn(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = torch.empty(6, 6, dtype=torch.float64)
    for number in range(36):
        order = torch.randperm(999, generator=torch.Generator().manual_seed(number))
        gram.view(-1)[number] = sum((one * one)[order].tolist())
    lowest = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert neighbours(gram, 3).tolist() != lowest
    assert neighbours(cosines(gram), 3).tolist() == lowest


def test_cosines_of_vectors_of_zeros_are_zero() -> None:
    rows = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[2] = 0.0
    found = cosines(rows @ rows.T)
    expected = torch.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found[2].tolist() == found[:, 2].tolist() == [0.0] * 4


# ----- schedule


# Coefficient, interval, end -> merges, and the sum of their coefficients, of the settings in the authors' code.
SETTINGS = [
    (0.05, 500, 20_000, 39, 0.975),
    (0.01, 500, 10_000, 19, 0.095),
    (0.1, 200, 4000, 19, 0.95),
    (0.05, 200, 2000, 9, 0.225),
]


@pytest.mark.parametrize(("first", "every", "until", "count", "total"), SETTINGS)
def test_schedule(first: float, every: int, until: int, count: int, total: float) -> None:
    merge = MergeConfig(coefficient=first, every_steps=every, until_step=until)
    due = {step: a for step in range(100, until + 5000, 100) if (a := merge.coefficient_at(step)) > 0}
    assert len(due) == (until - 1) // every == count
    assert [*due] == [*range(every, until, every)]
    assert sum(due.values()) == pytest.approx(total)


def test_no_merge_where_none_is_due() -> None:
    config = configuration()
    with single_process(), engine_of(config) as engine:
        off = MERGE.model_copy(update={"coefficient": 0.0})
        for merge, step in ((MERGE, STEP + 1), (MERGE, 100), (off, STEP)):
            with pytest.raises(AssertionError, match=f"no merge is due at step {step}"):
                merged(engine, config.model, merge, step, slots=[], bucket_bytes=BUCKET)


# ----- copies and numbers of experts


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_copies_stay_what_they_are(count: int) -> None:
    config = configuration()
    with single_process(), engine_of(config) as engine:
        for shard in experts_of(engine.shards):
            shard.view().detach()[:] = shard.view().detach()[:1].clone()
        slots = slots_of(engine, config)
        merge = MERGE.model_copy(update={"neighbours": count})
        result = merged(engine, config.model, merge, STEP, slots=slots, bucket_bytes=BUCKET)
        assert all(torch.equal(new, slot.master) for slot, new in zip(slots, result.masters, strict=True))
        assert result.similarity == dict.fromkeys((0, 1), Similarity(1.0, 1.0))


ORDER = [5, 2, 7, 0, 3, 6, 1, 4]


@torch.no_grad()
def renumber(engine: Engine, *, router: bool = True) -> None:
    """Expert i becomes what expert ORDER[i] was."""
    for shard in engine.shards:
        if shard.logical.is_expert or (shard.logical.kind == "router" and router):
            shard.view().copy_(shard.view()[ORDER].clone())


def test_numbers_of_experts_mean_nothing() -> None:
    config = configuration()
    _, plain, figures = merge_alone(config)

    def other_way_round(engine: Engine) -> None:
        diversify(engine)
        renumber(engine)

    _, renumbered, same = merge_alone(config, other_way_round)
    for key, values in plain.items():
        assert torch.equal(renumbered[key], values[ORDER])
        assert not torch.equal(renumbered[key], values)
    assert {layer: row.largest for layer, row in same.items()} == {layer: row.largest for layer, row in figures.items()}


def test_a_merged_model_computes_the_same_under_other_numbers() -> None:
    config = configuration()

    def logits(*, before: bool, router: bool = True) -> torch.Tensor:
        with engine_of(config) as engine:
            diversify(engine)
            if before:
                renumber(engine, router=router)
            slots = slots_of(engine, config)
            result = merged(engine, config.model, MERGE, STEP, slots=slots, bucket_bytes=BUCKET)
            for slot, new in zip(slots, result.masters, strict=True):
                slot.master.copy_(new)
            return engine.logits(next(microbatches(config, engine.mesh, 0)), config.batch.sequence_length)

    with single_process():
        expected = logits(before=False)
        # Experts of a token are added up in another order.
        torch.testing.assert_close(logits(before=True), expected, rtol=1e-5, atol=1e-6)
        assert (logits(before=True, router=False) - expected).abs().max() > 1e-2


# ----- how weights lie


def merge_of_one_site(config: Config) -> list[Box]:
    """What the site computes that trains every expert but 0, 3 and 6: those it trains lie in boxes of one or two."""
    trained = [expert for expert in range(E) if expert % 3]
    cpu_adapter.apply()
    with mesh_of(config.parallel, CPU) as mesh:
        engine = build_engine(config, mesh, trained=trained)
        diversify(engine)
        assert sum(shard.trainable for shard in experts_of(engine.shards)) < len(experts_of(engine.shards))
        slots = slots_of(engine, config)
        result = merged(engine, config.model, MERGE, STEP, slots=slots, bucket_bytes=BUCKET)
        return boxes_of(slots, result.masters)


def equal_part(boxes: Sequence[Box], whole: Tensors) -> bool:
    """Whether each box is, bit for bit, its part of the whole tensor."""
    places = [[slice(o, o + n) for o, n in zip(box.offset, box.values.shape, strict=True)] for box in boxes]
    return all(torch.equal(box.values, whole[box.key][tuple(place)]) for box, place in zip(boxes, places, strict=True))


def test_boxes_order_and_buckets_change_nothing() -> None:
    config = configuration()
    with single_process():
        _, after, _ = merge_on(config)
        whole = assemble(config.model, [after])
        boxes = merge_of_one_site(config)
        assert sum(box.values.numel() for box in boxes) == 5 / 8 * sum(values.numel() for values in whole.values())
        assert equal_part(boxes, whole)
        boxes[-1].values[0] += 1e-6
        assert not equal_part(boxes, whole)
        for bucket in (1, 1 << 20):
            assert equal_part(merge_on(config, bucket=bucket)[1], whole)
        with engine_of(config) as engine:
            diversify(engine)
            shuffled = replace(engine, shards=random.Random(0).sample(engine.shards, len(engine.shards)))
            slots = slots_of(engine, config)[::-1]
            result = merged(shuffled, config.model, MERGE, STEP, slots=slots, bucket_bytes=BUCKET)
            assert equal_part(boxes_of(slots, result.masters), whole)


def test_no_part_is_larger_than_the_bucket() -> None:
    config = configuration()
    with single_process(), engine_of(config) as engine:
        for layer in _layers(engine, config.model):
            for key in layer.boxes:
                parts = [part for _, part in layer.gathered(key, BUCKET)]
                assert max(part.numel() * 16 for part in parts) <= BUCKET
                assert torch.equal(torch.cat(parts, dim=1), layer.boxes[key][0].view().flatten(1))
                assert len(parts) > 3


def merge_alone_among_others(config: Config) -> tuple[list[Box], dict[int, Similarity]]:
    """What a rank makes of its own weights when it hears nothing of the others'."""

    def own_only(parts: list[torch.Tensor], mine: torch.Tensor, **_: Any) -> None:
        for part in parts:
            part.copy_(mine)

    with engine_of(config) as engine:
        diversify(engine)
        slots = slots_of(engine, config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather", own_only)
            patch.setattr(dist, "all_reduce", lambda tensor, **_: tensor)
            result = merged(engine, config.model, MERGE, STEP, slots=slots, bucket_bytes=BUCKET)
        return boxes_of(slots, result.masters), result.similarity


def merge_on_layouts(size: int) -> dict[str, tuple[list[Box], dict[int, Similarity], list[Box]]]:
    """Layout -> (after, similarity, after at a site that trains some) on one rank."""
    found = {}
    for name, parallel in LAYOUTS[size].items():
        config = configuration(**parallel)
        assert check(config, size) == []
        _, after, figures = merge_on(config)
        found[name] = (after, figures, merge_of_one_site(config) if name == "EP2" else [])
        if name != "DP2":
            broken, other_figures = merge_alone_among_others(config)
            assert other_figures != figures
            differ = [not torch.equal(a.values, b.values) for a, b in zip(after, broken, strict=True)]
            assert any(differ) is (name != "PP2")
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_merges_as_one_process_does(size: int) -> None:
    config = configuration()
    _, whole, expected = merge_alone(config)
    ranks = run_ranks(merge_on_layouts, size, size)
    for name in LAYOUTS[size]:
        found = assemble(config.model, [rank[name][0] for rank in ranks])
        assert found.keys() == whole.keys()
        for key, values in whole.items():
            assert torch.equal(found[key], values), f"{key} on {name}"
        for _, figures, some in (rank[name] for rank in ranks):
            for layer, row in expected.items():
                # fp64 sums in another order.
                assert figures[layer].mean == pytest.approx(row.mean, abs=1e-9)
                assert figures[layer].largest == pytest.approx(row.largest, abs=1e-9)
            assert equal_part(some, whole)
        owned = [{(box.key, box.offset) for box in rank[name][0]} for rank in ranks]
        assert len(set().union(*owned)) == sum(map(len, owned)), f"{name}: two ranks computed the same"


def test_a_weight_that_is_no_expert_is_refused() -> None:
    config = configuration()
    with single_process(), engine_of(config) as engine:
        slot = ShardedOptimizer(engine.shards, config.optim, engine.mesh.groups).slots[0]
        with pytest.raises(AssertionError, match=r"no experts of this rank: .*embedding"):
            merged(engine, config.model, MERGE, STEP, slots=[slot], bucket_bytes=BUCKET)
