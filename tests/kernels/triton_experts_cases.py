"""Cases of the Triton expert layer, run by test_triton_experts.py in a process of its own with TRITON_INTERPRET=1.

The interpreter costs about 10 ms for each small program, so the cases are small, and each tells several things.
Its casts to bf16 cut off instead of rounding (an error of up to 2^-7 a cast, all towards zero): bf16 is held to that,
and fp16, which it rounds, to the tight bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pretrain_kernels.triton_experts import Tiles, choose_tiles, steps, swiglu_experts_triton
from pretrain_kernels.triton_experts.routing import route_grouped, route_tokens, tile_bound
from pretrain_kernels.triton_experts.tiles import BEFORE_HOPPER, FEW_ROWS, NARROW, WIDE
from pretrain_kernels.triton_support import Tile

# Relative error of a norm. fp32: sums of < 100 products. fp16: a few roundings of up to 2^-11. bf16: see above.
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
NAMES = ("y", "x", "fc1", "fc2", "scores")


def tiles(m: int = 32, n: int = 32, k: int = 32, *, gather_first: bool = False, **schedule: int) -> Tiles:
    """Small tiles, so that small cases have several."""
    tile = Tile(m=m, n=n, k=k, warps=4, stages=2, **schedule)
    return Tiles(
        up=tile, down=tile, dh=tile, dx=tile, dw=tile, dw_left=tile, dw_right=tile, gather_first=gather_first
    )  # fmt: skip


@dataclass
class Case:
    """Inputs of one call. `routing`: experts [T, K], or rows per expert [E]."""

    routing: Tensor
    width: int = 40
    hidden: int = 24
    experts: int = 4
    dtype: torch.dtype = torch.float32
    trainable: Tensor | None = None
    tiles: Tiles = field(default_factory=tiles)
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        rows = len(self.routing) if self.tokens else int(self.routing.sum())
        self.x = torch.randn(rows, self.width).to(self.dtype)
        self.fc1 = (torch.randn(self.experts, 2 * self.hidden, self.width) / math.sqrt(self.width)).to(self.dtype)
        self.fc2 = (torch.randn(self.experts, self.width, self.hidden) / math.sqrt(self.hidden)).to(self.dtype)
        self.scores = torch.rand(self.routing.shape if self.tokens else rows) + 0.1
        self.dy = torch.randn(rows, self.width).to(self.dtype)

    @property
    def tokens(self) -> bool:
        return self.routing.dim() == 2

    def run(self, **changed: object) -> dict[str, Tensor]:
        """Output and gradients of the layer."""
        inputs = {name: getattr(self, name).detach().clone().requires_grad_() for name in NAMES[1:]}
        name = "experts" if self.tokens else "rows_per_expert"
        options = {name: self.routing, "trainable": self.trainable, "tiles": self.tiles} | changed
        y = swiglu_experts_triton(**inputs, **options)
        y.backward(self.dy)
        return {"y": y.detach()} | {name: tensor.grad for name, tensor in inputs.items()}

    def reference(self) -> dict[str, Tensor]:
        """The same in fp64, one expert after the other."""
        inputs = {name: getattr(self, name).detach().double().requires_grad_() for name in NAMES[1:]}
        x, fc1, fc2, scores = inputs.values()
        y = torch.zeros_like(x)
        first = 0
        for expert in range(self.experts):
            if self.tokens:
                row, choice = (self.routing == expert).nonzero(as_tuple=True)
                score = scores[row, choice]
            else:
                row = torch.arange(first, first + int(self.routing[expert]))
                first, score = first + len(row), scores[row]
            w1, w2 = fc1[expert], fc2[expert]
            if self.trainable is not None and not self.trainable[expert]:
                w1, w2 = w1.detach(), w2.detach()
            gate, up = (x[row] @ w1.T).chunk(2, dim=-1)
            active = torch.nn.functional.silu(gate) * up
            y = y.index_add(0, row, score[:, None] * (active @ w2.T))
        y.backward(self.dy.double())
        return {"y": y.detach()} | {name: tensor.grad for name, tensor in inputs.items()}

    def check(self, got: dict[str, Tensor]) -> None:
        """Everything within the bound of the dtype."""
        for name, expected in self.reference().items():
            assert got[name].dtype == (torch.float32 if name == "scores" else self.dtype)
            assert error(got[name], expected) < BOUND[self.dtype], name


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return float((got.double() - expected).norm() / expected.norm())


def choices(tokens: int, experts: int, per_token: int = 2) -> Tensor:
    """Distinct random experts for each token."""
    return torch.stack([torch.randperm(experts)[:per_token] for _ in range(tokens)])


def rows(*counts: int) -> Tensor:
    return torch.tensor(counts)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layout", ["tokens", "grouped"])
def test_equals_fp64(dtype: torch.dtype, layout: str) -> None:
    """Sizes off the tiles in all three directions, one expert never chosen."""
    torch.manual_seed(1)
    routing = choices(24, 3) + 1 if layout == "tokens" else rows(0, 33, 5, 10)
    case = Case(routing, dtype=dtype)
    got = case.run()
    case.check(got)
    assert not got["fc1"][0].any()
    assert not got["fc2"][0].any()


def test_more_columns_and_depth_than_a_tile() -> None:
    case = Case(rows(20, 40), experts=2, width=72, hidden=48, tiles=tiles(32, 32, 16))
    case.check(case.run())


@pytest.mark.parametrize("counts", [(127, 128, 129), (1, 0, 0), (0, 0, 31), (0, 60, 0)])
def test_rows_around_a_tile_and_empty_experts(counts: tuple[int, ...]) -> None:
    case = Case(rows(*counts), experts=3, width=16, hidden=16, tiles=tiles(128, 16, 16))
    got = case.run()
    case.check(got)
    for expert, count in enumerate(counts):
        assert bool(got["fc1"][expert].any()) == bool(got["fc2"][expert].any()) == bool(count)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("gather_first", [False, True])
def test_programs_that_take_several_blocks(gather_first: bool, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "multiprocessors", lambda device: 3)
    case = Case(choices(40, 4), tiles=tiles(32, 16, 16, gather_first=gather_first, programs=1, flat=flat))
    case.check(case.run())


TABLE = {"before_hopper": BEFORE_HOPPER, "few": FEW_ROWS, "narrow": NARROW, "wide": WIDE}


@pytest.mark.parametrize("tile", TABLE.values(), ids=TABLE)
def test_tiles_of_the_table(tile: Tiles) -> None:
    case = Case(rows(100, 0, 30, 1), tiles=tile)
    case.check(case.run())


def test_all_on_one_expert_is_a_dense_layer_whose_shares_add_up() -> None:
    """Skew, and an expert twice with scores s/2 + s/2 is the expert once: with two choices of the same weights."""
    case = Case(torch.full((12, 1), 2), width=16, hidden=16)
    once = case.run()
    case.check(once)
    twice = Case(torch.tensor([[0, 1]]).repeat(12, 1), width=16, hidden=16)
    twice.fc1[:], twice.fc2[:] = case.fc1[2], case.fc2[2]
    twice.x, twice.dy, twice.scores = case.x, case.dy, case.scores.repeat(1, 2) / 2
    got = twice.run()
    assert error(got["y"], once["y"].double()) < 1e-6
    assert error(got["x"], once["x"].double()) < 1e-6
    assert error(got["fc1"].sum(0), once["fc1"].sum(0).double()) < 1e-6


def test_permuting_tokens_and_experts() -> None:
    torch.manual_seed(2)
    case = Case(choices(12, 4))
    plain, order, renamed = case.run(), torch.randperm(12), torch.randperm(4)
    moved = Case(renamed[case.routing[order]])
    moved.fc1[renamed], moved.fc2[renamed] = case.fc1, case.fc2
    moved.x, moved.dy, moved.scores = case.x[order], case.dy[order], case.scores[order]
    got = moved.run()
    for name in ("y", "x", "scores"):
        assert error(got[name], plain[name][order].double()) < 1e-6
    for name in ("fc1", "fc2"):
        assert error(got[name][renamed], plain[name].double()) < 1e-6


def test_frozen_experts_have_no_weight_gradient_and_pass_gradients_on() -> None:
    trainable = torch.tensor([False, True, False, True])
    torch.manual_seed(3)
    case = Case(choices(20, 4), trainable=trainable)
    got = case.run()
    case.check(got)
    assert not got["fc1"][~trainable].any()
    assert got["fc1"][trainable].any()
    case.trainable = None
    with pytest.raises(AssertionError):
        case.check(got)


@pytest.mark.parametrize("seed", [0, 1])
def test_repeats_bit_by_bit(seed: int) -> None:
    torch.manual_seed(seed)
    case = Case(choices(12, 4), seed=seed, width=16, hidden=16)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def poisoned(tensor: Tensor) -> Tensor:
    """`tensor` inside a larger buffer that is NaN on both sides."""
    buffer = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype)
    buffer[32:-32] = tensor.flatten()
    return buffer[32:-32].view(tensor.shape)


@pytest.mark.parametrize("layout", ["tokens", "grouped"])
def test_nothing_unwritten_or_out_of_range_is_used(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that is handed out starts as NaN, and the inputs lie between NaNs."""
    torch.manual_seed(4)
    case = Case(choices(10, 4) if layout == "tokens" else rows(0, 17, 0, 16), width=24, hidden=40)
    plain, empty = case.run(), torch.empty

    def nan(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else torch.iinfo(out.dtype).max // 2)

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape, **_: nan(*shape, dtype=self.dtype))
    monkeypatch.setattr(torch, "empty_like", lambda like: nan(like.shape, dtype=like.dtype))
    for name in ("x", "fc1", "fc2", "scores", "dy"):
        setattr(case, name, poisoned(getattr(case, name)))
    got = case.run()
    assert all(torch.equal(got[name], plain[name]) for name in NAMES)


def test_a_nan_stays_with_its_expert() -> None:
    """Rows of the next expert share a tile with it; they must not reach its results."""
    case = Case(rows(17, 15, 16), experts=3, width=16, hidden=16)
    plain = case.run()
    case.x[17:32] = math.nan
    got = case.run()
    hit = (torch.arange(48) >= 17) & (torch.arange(48) < 32)
    for name in ("y", "x", "scores"):
        assert torch.equal(got[name].view(48, -1).isnan().all(1), hit)
        assert torch.equal(got[name][~hit], plain[name][~hit])
    for name in ("fc1", "fc2"):
        assert got[name].isnan().flatten(1).any(1).tolist() == [False, True, False]
        assert torch.equal(got[name][0], plain[name][0])


def test_gradients_that_are_expanded_or_not_contiguous() -> None:
    torch.manual_seed(5)
    case = Case(choices(8, 4), width=16, hidden=16)
    for dy in (torch.ones(1, 1).expand(8, 16), torch.randn(16, 8).T):
        case.dy = dy
        case.check(case.run())


def test_scores_enter_linearly_and_their_gradient_is_dy_times_y() -> None:
    case = Case(rows(5, 3), experts=2, width=16, hidden=16)
    plain = case.run()
    unit = case.scores.clone()
    case.scores = torch.ones_like(unit)
    ones = case.run()
    assert error(plain["y"], (ones["y"] * unit[:, None]).double()) < 1e-6
    assert error(plain["scores"], (case.dy * ones["y"]).sum(1).double()) < 1e-6


@pytest.mark.parametrize("layout", ["tokens", "grouped"])
def test_no_rows(layout: str) -> None:
    case = Case(torch.zeros(0, 2, dtype=torch.int64) if layout == "tokens" else rows(0, 0, 0, 0))
    got = case.run()
    assert got["y"].shape == got["x"].shape == (0, 40)
    assert not got["fc1"].any()
    assert not got["fc2"].any()


class MainGrad(torch.nn.Parameter):
    """A parameter as megatron-core's data parallelism leaves it."""

    main_grad: Tensor
    grad_added_to_main_grad: bool


def test_main_grad_collects_two_micro_batches() -> None:
    torch.manual_seed(6)
    trainable = torch.tensor([True, True, False, True])
    first, second = (Case(choices(10, 4), trainable=trainable, seed=seed) for seed in (0, 1))
    second.fc1, second.fc2 = first.fc1, first.fc2
    fc1, fc2 = MainGrad(first.fc1.clone()), MainGrad(first.fc2.clone())
    for weight in (fc1, fc2):
        weight.main_grad = torch.zeros_like(weight)
        weight.main_grad[2] = 7.0  # of an expert that does not train: nobody touches it
    fc1.grad_added_to_main_grad = False
    for case in (first, second):
        y = swiglu_experts_triton(
            case.x, fc1, fc2, experts=case.routing, scores=case.scores, trainable=trainable, tiles=case.tiles,
            accumulate_main_grad=True,
        )  # fmt: skip
        y.backward(case.dy, retain_graph=True)
    assert fc1.grad_added_to_main_grad is True
    assert fc1.grad is not None
    assert fc2.grad is None
    one, two = first.reference(), second.reference()
    for name, weight in (("fc1", fc1), ("fc2", fc2)):
        assert (weight.main_grad[2] == 7.0).all()
        assert error(weight.main_grad[trainable], (one[name] + two[name])[trainable]) < BOUND[torch.float32]


def test_second_backward_with_a_kept_graph_adds_the_same() -> None:
    case = Case(rows(9, 4), experts=2, width=16, hidden=16)
    x = case.x.requires_grad_()
    y = swiglu_experts_triton(x, case.fc1, case.fc2, rows_per_expert=case.routing, scores=case.scores, tiles=case.tiles)
    y.backward(case.dy, retain_graph=True)
    once = x.grad.clone()
    y.backward(case.dy)
    assert torch.equal(x.grad, 2 * once)


def saved_bytes(run: Callable[[], Tensor], *, apart_from: tuple[Tensor, ...]) -> int:
    """Bytes of storage that autograd keeps, parameters left out; each storage once."""
    kept: dict[int, int] = {}
    skip = {tensor.untyped_storage().data_ptr() for tensor in apart_from}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.grad_fn is not None
    return sum(kept.values())


def test_saved_activations() -> None:
    """2TD + 4RF bytes in 16 bits, and metadata: 12 bytes a row, the table of tiles, its length and the offsets."""
    torch.manual_seed(7)
    case = Case(choices(16, 4), dtype=torch.bfloat16, width=64, hidden=48)
    weights = (case.fc1.requires_grad_(), case.fc2.requires_grad_())

    def run(**changed: object) -> Tensor:
        inputs = {"x": case.x, "scores": case.scores, "experts": case.routing, "tiles": case.tiles} | changed
        return swiglu_experts_triton(fc1=weights[0], fc2=weights[1], **inputs)

    tokens, routed = 16, 32
    activations = 2 * tokens * 64 + 4 * routed * 48
    metadata = 12 * routed + 8 * tile_bound(routed, 4, 32) + 4 + 4 * 5
    assert saved_bytes(run, apart_from=weights) == activations + metadata
    weights[0].requires_grad_(False)  # x is kept for the gradient of fc1 alone
    assert saved_bytes(run, apart_from=weights) == activations + metadata - 2 * tokens * 64


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows(5, 3), experts=2, width=16, hidden=16)
    expected, kept, forward = case.reference()["y"], [], steps.forward

    def spy(*args: object, keep: bool, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        y, h = forward(*args, keep=keep, **kwargs)
        kept.append(h)
        return y, h

    monkeypatch.setattr(steps, "forward", spy)
    inputs = {"rows_per_expert": case.routing, "scores": case.scores, "tiles": case.tiles}
    fc1 = case.fc1.requires_grad_()
    with torch.no_grad():
        y = swiglu_experts_triton(case.x, fc1, case.fc2, **inputs)
    assert error(y, expected) < BOUND[torch.float32]
    assert swiglu_experts_triton(case.x, fc1, case.fc2, **inputs).requires_grad
    assert kept[0] is None
    assert kept[1] is not None


@pytest.mark.parametrize(("experts", "index"), [(5, torch.int64), (40, torch.int32)])
def test_routes_tokens_like_a_stable_sort(experts: int, index: torch.dtype) -> None:
    """Several blocks of rows (128 each), more experts than one step of the count (32), Zipf-like choices."""
    torch.manual_seed(8)
    weights = 1 / torch.arange(1, experts + 1).float()
    chosen = torch.multinomial(weights.expand(150, -1), 2).to(index)
    scores = torch.rand(150, 2)
    route = route_tokens(chosen, scores, expert_count=experts, tile=32)
    order = chosen.flatten().sort(stable=True).indices
    counts = chosen.flatten().bincount(minlength=experts)
    assert route.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert route.token.tolist() == (order // 2).tolist()
    assert torch.equal(route.score, scores.flatten()[order])
    assert torch.equal(route.position.flatten().long()[order], torch.arange(300))
    check_table(route.tile_expert, route.tile_row, counts.tolist(), tile=32, rows=300)


@pytest.mark.parametrize("counts", [(0, 70, 1, 0), (32, 32, 32), (1,), (0, 0, 5), (31, 33, 64, 0, 0)])
def test_table_of_tiles(counts: tuple[int, ...]) -> None:
    total = sum(counts)
    route = route_grouped(rows(*counts), torch.ones(total), tile=32)
    check_table(route.tile_expert, route.tile_row, list(counts), tile=32, rows=total)


def check_table(expert: Tensor, row: Tensor, counts: list[int], *, tile: int, rows: int) -> None:
    """Tiles of all experts in order, each from its expert's first row in steps of the tile, then -1 alone."""
    expected = []
    for index, count in enumerate(counts):
        expected += [(index, sum(counts[:index]) + step) for step in range(0, count, tile)]
    assert len(expected) <= len(expert) == tile_bound(rows, len(counts), tile)
    assert list(zip(expert.tolist(), row.tolist(), strict=True))[: len(expected)] == expected
    assert set(expert[len(expected) :].tolist()) <= {-1}


def test_what_it_refuses() -> None:
    case = Case(rows(5, 3), experts=2, width=16, hidden=16)
    call = {"scores": case.scores, "rows_per_expert": case.routing}
    for x, fc1, fc2, changed, words in (
        (case.x, case.fc1, case.fc2, {"rows_per_expert": None}, "either experts"),
        (case.x.double(), case.fc1.double(), case.fc2.double(), {}, "16-bit dtype"),
        (case.x, case.fc1.half(), case.fc2, {}, "16-bit dtype"),
        (case.x, case.fc1[:, 2:], case.fc2, {}, "need to be"),
        (case.x[:, :6], case.fc1[:, :, :6], case.fc2[:, :6], {}, "D = 6"),
        (case.x, case.fc1[:, :12], case.fc2[:, :, :6], {}, "F = 6"),
    ):
        with pytest.raises(ValueError, match=words):
            swiglu_experts_triton(x, fc1, fc2, **(call | changed))


@pytest.mark.parametrize(
    ("rows_of_an_expert", "width", "capability", "tiles"),
    [
        (96, 1024, 90, FEW_ROWS),
        (97, 1016, 90, NARROW),
        (97, 1024, 100, WIDE),
        (97, 1024, 80, BEFORE_HOPPER),
    ],
)
def test_the_table_is_chosen_by_rows_and_width_of_an_expert(
    rows_of_an_expert: int, width: int, capability: int, tiles: Tiles
) -> None:
    assert choose_tiles(rows=64 * rows_of_an_expert, experts=64, width=width, capability=capability) is tiles
