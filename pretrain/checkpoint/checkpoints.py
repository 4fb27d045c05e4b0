"""A run's checkpoints: saving in the foreground or background, finding the newest valid one, retention."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica

from pretrain.checkpoint.format import to_json
from pretrain.checkpoint.ranks import Ranks
from pretrain.checkpoint.steps import Moment, list_moments, recover, remove
from pretrain.checkpoint.verify import hash_findings, read_manifest, verify_checkpoint
from pretrain.checkpoint.write import write_checkpoint
from pretrain.config.schema import CheckpointConfig
from pretrain.errors import CheckpointError

# Ranks wait for the slowest one's files. A rank that dies is noticed at once; this is for one that hangs.
TIMEOUT = timedelta(hours=1)

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder. Every method but `moments` is collective over all ranks of the run.

    `on_durable(path, seconds since the call of save)` is called on every rank once a checkpoint is complete and on
    the disk; with `asynchronous`, on the thread that wrote it. `on_damaged(path, findings)` is called on every rank
    for each checkpoint that `latest_valid` passes over.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        on_durable: Callable[[Path, float], None] | None = None,
        on_damaged: Callable[[Path, Sequence[str]], None] | None = None,
    ) -> None:
        """Make the folder, check that it can be written to, and clear away what an interrupted save left."""
        self.directory = directory
        self.config = config
        self.on_durable = on_durable
        self.on_damaged = on_damaged
        # A process group of our own, over the CPU: collectives of a background save on a shared group would mix
        # with the training step's.
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self._ranks = Ranks(group)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._host: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        with self._ranks.together():
            if self._ranks.rank == 0:
                _prepare(directory)

    def moments(self) -> dict[Moment, Path]:
        """The folder of every checkpoint, oldest first, valid or not."""
        return list_moments(self.directory)

    def latest_valid(self, *, deep: bool = True) -> Path | None:
        """The newest sound checkpoint; None when there is none at all.

        Damaged ones are named in the log and to `on_damaged`, and passed over. With `deep`, the ranks share in
        hashing the files. Raises CheckpointError when there are checkpoints but all are damaged: starting
        from scratch is then for the user to decide. Waits for a pending save first.
        """
        self.wait()
        names = self._ranks.broadcast([path.name for path in self.moments().values()])
        problems = []
        for path in (self.directory / name for name in reversed(names)):
            findings = self._verify(path, deep=deep)
            if not findings:
                return path
            problems.append(f"{path.name}: {findings[0]}")
            if self._ranks.rank == 0:
                _log.warning("%s is damaged and passed over: %s", path, "; ".join(findings))
            if self.on_damaged:
                self.on_damaged(path, findings)
        if problems:
            raise CheckpointError(
                f"{self.directory}: all {len(problems)} checkpoints are damaged ({'; '.join(problems[:3])}); "
                "restore one, or move the folder away to start from scratch"
            )
        return None

    def save(
        self,
        step: int,
        tensors: Sequence[ShardedTensor],
        *,
        state: Mapping[str, object],
        config_toml: str,
        partial_keys: Collection[str] = (),
        grown: bool = False,
    ) -> None:
        """Write the checkpoint of `step`, then remove those that retention no longer wants.

        `partial_keys`: see `write_checkpoint`.
        `grown`: the model grew after `step`; this checkpoint stands beside the one of `step` and is the newer.

        With `asynchronous`, returns when the tensors are copied to host memory (one copy, kept for the next time: a
        save first waits for the one before). Raises the error of that one, or its own, as CheckpointError on all ranks.
        """
        started = time.monotonic()
        self.wait()
        with self._ranks.together():
            # A copy in JSON terms: the loop goes on to change its state, and what is not JSON is found now.
            state = json.loads(to_json(dict(state)))
            if self.config.asynchronous:
                tensors = self._copy_to_host(tensors)
        write = partial(write_checkpoint, step=step, state=state, config_toml=config_toml, partial_keys=partial_keys)
        work = partial(self._save, Moment(step, grown), tensors, write, started=started)
        if self.config.asynchronous:
            self._pending = self._writer.submit(work)
        else:
            work()

    def wait(self) -> None:
        """Return when no save is pending; call before exit. Raises the error of a background save."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _copy_to_host(self, tensors: Sequence[ShardedTensor]) -> list[ShardedTensor]:
        """The main replicas with their data copied to host memory.

        The buffers are kept from save to save: to get 2.5 GiB of fresh memory takes 2 s in page faults, to copy as
        much into old memory 0.4 s (one CPU core), and page-locked memory is costlier still to get.
        """
        old, self._host = self._host, {}
        copies = []
        for tensor in tensors:
            if not is_main_replica(tensor.replica_id):
                continue
            data, box = tensor.data.detach(), (tensor.key, tuple(tensor.global_offset))
            buffer = old.pop(box, None)
            if buffer is None or (buffer.shape, buffer.dtype) != (data.shape, data.dtype):
                buffer = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda)
            self._host[box] = buffer.copy_(data)
            copies.append(replace(tensor, data=buffer))
        return copies

    def _save(
        self, moment: Moment, tensors: Sequence[ShardedTensor], write: Callable[..., None], *, started: float
    ) -> None:
        path = self.directory / moment.name
        write(path, tensors, group=self._ranks.group)
        with self._ranks.together():
            if self.on_durable:
                self.on_durable(path, time.monotonic() - started)
            if self._ranks.rank == 0:
                _remove(expired(self.directory, self.config))

    def _verify(self, path: Path, *, deep: bool) -> list[str]:
        """`verify_checkpoint`, with the files to hash dealt out to the ranks."""
        with self._ranks.together():
            found = verify_checkpoint(path, deep=False) if self._ranks.rank == 0 else []
        findings = self._ranks.broadcast(found)
        if deep and not findings:
            with self._ranks.together():
                manifest = read_manifest(path)
                share = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
                found = hash_findings(path, manifest, share)
            findings = self._ranks.broadcast([finding for part in self._ranks.gather(found) for finding in part])
        return findings


def expired(directory: Path, config: CheckpointConfig) -> list[Path]:
    """Checkpoints to remove: all that are older than the `keep` newest valid ones, but no pinned ones.

    A damaged one does not count as one of the newest, so it never pushes out a good one. A pinned step keeps both of
    its checkpoints when the model grew after it.
    """
    valid = 0
    old = []
    for moment, path in reversed(list_moments(directory).items()):
        pinned = config.keep_every_steps > 0 and moment.step % config.keep_every_steps == 0
        if valid < config.keep:
            valid += not verify_checkpoint(path, deep=False)
        elif not pinned:
            old.append(path)
    return old


def _prepare(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A folder that cannot be written to is better found now than at the first save.
        with tempfile.TemporaryFile(dir=directory):
            pass
        recover(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot keep checkpoints here: {error.strerror}") from error


def _remove(checkpoints: Sequence[Path]) -> None:
    for path in checkpoints:
        try:
            remove(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot remove this old checkpoint: {error.strerror}") from error
