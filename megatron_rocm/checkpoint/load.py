"""Resuming: the whole state of a run, from SAVE_CKPT_PATH or else from LOAD_CKPT_PATH."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_rocm.checkpoint.folder import TRACKER, find
from megatron_rocm.checkpoint.state import RNG, SHARDS, State, restore, sharded
from megatron_rocm.checkpoint.unpickle import read_metadata
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError

# What of the model may differ from the checkpoint: names, and what only the layout decides.
MODEL_MAY_DIFFER = {"size", "title", "padded_vocab_size", "max_position_embeddings", "init_std"}
LAYOUT = ("tp", "pp", "vpp", "cp", "dp")
T = TypeVar("T")


def resume(run: RunConfig, state: State) -> Path | None:
    """Bring `state` to where the newest checkpoint left off; every rank calls it. The checkpoint, or None.

    With the same layout, training goes on bit-identically. With another, weights, optimizer, data position and
    schedule are the same, the random generators are not. Raises UsageError.
    """
    path = _find_together(run)
    if path is None:
        return None
    stored = read_metadata(path).state_dict_metadata  # refuses a pickle that calls code, before megatron-core reads it
    common = _read(path, lambda: dist_checkpointing.load_common_state_dict(str(path)))
    saved = common.get("run")
    if not isinstance(saved, dict):
        raise UsageError(f"{path} was not written by megatron-rocm: it does not hold the run's configuration")
    check(run, saved, path)
    same_layout = all(saved["parallel"][size] == getattr(run.parallel, size) for size in LAYOUT)
    _read(path, lambda: _load(path, state, stored, with_rng=same_layout))
    return path


def _find_together(run: RunConfig) -> Path | None:
    """`find`, with one answer for all ranks; its UsageError too is raised on all."""
    try:
        mine = find(run), ""
    except UsageError as error:
        mine = None, str(error)
    answers: list[tuple[Path | None, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    for path, fault in answers:
        if fault:
            raise UsageError(fault)
        if path != mine[0]:
            raise UsageError(
                f"nodes see different checkpoints: {path or 'none'} and {mine[0] or 'none'}. "
                "SAVE_CKPT_PATH and LOAD_CKPT_PATH must lie on a file system that all nodes share"
            )
    return mine[0]


def check(run: RunConfig, saved: dict[str, Any], path: Path) -> None:
    """Raise UsageError unless `run` can go on from the checkpoint of the run `saved`."""
    now = run.model_dump(mode="json")
    for section, names in (
        ("model", [name for name in saved["model"] if name not in MODEL_MAY_DIFFER]),
        ("precision", ["dtype"]),
        ("optimizer", ["name"]),
    ):
        wrong = [name for name in names if saved[section][name] != now[section][name]]
        if wrong:
            differences = ", ".join(f"{name} {saved[section][name]} there, {now[section][name]} here" for name in wrong)
            raise UsageError(
                f"the checkpoint {path} is of another {section}: {differences}. "
                "Use the settings it was made with, or another SAVE_CKPT_PATH"
            )
    there, here = saved["data"].get("fingerprint"), run.data.fingerprint
    if there and here and there != here:
        raise UsageError(
            f"the checkpoint {path} was trained on data of another tokenizer ({saved['data']['tokenizer_model']}) than "
            f"this run's ({run.data.tokenizer_model}): the same ids are other words. Prepare the data with that one"
        )


def _load(path: Path, state: State, stored: Collection[str], *, with_rng: bool) -> None:
    wanted = sharded(state, stored)
    if not with_rng:
        del wanted[RNG]
    # By themselves: a weight of FSDP's is read twice where it is both weight and master copy here.
    in_place = {SHARDS: wanted.pop(SHARDS)}
    dist_checkpointing.load(in_place, str(path))
    restore(state, dist_checkpointing.load(wanted, str(path)))


def _read(path: Path, action: Callable[[], T]) -> T:
    """Do it; whatever goes wrong in reading a checkpoint is a fault of that checkpoint."""
    try:
        return action()
    except (Exception, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = " ".join(str(causes[0]).split())[:300]
        raise UsageError(
            f"the checkpoint {path} can't be read ({type(causes[0]).__name__}: {reason}). "
            f"Write the iteration of another one into {TRACKER} beside it, or use another SAVE_CKPT_PATH"
        ) from error
