"""Saving: whole or not at all, in bounded time."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_dist

from megatron_rocm.checkpoint.folder import PARTIAL, checkpoint_path, remove_partial, set_latest
from megatron_rocm.checkpoint.state import State, metadata, sharded
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder


class InProcess(torch_dist.TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format, written by this process itself.

    megatron-core's own strategy starts a Manager process, which imports the main program anew (4 to 6 s whatever the
    size), and forks a writer for each file.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        flat, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            torch_dist.mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def prepare(run: RunConfig) -> None:
    """Make SAVE_CKPT_PATH ready; every rank calls it before the first save.

    Raises UsageError, on every rank, where it can't be written or is not the same folder on all nodes: each node would
    keep its own part of every checkpoint.
    """
    if run.core.optimizer.get("use_precision_aware_optimizer"):
        raise UsageError(
            "core.optimizer.use_precision_aware_optimizer=True: its moments of low precision can't be saved; "
            "leave it out, or don't set SAVE_CKPT_PATH"
        )
    root = Path(run.checkpoint.save or "")
    probe, fault = root / f".shared-{os.urandom(4).hex()}", ""
    if dist.get_rank() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_partial(root)
            probe.touch()
        except OSError as error:
            fault = f"SAVE_CKPT_PATH={root} can't be written: {error.strerror}"
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
    if not all(all_see):
        raise UsageError(f"SAVE_CKPT_PATH={root}: some nodes see another folder there. Name one that all nodes share")


def save(run: RunConfig, state: State) -> Path:
    """Write the checkpoint of `state` into SAVE_CKPT_PATH; every rank calls it. Its folder.

    Ends the process with status 1 where it takes longer than run.checkpoint.save_timeout seconds.
    """
    assert run.checkpoint.save
    final = checkpoint_path(run.checkpoint.save, state.iteration)
    partial = final.with_name(final.name + PARTIAL)
    first = dist.get_rank() == 0
    with bounded(run.checkpoint.save_timeout, f"saving {final}"):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with state.whole_parameters():
            content = sharded(state)
            content["run"] = run.model_dump(mode="json", exclude={"launch"})
            how = {name: value for name, value in metadata().items() if name != "dp_cp_group"}
            dist_checkpointing.save(content, str(partial), InProcess(), content_metadata=how)
        if first:
            sync_folder(partial)
            # One that a killed run had finished but not yet named.
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            set_latest(final.parent, state.iteration)
        dist.barrier()
    return final


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """End this process, saying on which rank and in which call it hung, where the block takes longer."""
    main = threading.get_ident()

    def end() -> None:
        print(
            f"rank {dist.get_rank()}: {what} has not ended after {seconds:g} seconds, in {_whereabouts(main)}. "
            "The checkpoint before it is untouched. Is the disk full or hanging, or another rank dead? "
            "SAVE_TIMEOUT sets the limit",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _whereabouts(thread: int) -> str:
    """The innermost calls of a thread."""
    frame = sys._current_frames().get(thread)
    calls: list[str] = []
    while frame and len(calls) < 3:
        calls.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(calls)
