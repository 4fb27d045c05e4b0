"""Merging of experts: every expert moves a little towards those of its layer that are most like it.

SPES (arXiv 2602.11543), as its authors' code has it. For the experts of one layer, all at once from the old values,

    theta_j <- theta_j + a (mean of theta_k over the neighbours k of j - theta_j)

where the neighbours are the K other experts whose gate matrices have the largest cosine with that of j. Each tensor is
mixed with the same tensor of the neighbours, entry by entry. theta_j is the fp32 master, which only the owner has; the
neighbours' are the published weights, in the precision of the computation, which every site has.

Letters: E experts of a layer, K neighbours, n columns (entries of an expert's matrix) handled at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pretrain.config.decentral import MergeConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.shards import Shard
from pretrain.optim.rules import Slot
from pretrain.parallel.engine import Engine

COSINE_DIGITS = 10
"""Cosines are rounded to these: copies of an expert are then equally alike in whatever order a layout adds up, and the
lowest number is chosen among them. Weights in bf16 that differ in one entry of a million differ before that."""


@dataclass(frozen=True)
class Similarity:
    """How alike the experts of a layer are: cosine of the gate matrices of two of them."""

    mean: float
    """Over all pairs."""
    largest: float


@dataclass(frozen=True)
class Merged:
    """What merging makes of the experts; nothing has been changed."""

    masters: list[torch.Tensor]
    """The new master of each slot that was given: fp32 on the host, in its shape."""
    similarity: dict[int, Similarity]
    """Layer -> before."""


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Cosines of vectors whose dot products are `gram`: [E, E] fp64. Those with a vector of zeros are 0."""
    norms = gram.diagonal().sqrt()
    lengths = torch.outer(norms, norms)
    return torch.where(lengths > 0, gram / lengths, 0.0).round(decimals=COSINE_DIGITS)


def neighbours(cosine: torch.Tensor, count: int) -> torch.Tensor:
    """For each expert, the `count` others (all, if there are fewer) most like it: int64 [E, K], the nearest first.

    Of those equally alike, the lowest number comes first.
    """
    others = cosine.clone().fill_diagonal_(-torch.inf)
    order = torch.sort(others, dim=1, descending=True, stable=True).indices
    return order[:, : min(count, len(cosine) - 1)]


@torch.no_grad()
def similarity(engine: Engine, model: ModelConfig, *, bucket_bytes: int) -> dict[int, Similarity]:
    """How alike the experts are now: MoE layer -> figures. Collective; the same on every rank."""
    return _figures(engine, model, {layer.number: layer.cosines(bucket_bytes) for layer in _layers(engine, model)})


def noted(found: Mapping[int, Similarity]) -> dict[str, Any]:
    """Figures of the layers as a field of an event; no field where there are none."""
    return {"similarity": {str(layer): asdict(figures) for layer, figures in found.items()}} if found else {}


@torch.no_grad()
def merged(
    engine: Engine,
    model: ModelConfig,
    merge: MergeConfig,
    step: int,
    *,
    slots: Sequence[Slot],
    bucket_bytes: int,
) -> Merged:
    """New masters of this rank's experts by the merge of a step at which one is due. Collective over the site.

    Args:
        engine: whose weights are those published of all experts.
        slots: those of experts that this rank owns; other ranks may have others, or none.
        bucket_bytes: device memory to use.
    """
    coefficient = merge.coefficient_at(step)
    assert coefficient > 0, f"no merge is due at step {step}"
    staged = [torch.empty(slot.master.shape, dtype=torch.float32) for slot in slots]
    found: dict[int, torch.Tensor] = {}
    taken = 0
    for layer in _layers(engine, model):
        found[layer.number] = layer.cosines(bucket_bytes)
        nearest = neighbours(found[layer.number], merge.neighbours)
        for key in layer.boxes:
            own = [(slot, new) for slot, new in zip(slots, staged, strict=True) if slot.shard.key == key]
            taken += len(own)
            for columns, published in layer.gathered(key, bucket_bytes):
                for slot, new in own:
                    first, count = slot.shard.offset[0], slot.shard.shape[0]
                    old = slot.shard.view(slot.master).flatten(1)[:, columns]
                    towards = _mean_step(old, published, nearest[first : first + count])
                    slot.shard.view(new).flatten(1)[:, columns] = old.add(towards, alpha=coefficient).cpu()
    assert taken == len(slots), f"no experts of this rank: {[slot.shard.key for slot in slots]}"
    return Merged(staged, _figures(engine, model, found))


def _mean_step(old: torch.Tensor, published: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """From rows `old` [rows, n] to the means of the rows of `published` [E, n] that `nearest` [rows, K] names.

    Differences are averaged: between copies of an expert they are zero, to the last bit.
    """
    total = torch.zeros_like(old)
    for number in nearest.unbind(1):
        total += published[number] - old
    return total / nearest.shape[1]


@dataclass(frozen=True)
class _Layer:
    """The experts of one layer on this rank, with the ranks that have the others."""

    number: int
    experts: int
    """E, over all ranks."""
    boxes: dict[str, list[Shard]]
    """Key -> this rank's boxes, by the numbers of their experts."""
    across_experts: ProcessGroup
    across_columns: ProcessGroup

    def cosines(self, bucket_bytes: int) -> torch.Tensor:
        """Of the experts' gate matrices: [E, E] fp64. Collective."""
        gated = next(key for key, (box, *_) in self.boxes.items() if "gate_up" in box.logical.axes)
        device = self.boxes[gated][0].tensor.device
        gram = torch.zeros(self.experts, self.experts, dtype=torch.float64, device=device)
        for _, part in self.gathered(gated, bucket_bytes, gate_only=True):
            wide = part.double()
            gram.addmm_(wide, wide.T)
        dist.all_reduce(gram, group=self.across_columns)
        return cosines(gram)

    def gathered(self, key: str, bucket_bytes: int, *, gate_only: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Weights of all experts, every one a row, some columns at a time: (which of them, [E, n]). Collective.

        Columns are entries of the matrix, or of its `gate_only`, as far as this rank's part goes.
        """
        views = [box.view()[:, 0] if gate_only else box.view() for box in self.boxes[key]]
        rows = [view.flatten(1) for view in views]
        total = rows[0].shape[1]
        # An entry takes up to 16 bytes: as sent, as received, and as fp64 or in two steps on the way to the mean.
        width = max(1, bucket_bytes // (16 * self.experts))
        for start in range(0, total, width):
            columns = slice(start, min(start + width, total))
            mine = torch.cat([row[:, columns] for row in rows])
            if self.across_experts.size() == 1:
                yield columns, mine
                continue
            whole = mine.new_empty(self.across_experts.size(), *mine.shape)
            dist.all_gather(list(whole.unbind()), mine, group=self.across_experts)
            yield columns, whole.flatten(0, 1)


def _layers(engine: Engine, model: ModelConfig) -> Iterator[_Layer]:
    """The MoE layers of this rank, in the same order on all ranks that have them."""
    groups, E = engine.mesh.groups, model.num_experts
    local = E // groups.ep.size()
    found: dict[int, dict[str, list[Shard]]] = {}
    experts = [shard for shard in engine.shards if shard.logical.is_expert]
    for shard in sorted(experts, key=lambda shard: (shard.logical.layer, shard.key, shard.offset)):
        assert shard.logical.layer is not None
        found.setdefault(shard.logical.layer, {}).setdefault(shard.key, []).append(shard)
    for number, boxes in found.items():
        for key, parts in boxes.items():
            held = [expert for part in parts for expert in range(part.offset[0], part.offset[0] + part.shape[0])]
            assert held == [*range(local * groups.ep.rank(), local * (groups.ep.rank() + 1))], f"{key}: has {held}"
        yield _Layer(number, E, boxes, groups.ep, groups.expt_tp)


def _figures(engine: Engine, model: ModelConfig, found: dict[int, torch.Tensor]) -> dict[int, Similarity]:
    """Figures of all layers from the cosines of this rank's. Collective."""
    table = torch.zeros(len(model.moe_layers), 2, dtype=torch.float64, device=engine.mesh.device)
    for number, cosine in found.items():
        pairs = cosine[~torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)]
        table[model.moe_layers.index(number)] = torch.stack([pairs.mean(), pairs.max()])
    dist.all_reduce(table, group=engine.mesh.groups.pp)
    return {number: Similarity(*row) for number, row in zip(model.moe_layers, table.tolist(), strict=True)}
