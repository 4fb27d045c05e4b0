"""The optimizer: state of every logical tensor on one data-parallel rank, updates spread to the others.

Of the ranks that hold copies of a shard, its *owner* keeps the fp32 master and the moments, updates them from the
reduced gradient, and sends the new weights to the others. See README.md in this folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.distributed import ProcessGroup

from pretrain.config.optim import OptimConfig
from pretrain.errors import CheckpointError
from pretrain.model.shards import Shard
from pretrain.optim.ages import Ages, Block, blocks
from pretrain.optim.clip import clip_, global_norm
from pretrain.optim.exchange import check_same, spread
from pretrain.optim.ownership import Load, assign_owners
from pretrain.optim.registry import make_rules
from pretrain.optim.routing import route
from pretrain.optim.rules import Rule, Slot
from pretrain.optim.sophia import Curvature, Sophia
from pretrain.optim.states import State, state_key, state_numel, states_of
from pretrain.optim.tensor_parallel import TensorParallel

FP32_BYTES = 4


@dataclass(frozen=True)
class StepResult:
    """What one call of `ShardedOptimizer.step` did; the same on all ranks."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; inf or nan when the step was skipped."""
    clipped: bool
    skipped: bool
    """Whether the gradient was not finite, so that nothing was changed."""


@dataclass(frozen=True)
class _Family:
    """The shards that one data-parallel group shares out: all dense ones, or all experts."""

    shards: list[Shard]
    owners: list[int]
    """Rank in `group` that owns each shard."""
    group: ProcessGroup | None

    def spread(self) -> None:
        """Send the owners' weights to the rest of the group."""
        spread([shard.tensor.detach() for shard in self.shards], self.owners, self.group)

    def owned(self) -> list[Shard]:
        rank = get_pg_rank(self.group)
        return [shard for shard, owner in zip(self.shards, self.owners, strict=True) if owner == rank]


class ShardedOptimizer:
    """An optimizer over this rank's shards, with state sharded over the data-parallel ranks.

    shards: all shards of this rank; those that are not trained, buffers and frozen experts, are left alone.
    groups: of its fields, `tp` and `dp_cp` serve dense weights, `expt_tp` and `expt_dp` experts. A group may be None
    when torch.distributed is not initialised. All ranks build the optimizer together.
    ages: which growth brought an entry in; None: none did.

    Gradients are read from `main_grad` of the parameter, or from `grad`: fully reduced, the same on all data-parallel
    ranks. Clipping scales those of owned shards in place.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        config: OptimConfig,
        groups: ProcessGroupCollection,
        *,
        ages: Ages | None = None,
    ) -> None:
        self._config = config
        self._ages = ages
        self._rules = make_rules(config, groups)
        self._parallel = TensorParallel(groups)
        self._shards = [shard for shard in shards if shard.trainable]
        assert len({(s.key, s.offset) for s in self._shards}) == len(self._shards), "a box is listed twice"
        self._device = self._shards[0].tensor.device
        self._families = [
            self._share_out(is_expert=False, group=groups.dp_cp, tensor_group=groups.tp),
            self._share_out(is_expert=True, group=groups.expt_dp, tensor_group=groups.expt_tp),
        ]
        self._slots = [self._slot(shard) for family in self._families for shard in family.owned()]
        self._by_rule = list(self._group_by_rule())
        self._steps = 0

    @torch.no_grad()
    def step(self, lr_ratio: float, newer: Sequence[float] = ()) -> StepResult:
        """One update with every peak learning rate times `lr_ratio`, or newer[n - 1] for entries of the n-th growth.

        Collective over all ranks. If the global gradient norm is not finite, nothing changes on any rank.
        """
        lr_ratios = (lr_ratio, *newer)
        newest = max((block.age for slot in self._slots for block in slot.blocks), default=0)
        assert newest <= len(newer), f"entries of growth {newest}, but learning rates of {len(newer)} growths only"
        grads = [_gradient(slot.shard) for slot in self._slots]
        norm = self._norm(grads)
        if not math.isfinite(norm):
            return StepResult(norm, clipped=False, skipped=True)
        self._steps += 1
        corrects = any(rule.corrects for rule in self._rules.values())
        if corrects:
            for rule, mine in self._by_rule:
                slots = [self._slots[i] for i in mine]
                corrected = rule.corrected(slots, [grads[i] for i in mine], step=self._steps)
                for i, grad in zip(mine, corrected, strict=True):
                    grads[i] = grad
        clipped = clip_(grads, self._norm(grads) if corrects else norm, self._config.clip_grad)
        for rule, mine in self._by_rule:
            slots = [self._slots[i] for i in mine]
            rule.update(slots, [grads[i] for i in mine], lr_ratios=lr_ratios, step=self._steps)
        self._publish()
        return StepResult(norm, clipped=clipped, skipped=False)

    @property
    def slots(self) -> Sequence[Slot]:
        """The shards this rank owns, dense ones first, with masters and state."""
        return self._slots

    @property
    def wants_curvature(self) -> bool:
        """Whether `estimate_curvature` comes before the next update."""
        rule = self._rules.get("sophia")
        return isinstance(rule, Sophia) and rule.is_due(self._steps)

    @torch.no_grad()
    def estimate_curvature(self, backward: Callable[[], None], *, seed: int) -> Curvature:
        """What Sophia does before some of its updates, see `wants_curvature`. Collective over all ranks.

        backward: passes over the batch of the update, as before `step`; called once or twice, at other weights.
        Weights are the same bits before and after; gradients are not.
        """
        rule = self._rules["sophia"]
        assert isinstance(rule, Sophia)

        def gradients() -> list[torch.Tensor] | None:
            self._publish()
            with torch.enable_grad():
                backward()
            grads = [_gradient(slot.shard) for slot in self._slots]
            return grads if math.isfinite(self._norm(grads)) else None

        share = self._clipped_share(rule)
        finite = rule.estimate(self._slots, gradients, seed=seed, step=self._steps + 1)
        self._publish()
        return Curvature(skipped=not finite, clipped_share=share)

    def named_state(self) -> list[ShardedTensor]:
        """The tensors of this rank's state, to be saved or filled in place: `optimizer.<name>.<key of the weight>`.

        Names are `master` (bf16 parameters only) and those of the rule's states. Over all ranks, each box has one main
        replica, the owner's; copies by tensor or pipeline parallelism are listed as further replicas.
        """
        masters = [
            located(slot.shard, slot.master, state_key("master", slot.shard.key))
            for slot in self._slots
            if _has_master(slot.shard)
        ]
        return [*masters, *self._located_states()]

    def whole_state(self) -> list[ShardedTensor]:
        """What makes up the model and its training, in fp32, to be read or filled in place when the model grows.

        Of each weight this rank owns: the weight itself (its master if it has one) under its own key, and the states
        under their `state_key`, with replicas as in `named_state`. `load_finished` makes the parameters follow.
        """
        return [*(located(slot.shard, slot.master, slot.shard.key) for slot in self._slots), *self._located_states()]

    def state_dict(self) -> dict[str, Any]:
        """What is no tensor: the kind and the number of updates so far. JSON types only."""
        return {"kind": self._config.kind, "step": self._steps}

    def is_other(self, state: dict[str, Any]) -> bool:
        """Whether `state` is that of another kind of optimizer, to be left out. Raises CheckpointError unless
        `optim.drop_other_state` asks for that."""
        if state["kind"] == self._config.kind:
            return False
        if not self._config.drop_other_state:
            raise CheckpointError(
                f'optim.kind = "{self._config.kind}": the checkpoint has the state of "{state["kind"]}"; resume with '
                "the optimizer the run was started with, or set optim.drop_other_state = true to go on without that "
                "state"
            )
        return True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`. Raises CheckpointError if it is another optimizer's."""
        if not self.is_other(state):
            self._steps = int(state["step"])

    @torch.no_grad()
    def begin_again(self) -> None:
        """Forget all state, and take the masters from the parameters as they are."""
        for slot in self._slots:
            if _has_master(slot.shard):
                slot.master.copy_(slot.shard.tensor)
            for tensor in slot.state.values():
                tensor.zero_()

    @torch.no_grad()
    def load_finished(self) -> None:
        """Bring the parameters of all ranks in line with masters filled in place. Collective."""
        self._publish()

    def state_bytes(self) -> int:
        """Bytes of masters and moments on this rank."""
        masters = [slot.master for slot in self._slots if _has_master(slot.shard)]
        return sum(tensor.nbytes for tensor in [*masters, *(t for slot in self._slots for t in slot.state.values())])

    def _norm(self, grads: Sequence[torch.Tensor]) -> float:
        """Global norm of what stands for the gradients of owned shards. Collective."""
        counted = [grad for slot, grad in zip(self._slots, grads, strict=True) if slot.shard.counts_in_norm]
        return global_norm(counted, self._device)

    def _clipped_share(self, rule: Sophia) -> float:
        """Share of the model's weights that the last update has clipped. Collective."""
        counted = [slot for slot in self._slots if slot.shard.counts_in_norm]
        clipped = rule.clipped(counted, step=self._steps) if self._steps else 0
        entries = sum(slot.master.numel() for slot in counted)
        counts = torch.tensor([clipped, entries], dtype=torch.int64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        return int(counts[0]) / int(counts[1])

    def _group_by_rule(self) -> Iterator[tuple[Rule, list[int]]]:
        """Every rule that has tensors here, with the places of its slots; dense weights and experts apart.

        Ranks that hold parts of the same dense weights may own different experts: with both in one list, they would
        not come to their collectives in the same order.
        """
        for name, rule in self._rules.items():
            for is_expert in (False, True):
                mine = [
                    i
                    for i, slot in enumerate(self._slots)
                    if slot.route.rule == name and slot.shard.logical.is_expert == is_expert
                ]
                if mine:
                    yield rule, mine

    def _located_states(self) -> list[ShardedTensor]:
        return [
            self._located_state(slot, state)
            for slot in self._slots
            for state in states_of(slot.shard.logical, slot.route.rule, self._config).values()
        ]

    def _located_state(self, slot: Slot, state: State) -> ShardedTensor:
        """A state as its box of the logical state tensor."""
        shard, data = slot.shard, slot.state[state.name]
        if state.is_like(shard.logical):
            return located(shard, data, state.tensor.key)
        offset, shape = state.box(shard.logical, shard.offset, shard.shape)
        pipeline, tensor_index, _ = shard.replica_id
        axis = self._parallel.axis(shard)
        if axis is not None and not state.has(shard.logical.axes[axis]):
            # A sum over the axis that is split: every part of the weight comes with a copy.
            tensor_index = self._parallel.rank(shard)
        return ShardedTensor(
            key=state.tensor.key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(shape),
            global_shape=state.tensor.shape,
            global_offset=tuple(offset),
            axis_fragmentations=None,
            replica_id=(pipeline, tensor_index, 0),
        )

    def _publish(self) -> None:
        """Round masters to the parameters' precision and send them to the ranks that hold copies."""
        rounded = [slot for slot in self._slots if _has_master(slot.shard)]
        if rounded:
            torch._foreach_copy_([slot.shard.tensor.detach() for slot in rounded], [slot.master for slot in rounded])
        for family in self._families:
            family.spread()

    def _share_out(self, *, is_expert: bool, group: ProcessGroup | None, tensor_group: ProcessGroup | None) -> _Family:
        """Choose owners, and check that the ranks this one exchanges tensors with chose the same.

        Loads depend on a shard's shape only, which tensor-parallel ranks share, so that these own parts of the same
        tensors. Ranks of other pipeline stages or with other experts have other lists; no collective joins them.
        """
        assert not dist.is_initialized() or None not in (group, tensor_group), "a process group is missing"
        shards = [shard for shard in self._shards if shard.logical.is_expert == is_expert]
        owners = assign_owners([self._load(shard) for shard in shards], get_pg_size(group))
        plan = [(shard.key, shard.shape, owner) for shard, owner in zip(shards, owners, strict=True)]
        offsets = [shard.offset for shard in shards]
        kind = "expert" if is_expert else "dense"
        check_same(f"{plan} {offsets}", group, what=f"{kind} shards of data-parallel copies", device=self._device)
        check_same(
            f"{plan} {get_pg_rank(group)}",
            tensor_group,
            what=f"owners of {kind} shards under tensor parallelism",
            device=self._device,
        )
        return _Family(shards, owners, group)

    def _load(self, shard: Shard) -> Load:
        name = route(shard.logical, self._config).rule
        states = states_of(shard.logical, name, self._config)
        numel = state_numel(states, shard.logical, shard.shape) + _has_master(shard) * shard.tensor.numel()
        return Load(flops=self._rules[name].flops(shard), state_bytes=FP32_BYTES * numel)

    def _slot(self, shard: Shard) -> Slot:
        parameter = shard.tensor.detach()
        chosen = route(shard.logical, self._config)
        master = parameter.float() if _has_master(shard) else parameter
        kept = states_of(shard.logical, chosen.rule, self._config)
        state = {name: _zeros(state, shard, master) for name, state in kept.items()}
        return Slot(shard, chosen, master, state, self._blocks(shard))

    def _blocks(self, shard: Shard) -> tuple[Block, ...]:
        if self._ages is None:
            return (Block(0, tuple(slice(0, size) for size in shard.shape)),)
        return tuple(blocks(self._ages(shard.logical), shard.offset, shard.shape))


def _has_master(shard: Shard) -> bool:
    """Whether the parameter is too coarse to be updated itself."""
    return shard.tensor.dtype != torch.float32


def _zeros(state: State, shard: Shard, master: torch.Tensor) -> torch.Tensor:
    """A state before the first update."""
    if state.is_like(shard.logical):
        return torch.zeros_like(master)
    return torch.zeros(state.box(shard.logical, shard.offset, shard.shape)[1], device=master.device)


def located(shard: Shard, tensor: torch.Tensor, key: str) -> ShardedTensor:
    """As `Shard.sharded`, but the owner is the only data-parallel rank that has the tensor, so it is number 0."""
    pipeline, tensor_index, _ = shard.replica_id
    return replace(shard.sharded(tensor, key=key), replica_id=(pipeline, tensor_index, 0))


def _gradient(shard: Shard) -> torch.Tensor:
    """The reduced gradient of a parameter in fp32."""
    grad = getattr(shard.tensor, "main_grad", None)
    if grad is None:
        grad = shard.tensor.grad
    if grad is None:
        raise RuntimeError(f"{shard.key} has no gradient")
    return grad.float()
