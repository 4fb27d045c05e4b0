"""The parallel layout of this run: one frozen value, made here, passed down.

megatron-core still reads its module-level `parallel_state` in places (schedules, embedding groups), so the mesh
initialises that, too; our own code uses only the groups held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from pretrain.config.schema import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Process groups and this rank's place in them."""

    groups: ProcessGroupCollection
    config: ParallelConfig
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def data_rank(self) -> int:
        """Index among the ranks that read different data (context-parallel ranks read the same)."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first layers (of its first chunk)."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss (in its last chunk)."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def is_main(self) -> bool:
        """The one rank that writes logs."""
        return dist.get_rank() == 0


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """Create the process groups of a layout; the default process group must exist and fit the layout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.pipeline_chunks if parallel.pipeline_chunks > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    # Layers without dropout draw nothing, but megatron-core's layers ask for the tracker's streams to exist.
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return Mesh(ProcessGroupCollection.use_mpu_process_groups(), parallel, device)


def forget_mesh() -> None:
    """Let another layout be built in the same processes."""
    parallel_state.destroy_model_parallel()


def destroy_mesh() -> None:
    """Forget the layout and end its process groups, on all ranks together.

    megatron-core drops them without ending them: each would keep its threads, and on a GPU its communicator's memory.
    """
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    forget_mesh()
    for group in groups:
        dist.destroy_process_group(group)


@dataclass
class Meshes:
    """The one layout in force; another one takes its place when a run changes its layout."""

    device: torch.device
    current: Mesh | None = None

    def of(self, parallel: ParallelConfig) -> Mesh:
        """The mesh of a layout: the current one, if it is that. Collective."""
        if self.current is None or self.current.config != parallel:
            self.close()
            self.current = build_mesh(parallel, self.device)
        return self.current

    def close(self) -> None:
        """End the current layout. Collective."""
        if self.current:
            destroy_mesh()
        self.current = None


@contextmanager
def mesh_of(parallel: ParallelConfig, device: torch.device) -> Iterator[Mesh]:
    """The mesh for the time of a `with` block."""
    mesh = build_mesh(parallel, device)
    try:
        yield mesh
    except BaseException:
        # Other ranks may be anywhere: nothing that they would have to do, too.
        forget_mesh()
        raise
    destroy_mesh()
