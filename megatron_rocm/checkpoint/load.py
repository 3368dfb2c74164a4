"""Going on from a checkpoint: the whole state of a run, or the weights alone, in whatever layout both have."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_rocm.checkpoint import choose, manifest, megatron_lm, reader, state
from megatron_rocm.checkpoint.choose import Choice
from megatron_rocm.checkpoint.contents import structural_faults
from megatron_rocm.checkpoint.keys import MASTERS, STATE
from megatron_rocm.checkpoint.state import RNG, SHARDS, State
from megatron_rocm.checkpoint.unpickle import read_common, read_metadata
from megatron_rocm.config.address import is_remote
from megatron_rocm.config.changes import check
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError

LAYOUT = ("tp", "pp", "vpp", "cp", "dp")
EMBEDDING = "embedding.word_embeddings.weight"
T = TypeVar("T")


class Start(NamedTuple):
    """Where a run goes on from, and lines on that for its log."""

    path: Path | None = None  # None: it starts anew
    notes: tuple[str, ...] = ()


class _Take(NamedTuple):
    """What of a checkpoint is taken."""

    optimizer: bool = True
    position: bool = True  # iteration, samples, schedule

    @classmethod
    def of(cls, run: RunConfig, common: Mapping[str, Any], *, resumes: bool) -> _Take:
        if common.get("weights_only") or (run.checkpoint.finetune and not resumes):
            return cls(optimizer=False, position=False)
        return cls(optimizer=resumes or not run.checkpoint.no_load_optim)


def resume(run: RunConfig, training: State) -> Start:
    """Bring `training` to where the newest whole checkpoint left off; every rank calls it.

    With the same layout, training goes on bit-identically. With another, weights, optimizer, data position and
    schedule are the same, the random generators are not. Of a checkpoint of weights alone, and with FINETUNE=1 of any
    from LOAD_CKPT_PATH, weights are taken and training begins. Raises UsageError, on every rank.
    """
    choice = _together(lambda: choose.candidates(run))
    path, notes = _first_whole(run, choice)
    if path is None:
        return Start(notes=("starting from initial weights",))
    if manifest.read(path) is None:
        notes.append(f"{path} has no {manifest.MANIFEST}: checked by the checksums within its files")
    common = megatron_lm.with_position(read_common(path), path)
    saved = _configuration(common, path)
    take = _Take.of(run, common, resumes=choice.resumes)
    notes += check(run, saved, path, take.position, take.optimizer)
    same_layout = all(saved.get("parallel", {}).get(size) == getattr(run.parallel, size) for size in LAYOUT)
    stored = read_metadata(path).state_dict_metadata
    wanted = state.sharded(training, stored, common.get("content_metadata"))
    _gathered(lambda: _lacking(wanted, stored, path, take, run.model.vocab_size))
    loaded = _read(path, lambda: _load(path, common, wanted, take, with_rng=same_layout and take.position))
    _read(path, lambda: _restore(training, loaded, take, *_batches(run, saved)))
    if not take.position:
        notes.append(f"starting at iteration 0 and the first sample with the weights of {path}")
    else:
        notes += ["the optimizer begins anew"] * (not take.optimizer)
        notes.append(f"going on after iteration {training.iteration} from {path}")
    return Start(path, tuple(notes))


def _restore(training: State, loaded: dict[str, Any], take: _Take, batch: int, batch_now: int) -> None:
    """Take over what has been loaded, and begin with what has not."""
    state.restore_weights(training, loaded)
    if take.optimizer:
        state.restore_optimizer(training, loaded)
    else:
        state.forget_optimizer(training)
    if take.position:
        state.restore_position(training, loaded, batch, batch_now)
    else:
        state.begin(training)


def _together(find: Callable[[], Choice]) -> Choice:
    """`find`, with one answer for all ranks; its UsageError too is raised on all."""
    try:
        mine = find(), ""
    except UsageError as error:
        mine = Choice(), str(error)
    answers = _from_all(mine)
    for choice, fault in answers:
        if fault:
            raise UsageError(fault)
        if choice.paths[:1] != mine[0].paths[:1]:
            there, here = (next(iter(paths), "none") for paths in (choice.paths, mine[0].paths))
            raise UsageError(
                f"nodes see different checkpoints: {there} and {here}. "
                "SAVE_CKPT_PATH and LOAD_CKPT_PATH must lie on a file system that all nodes share"
            )
    # Local copies of a remote store may differ in older ones.
    common = tuple(path for path in mine[0].paths if all(path in choice.paths for choice, _ in answers))
    return mine[0]._replace(paths=common)


def _from_all(mine: T) -> list[T]:
    answers = [mine] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


def _first_whole(run: RunConfig, choice: Choice) -> tuple[Path | None, list[str]]:
    """The best checkpoint that is whole, the same on all ranks, and lines on those that are not."""
    wrong: list[str] = []
    save = run.checkpoint.save
    for path in choice.paths:
        found = _damage(run, path)
        if not found:
            skipped = [f"warning: {what}; it is left as it is, and the one before it is taken" for what in wrong]
            return path, [*choice.notes, *skipped]
        again = f" (remove it, and the next start fetches it from {save} again)" if is_remote(save) else ""
        wrong.append(f"{choose.damaged(path, found)}{again}")
    if wrong:
        raise UsageError(choose.none_whole(wrong))
    return None, []


def _damage(run: RunConfig, path: Path) -> list[str]:
    """What is wrong with a checkpoint, to the last byte of it, the same on all ranks: each reads a share of the files.

    Torch checks no checksum as it reads, so a flipped bit would be loaded as a weight. Copies of a remote store's are
    each node's own.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if is_remote(run.checkpoint.save) or is_remote(run.checkpoint.load):
        ranks = run.parallel.gpus_per_node
        rank %= ranks
    found = _gathered(lambda: choose.flaws(path) if rank == 0 else [])
    return found or _gathered(lambda: _unlike(path, (rank, ranks)))


def _unlike(path: Path, share: tuple[int, int]) -> list[str]:
    """Which of a share of its bytes are not as they were written, by its manifest or else its files' own checksums."""
    if manifest.read(path) is not None:
        return manifest.faults(path, full=True, share=share)
    return structural_faults(path, share)


def _gathered(find: Callable[[], list[str]]) -> list[str]:
    """What all ranks have found; a UsageError of one is raised on all."""
    try:
        mine, error = find(), ""
    except UsageError as raised:
        mine, error = [], str(raised)
    answers = _from_all((mine, error))
    for _, fault in answers:
        if fault:
            raise UsageError(fault)
    return [line for lines, _ in answers for line in lines]


def _configuration(common: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the run that saved a checkpoint, as far as it is told."""
    run, args = common.get("run"), common.get("args")
    if isinstance(run, dict):
        return run
    if isinstance(args, Namespace):
        return megatron_lm.configuration(args, path)
    if common.get("weights_only"):
        return {}
    raise UsageError(f"{path} holds no configuration: neither megatron-rocm nor Megatron-LM has saved it")


def _batches(run: RunConfig, saved: Mapping[str, Any]) -> tuple[int, int]:
    now = run.training.global_batch_size
    return saved.get("training", {}).get("global_batch_size", now), now


def _lacking(wanted: Mapping[str, Any], stored: Mapping[str, Any], path: Path, take: _Take, words: int) -> list[str]:
    """Optimizer state that the checkpoint lacks. Raises UsageError for a weight, and where that state is wanted."""
    lacking = [tensor.key for tensor in wanted[SHARDS].values() if tensor.key not in stored]
    weights = [*_keys(state.weights_in(wanted)), *(key for key in lacking if not _is_moment(key))]
    missing = [key for key in weights if key not in stored and f"{key}_w" not in stored]
    if missing:
        raise UsageError(f"{path} holds no {missing[0]}: it is not of this model, or not of a Llama")
    rows = stored[EMBEDDING].size[0] if EMBEDDING in stored else words  # padding comes and goes
    if rows < words:
        raise UsageError(f"{path} has a vocabulary of {rows} words at most, and this run's VOCAB_SIZE is {words}")
    if take.optimizer and lacking:
        raise UsageError(
            f"{path} holds no {lacking[0]}: its optimizer's state is missing, or in a form that only the layout which "
            "wrote it reads (Megatron-LM saves one for all layouts with --dist-ckpt-optim-fully-reshardable). "
            "NO_LOAD_OPTIM=1 goes on without it, FINETUNE=1 takes weights alone and begins at iteration 0, both from "
            "LOAD_CKPT_PATH"
        )
    return lacking


def _is_moment(key: str) -> bool:
    """Whether it is of what the optimizer remembers of a weight."""
    return key.startswith(STATE) and not key.startswith(MASTERS[:2])


def _keys(content: Mapping[str, Any]) -> Iterator[str]:
    return (value.key for value in nested_values(content) if isinstance(value, ShardedTensor | ShardedTensorFactory))


def _load(path: Path, common: dict[str, Any], wanted: dict[str, Any], take: _Take, *, with_rng: bool) -> dict[str, Any]:
    """Read into the tensors of `wanted`, and return what has none of its own."""
    parts = wanted.pop(SHARDS)
    for number, part in list(parts.items()):
        if _is_moment(part.key) and not take.optimizer:
            parts.pop(number).data.zero_()  # as before the first step
    rest = {RNG: wanted[RNG]} if with_rng else {}
    # By themselves: a weight of FSDP's is read twice where it is both weight and master copy here.
    reader.load({SHARDS: parts}, path, common)
    return reader.load({**state.weights_in(wanted), **rest}, path, common)


def _read(path: Path, action: Callable[[], T]) -> T:
    """Do it; whatever goes wrong in reading a checkpoint is a fault of that checkpoint."""
    try:
        return action()
    except UsageError:
        raise
    except (Exception, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = " ".join(str(causes[0]).split())[:300]
        raise UsageError(
            f"the checkpoint {path} can't be read ({type(causes[0]).__name__}: {reason}). "
            "`megatron-rocm checkpoint verify` tells more; remove or rename it to go on from the one before"
        ) from error
