"""Sites that meet after every step of plain SGD do what one run does, as far as they should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.optim import OptimConfig
from pretrain.config.ownership import owner_of
from pretrain.data import batches
from pretrain.optim import sharded
from pretrain.optim.registry import make_rules
from pretrain.optim.rules import Rule, Slot
from tests.decentral.recording import Snapshot, meetings, sites_config
from tests.helpers.runs import make_corpus

# Weights of size 1 after a step or two, sums of gradients in another order.
TOLERANCE = 1e-6
# Selection biases follow signs of counts, not gradients: without them.
SGD: dict[str, Any] = {
    "optim": {"lr": 1.0, "clip_grad": 0.0},
    "schedule": {"warmup_steps": 0},
    "model": {"router": {"aux_loss": 0.01}},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Sgd(Rule):
    """theta = theta - lr g, in the place of every rule."""

    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], *, lr_ratios: Sequence[float], step: int
    ) -> None:
        for slot, grad in zip(slots, grads, strict=True):
            slot.apply(slot.shard.view(grad), lr_ratios)


def plain_sgd() -> None:
    """Have this process's optimizers make plain steps."""

    def rules(config: OptimConfig, groups: Any) -> dict[Any, Rule]:
        return {name: Sgd() for name in make_rules(config, groups)}

    sharded.make_rules = rules  # type: ignore[assignment]


def plain_sgd_on_equal_batches() -> None:
    """And both sites read the same micro-batches, each of which a run of one place reads twice."""
    plain_sgd()

    def micro_batch(iterator: Any, number: int) -> dict[str, torch.Tensor]:
        step, local = divmod(number, iterator.micro_batches_per_step)
        of_step = local * iterator._dp_size + iterator._dp_rank
        start = step * iterator._batch.global_batch_size + (of_step - of_step % 2) * iterator._batch.micro_batch_size
        samples = torch.stack([iterator._dataset[start + i] for i in range(iterator._batch.micro_batch_size)])
        return {"tokens": samples[:, :-1].contiguous(), "labels": samples[:, 1:].contiguous()}

    batches.BatchIterator._read = micro_batch  # type: ignore[method-assign]


def gaps(found: Snapshot, wanted: Snapshot) -> tuple[float, float]:
    """Largest difference of the weights: of shared ones, of experts."""
    largest = [0.0, 0.0]
    for place, weight in found.weights.items():
        gap = float((weight.double() - wanted.weights[place].double()).abs().max())
        largest[place[1] is not None] = max(largest[place[1] is not None], gap)
    return largest[0], largest[1]


def test_on_equal_batches_the_whole_model_is_that_of_one_run(corpus: Path, tmp_path: Path) -> None:
    every_step = {"decentral": {"sync_every_steps": 1}, "budget": {"steps": 2}} | SGD
    sites = sites_config(corpus, tmp_path / "sites", **every_step)
    one = sites_config(corpus, tmp_path / "one", sites=0, **every_step)
    (first,), (second,) = meetings(sites, tmp_path / "meet", prepare=plain_sgd_on_equal_batches)
    ((plain,),) = meetings(one, tmp_path / "alone", prepare=plain_sgd_on_equal_batches)
    for site in (first, second):
        assert max(gaps(site[-1].after, plain[-1].after)) < TOLERANCE
    assert min(gaps(first[0].after, plain[-1].after)) > 100 * TOLERANCE, "nothing has been trained"


@pytest.mark.parametrize("kind", ["spes", "diloco"])
def test_on_their_own_batches_shared_weights_are_those_of_one_run(corpus: Path, tmp_path: Path, kind: str) -> None:
    one_step = {"decentral": {"sync_every_steps": 1, "kind": kind, "outer": "average"}, "budget": {"steps": 1}} | SGD
    sites = sites_config(corpus, tmp_path / "sites", **one_step)
    one = sites_config(corpus, tmp_path / "one", sites=0, **one_step)
    (first,), (second,) = meetings(sites, tmp_path / "meet", prepare=plain_sgd)
    ((plain,),) = meetings(one, tmp_path / "alone", prepare=plain_sgd)
    for site in (first, second):
        shared, experts = gaps(site[-1].after, plain[-1].after)
        assert shared < TOLERANCE
        # With one owner, an expert has learned from its owner's half of the batch alone.
        assert (experts > 50 * TOLERANCE) == (kind == "spes")
    assert gaps(first[-1].before, plain[-1].after)[0] > 100 * TOLERANCE, "each site's own step is another"
    if kind == "spes":
        for place, weight in first[-1].after.weights.items():
            if place[1] is not None:
                owners = (first, second)[owner_of(place[1], 2)][-1].before
                assert torch.equal(weight, owners.weights[place])
