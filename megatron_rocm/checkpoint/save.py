"""Saving: whole or not at all, in bounded time, while training goes on.

On the step's thread a save only copies this rank's part into host memory, once the save before it has ended. A thread
of each rank then writes it, and the ranks' threads tell each other through the store where the processes met:
collective calls belong to the step's thread, and a fork would copy a process that holds a device. What takes long in
the thread, hashing, writing and syncing, is done without the interpreter's lock.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from torch import Tensor

from megatron_rocm.checkpoint import manifest, parts
from megatron_rocm.checkpoint.background import Board, bounded
from megatron_rocm.checkpoint.folder import (
    PARTIAL,
    checkpoint_path,
    has_manifest,
    is_whole,
    place,
    prune,
    remove_partial,
)
from megatron_rocm.checkpoint.manifest import File
from megatron_rocm.checkpoint.phases import mark
from megatron_rocm.checkpoint.state import State, metadata, sharded
from megatron_rocm.config.address import is_remote
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import EndsAllRanks, UsageError
from megatron_rocm.platform.disk import sync_file, sync_folder
from megatron_rocm.train.signals import Asked

PATIENCE = 20.0  # seconds that a run which fails waits for the save under way: other ranks may be dead
MOST_FAILED = 3  # saves in a row: a full or shaky disk may recover, and a run that is never saved is better ended

# Called by each rank's thread with a checkpoint that has its final name and the files in it that this rank has written.
After = Callable[[Path, Sequence[str]], None]

_savers = itertools.count()  # the same on all ranks: names a Saver's messages in the store


class SaveFailed(EndsAllRanks):
    """Checkpoints can't be written, so the run ends; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """How a save went; the same on every rank but for the seconds."""

    iteration: int
    path: Path
    fault: str  # "" where it is saved
    stalled: float  # seconds that training waited for it
    seconds: float  # that it took in all

    @property
    def told(self) -> str:
        if not self.fault:
            return f"saved {self.path} in {self.seconds:.1f} s, of which training waited {self.stalled:.2f} s"
        return (
            f"warning: the checkpoint of iteration {self.iteration} could not be saved: {self.fault}. "
            "The checkpoint before it is untouched"
        )


class Saver:
    """Saves a run's states into `root`; every rank has one and calls its methods alike.

    `root` is one folder for all nodes, or with `shared=False` one of each node's own, into which go the files that the
    node's ranks have written (node 0's have what there is one of), and a manifest of all files. `after` are called in
    the background, one after the other, once a checkpoint has its name everywhere; one that raises is told as a
    warning.
    """

    def __init__(
        self,
        run: RunConfig,
        root: str | Path | None = None,
        *,
        shared: bool = True,
        after: Sequence[After] = (),
    ) -> None:
        self.settings = run.checkpoint
        self.described = run.model_dump(mode="json", exclude={"launch"})
        self.root = Path(root or run.checkpoint.folder or "")
        self.after = after
        self._whole = is_whole if shared else has_manifest
        self.newest: Path | None = None  # saved by this Saver
        rank, local = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
        self._rank, self._lead = rank, 0 if shared else rank - local
        self._leads = [0] if shared else list(range(0, dist.get_world_size(), run.parallel.gpus_per_node))
        self._board = Board(f"save/{next(_savers)}", run.checkpoint.save_timeout)
        self._group = mpu.get_data_parallel_group(with_context_parallel=True)
        self._distribution: Any = None  # which rank writes what several have
        self._planned = False
        self._copy = parts.HostCopy()
        self._contents: list[parts.Contents] = []  # of all ranks' parts; rank 0's alone
        self._writer: threading.Thread | None = None
        self._outcome: Outcome | None = None  # of the save before, once it has ended
        self._news: deque[str] = deque()
        self._stalled = 0.0  # seconds; 0 while training waits
        self._failed = 0  # in a row
        self._saves = 0

    def is_due(self, state: State, asked: Asked) -> bool:
        """Whether this step's end is a time to save, given what any rank was asked for."""
        steps = self.settings.save_steps
        return asked.save or bool(steps) and state.iteration % steps == 0

    def save(self, state: State) -> None:
        """Begin to save `state`, which may change once this returns. With ASYNC_SAVE=0 it returns when that is done.

        Raises SaveFailed where the saves before have failed too often.
        """
        began = time.perf_counter()
        self.wait()
        mark("copy")
        with state.whole_parameters():
            part, common = self._part(state)
            if self.settings.async_save:
                tensors: Iterable[Tensor] = self._copy.take(part.tensors)
                part = part._replace(tensors=[])
                self._writer = threading.Thread(
                    target=self._carry_out, args=(state.iteration, part, tensors, common, began), daemon=True
                )
                self._stalled = time.perf_counter() - began
                self._writer.start()
            else:
                self._stalled = 0.0
                self._carry_out(state.iteration, part, parts.on_host(part.tensors), common, began)
                self._count()

    def wait(self, seconds: float | None = None) -> None:
        """Until no save is under way, or so many seconds. Raises SaveFailed where the last ones have failed."""
        if self._writer:
            self._writer.join(seconds)
            if not self._writer.is_alive():
                self._writer = None
                self._count()

    def close(self) -> None:
        """Wait for the last save. Raises SaveFailed where it failed: nothing comes after it."""
        self.wait()
        if self._outcome and self._outcome.fault:
            raise SaveFailed(self._outcome.told.removeprefix("warning: "))

    def news(self) -> list[str]:
        """Lines for the log on saves that have ended since this was last asked for."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _count(self) -> None:
        assert self._outcome
        if not self._outcome.fault:
            self._failed, self.newest = 0, self._outcome.path
            return
        self._failed += 1
        if self._failed == MOST_FAILED:
            raise SaveFailed(
                f"{self._outcome.told.removeprefix('warning: ')}. {MOST_FAILED} saves in a row have failed"
            )

    def _part(self, state: State) -> tuple[parts.Part, bytes]:
        """This rank's part, and on rank 0 what is common to all. The first time ranks agree who writes what."""
        content = sharded(state)
        content["run"] = self.described
        content["content_metadata"] = {name: value for name, value in metadata().items() if name != "dp_cp_group"}
        tensors, common = save_preprocess(content, validate_access_integrity=not self._planned)
        if not self._planned:
            self._distribution = determine_main_replica_uniform_distribution(tensors, self._group)
            self._planned = True
        distribute_main_replicas_with_precomputed_distribution(tensors, self._group, self._distribution)
        return parts.part_of(tensors), parts.serialized(common) if self._rank == 0 else b""

    def _carry_out(
        self, iteration: int, part: parts.Part, tensors: Iterable[Tensor], common: bytes, began: float
    ) -> None:
        """Write, in this rank's thread; what comes of it is `_outcome`."""
        final = checkpoint_path(self.root, iteration)
        warnings: list[str] = []
        with bounded(self.settings.save_timeout, f"saving {final}"):
            told, fault = self._try(lambda: self._write(final, part, tensors, common, warnings))
        self._saves += 1
        seconds = time.perf_counter() - began
        self._outcome = Outcome(iteration, final, fault or told, self._stalled or seconds, seconds)
        if not self._outcome.fault:
            warnings += self._call_after(final)
        self._news += [self._outcome.told, *warnings]
        mark("")

    def _write(
        self, final: Path, part: parts.Part, tensors: Iterable[Tensor], common: bytes, warnings: list[str]
    ) -> str:
        """The ranks' story of a save; what went wrong, told alike on all, or "".

        Every rank says how its part went and rank 0 says what that comes to, so that a fault of one is all ranks'.
        """
        board, rank, number = self._board, self._rank, self._saves
        board.forget(*(f"{number - 1}/{what}/{rank}" for what in ("open", "part", "placed")))
        partial = final.with_name(final.name + PARTIAL)
        mark("open")
        if rank == self._lead:
            board.post(f"{number}/open/{rank}", self._try(lambda: _fresh(partial))[1])
        fault = board.read(f"{number}/open/{self._lead}")
        written = None
        if not fault:
            mark("write")
            written, fault = self._try(lambda: parts.write(partial / parts.file_name(rank), part, tensors))
        mark("gather")
        board.post(f"{number}/part/{rank}", (fault, written, None if number else part.contents))
        if rank == 0:
            board.post(f"{number}/files", self._finish(number, partial, common))
        if rank == self._lead:
            files, fault = board.read(f"{number}/files")
            if not fault:
                _, fault = self._try(lambda: _settle(partial, final, files))
            if fault:
                shutil.rmtree(partial, ignore_errors=True)
            board.post(f"{number}/placed/{rank}", fault)
        if rank == 0:
            faults = [board.read(f"{number}/placed/{lead}") for lead in self._leads]
            board.post(f"{number}/end", next(filter(None, faults), ""))
            board.forget(f"{number - 1}/files", f"{number - 1}/end")  # all have read them before this save
        fault = board.read(f"{number}/end")
        if not fault and rank == self._lead:
            mark("prune")
            keep = self.settings.keep_last, self.settings.keep_every
            _, old = self._try(lambda: prune(self.root, *keep, self._whole))
            warnings += [f"warning: an old checkpoint could not be removed: {old}"] if old else []
        return str(fault)

    def _finish(self, number: int, partial: Path, common: bytes) -> tuple[dict[str, File], str]:
        """On rank 0, once all parts are written: write what there is one of. All files, and what went wrong."""
        told = [self._board.read(f"{number}/part/{rank}") for rank in range(dist.get_world_size())]
        if not number:
            self._contents = [contents for _, _, contents in told]
        fault = next((fault for fault, _, _ in told if fault), "")
        if fault:
            return {}, fault
        mark("manifest")
        written = [one for _, one, _ in told]
        own, fault = self._try(lambda: parts.write_common(partial, common, self._contents, written))
        return {**(own or {}), **{parts.file_name(rank): one.file for rank, one in enumerate(written)}}, fault

    def _call_after(self, final: Path) -> list[str]:
        """Call what is to be called after a save; warnings of what that raised."""
        mine = [parts.file_name(self._rank)]
        if self._rank == 0:
            mine += [parts.COMMON, parts.INDEX, parts.WHOLE]
        faults = [self._try(lambda call=call: call(final, mine))[1] for call in self.after]  # type: ignore[misc]
        return [f"warning: {fault}" for fault in faults if fault]

    def _try(self, action: Callable[[], Any]) -> tuple[Any, str]:
        """What it returns, and what it raised in words."""
        try:
            return action(), ""
        except OSError as error:
            where = f" ({error.filename})" if error.filename else f" ({self.root})"
            return None, f"rank {self._rank}: {error.strerror or error}{where}"
        except Exception as error:
            return None, f"rank {self._rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _settle(partial: Path, final: Path, files: dict[str, File]) -> None:
    """Have all that was written on disk, say what it is, and give it its name."""
    mark("manifest")
    for name in (parts.COMMON, parts.INDEX, parts.WHOLE):
        if (partial / name).exists():
            sync_file(partial / name)
    manifest.write(partial, files)
    sync_folder(partial)
    place(partial, final)


@contextmanager
def saving(run: RunConfig, *, shared: bool = True, after: Sequence[After] = ()) -> Iterator[Saver | None]:
    """A Saver for a run that is saved, whose last save has ended when this does. Raises SaveFailed where it failed."""
    if not run.checkpoint.save:
        yield None
        return
    saver = Saver(run, shared=shared, after=after)
    try:
        yield saver
    except Exception:
        with suppress(SaveFailed):
            saver.wait(PATIENCE)
        raise
    saver.close()


def save(run: RunConfig, state: State) -> Path:
    """Save `state` into SAVE_CKPT_PATH and wait for it; every rank calls it. The checkpoint. Raises SaveFailed."""
    saver = Saver(run)
    saver.save(state)
    saver.close()
    assert saver.newest
    return saver.newest


def prepare(run: RunConfig) -> bool:
    """Make the folder of checkpoints ready; every rank calls it before the first save. Whether all nodes see the same.

    They need not where SAVE_CKPT_PATH is remote, as each then sends its own part. Raises UsageError, on every rank,
    where the folder can't be written, or is not the same where it has to be.
    """
    if run.core.optimizer.get("use_precision_aware_optimizer"):
        raise UsageError(
            "core.optimizer.use_precision_aware_optimizer=True: its moments of low precision can't be saved; "
            "leave it out, or don't set SAVE_CKPT_PATH"
        )
    remote = is_remote(run.checkpoint.save)
    variable, root = "LOCAL_CKPT_PATH" if remote else "SAVE_CKPT_PATH", Path(run.checkpoint.folder or "")
    shared = seen_by_all(variable, root)
    if not shared and not remote:
        raise UsageError(f"{variable}={root}: some nodes see another folder there. Name one that all nodes share")
    if dist.get_rank() == 0 or (not shared and os.environ.get("LOCAL_RANK", "0") == "0"):
        remove_partial(root)
    dist.barrier()
    return shared


def seen_by_all(variable: str, root: Path) -> bool:
    """Make a folder on rank 0's node; whether all ranks see that one. Raises UsageError where it can't be written."""
    probe, fault = root / f".shared-{os.urandom(4).hex()}", ""
    if dist.get_rank() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            fault = f"{variable}={root} can't be written: {error.strerror}"
    told: list[Any] = [probe, fault]
    dist.broadcast_object_list(told)
    probe, fault = told
    if fault:
        raise UsageError(fault)
    sees = probe.exists()
    all_see: list[bool] = [sees] * dist.get_world_size()
    dist.all_gather_object(all_see, sees)
    if dist.get_rank() == 0:
        probe.unlink()
    return all(all_see)
