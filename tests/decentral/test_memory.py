"""A synchronisation takes the memory of what it stages, and buckets; never a second model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain import syncing
from pretrain.config.schema import Config
from pretrain.platform.memory import PeakMemory
from tests.decentral.recording import record, sites_config
from tests.helpers.runs import make_corpus
from tests.helpers.sites import at_site, run_sites

MIB = 1 << 20
# Pages, Python's objects, and gloo's own buffers.
SLACK_BYTES = 6 * MIB


def _extra_bytes(config: Config, folder: Path) -> tuple[int, int]:
    """(most memory that the round took beyond what was there, bytes that it staged)."""
    found: list[int] = []
    staged: list[int] = []
    meet, stage = syncing.Sites._meet, syncing.Sites._stage

    def measured(sites: syncing.Sites) -> None:
        memory = PeakMemory(sites.run.mesh.device)
        meet(sites)
        found.append(memory.extra_bytes() or 0)

    def counted(sites: syncing.Sites, *arguments: Any) -> syncing.Staged:
        result = stage(sites, *arguments)
        tensors = [*result.shared, *result.outer, *result.experts.values(), *result.biases.values()]
        staged.append(sum(tensor.nbytes for tensor in tensors))
        return result

    syncing.Sites._meet, syncing.Sites._stage = measured, counted  # type: ignore[method-assign]
    record(config, folder, {})
    return found[-1], staged[-1]


@pytest.mark.parametrize("bucket_mib", [1, 64])
def test_a_round_takes_what_it_stages_and_buckets(tmp_path: Path, bucket_mib: int) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    model = {"hidden_size": 256, "num_layers": 4, "num_experts": 8, "expert_ffn_size": 768}
    config = sites_config(
        corpus,
        tmp_path / "run",
        model=model,
        decentral={"bucket_mib": bucket_mib},
        budget={"steps": 2},
        schedule={"warmup_steps": 1},
    )
    (tmp_path / "meet").mkdir()
    results = run_sites(_extra_bytes, 1, [(at_site(config, site), tmp_path / "meet") for site in range(2)])
    for ((extra, staged),) in results:
        assert staged > 32 * MIB, "large enough to be seen"
        # Three parts of a bucket, one of which the round copies once more.
        bound = staged + 2 * MIB + SLACK_BYTES
        assert (extra <= bound) == (bucket_mib == 1), f"{extra / MIB:.1f} MiB for {staged / MIB:.1f} MiB staged"
