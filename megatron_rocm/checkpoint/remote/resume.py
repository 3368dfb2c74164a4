"""The start of a run with a remote SAVE_CKPT_PATH or LOAD_CKPT_PATH: what it goes on from is brought to its nodes.

Every rank calls these functions. The first rank of each node acts for it; where all nodes see one local folder, rank 0.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_rocm.checkpoint import choose
from megatron_rocm.checkpoint.folder import iteration_of, set_latest
from megatron_rocm.checkpoint.parts import file_name
from megatron_rocm.checkpoint.remote.fetching import FETCHING, fetch, patiently
from megatron_rocm.checkpoint.remote.held import newest, split
from megatron_rocm.checkpoint.remote.send import Plan, Sender
from megatron_rocm.checkpoint.remote.store import Store
from megatron_rocm.checkpoint.remote.uploader import Uploader
from megatron_rocm.checkpoint.save import After, seen_by_all
from megatron_rocm.config.address import is_remote
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import EndsAllRanks, UsageError

ORIGIN = "remote.txt"  # in a local folder: the address whose copies it holds
HEARTBEAT = 2.0  # seconds between looks whether all ranks are done: a fetch may take longer than a collective call may


class _Done(NamedTuple):
    """What a rank's action came to."""

    value: Any = None
    fault: str = ""  # a UsageError's
    bug: str = ""  # any other exception's


@contextmanager
def sending(run: RunConfig, shared: bool) -> Iterator[Sequence[After]]:
    """What a Saver is to call after a checkpoint, which then is sent in the background; ends when all is sent, or after
    UPLOAD_TIMEOUT seconds. Nothing where SAVE_CKPT_PATH is a folder, or another rank of this node does it.
    """
    if not is_remote(run.checkpoint.save):
        yield ()
        return
    uploader = Uploader(_plan(run, shared), run.checkpoint.upload_timeout) if _leads() else None
    end = uploader.close if uploader else None
    first, count = dist.get_rank(), run.parallel.gpus_per_node

    def saved(folder: Path, written: Sequence[str]) -> None:
        assert uploader
        uploader.saved(folder, [*written, *(file_name(rank) for rank in range(first + 1, first + count))])

    try:
        yield (saved,) if uploader else ()
    except EndsAllRanks:  # a rank that ended at once would have torchrun kill those that still send
        _together(end)
        raise
    except Exception:  # other ranks may not come here
        if end:
            end()
        raise
    _together(end)


def bring(run: RunConfig, shared: bool) -> None:
    """Have the checkpoint to go on from, where it is in a remote store, in the run's local folder.

    `shared`: whether all nodes see the same local folder. Raises UsageError on every rank: the store does not answer,
    its checkpoint is damaged, the disk is too small, or the local folder holds another address's copies.
    """
    settings = run.checkpoint
    if is_remote(settings.save):
        _bring_own(run, shared, _acts(shared))
    if not is_remote(settings.load):
        return
    here = any(_together(lambda: bool(settings.folder and choose.newest_first(settings.folder).paths)))
    if not here:
        assert settings.load and settings.source
        address, own = split(settings.load)
        root = Path(settings.source).parent if own is not None else Path(settings.source)

        def act() -> None:
            _claim("LOAD_CKPT_PATH", address, root)
            path = fetch(str(settings.load), None, root)
            set_latest(root, iteration_of(path))

        _together(act if _acts(seen_by_all("LOCAL_CKPT_PATH", root)) else None)


def _bring_own(run: RunConfig, shared: bool, acts: bool) -> None:
    """The newest of a remote SAVE_CKPT_PATH, or of local copies where that is as new and every node has all of it."""
    address, root = str(run.checkpoint.save), Path(str(run.checkpoint.folder))
    _together((lambda: _claim("SAVE_CKPT_PATH", address, root)) if acts else None)
    if run.parallel.nnodes > 1 and not shared:
        # Each node may have its part of a checkpoint that was not all sent; node 0 completes it when all have.
        _together((lambda: _send_newest(run, shared)) if acts else None)
        _together((lambda: _send_newest(run, shared)) if dist.get_rank() == 0 else None)
    here = _newest_here(root) if acts else None
    everywhere = {one for one, acting in _together(lambda: (here, acts)) if acting}
    found = _together((lambda: _newest_there(address)) if dist.get_rank() == 0 else None)[0]
    if found is None or (len(everywhere) == 1 and here_is_newer(everywhere, found)):
        return

    def act() -> None:
        if here != found:
            fetch(address, found, root)
        set_latest(root, found)
        for stale in root.glob(f"iter_*{FETCHING}"):
            shutil.rmtree(stale, ignore_errors=True)

    _together(act if acts else None)


def here_is_newer(everywhere: set[int | None], found: int) -> bool:
    """Whether the one checkpoint that all nodes have is as new as the store's."""
    (one,) = everywhere
    return one is not None and one >= found


def _newest_here(root: Path) -> int | None:
    """The iteration of the local checkpoint to go on from."""
    return next((iteration_of(path) for path in choose.newest_first(root).paths if not choose.flaws(path)), None)


def _newest_there(address: str) -> int | None:
    """That of the store's. Tries to write there first: a run that can't send is told so before it begins."""

    def act() -> int | None:
        store = Store(address)
        store.write(".probe", b"")
        store.remove(".probe")
        found = newest(store)
        return found[0] if found else None

    return patiently(act, print)


def _send_newest(run: RunConfig, shared: bool) -> None:
    """Send what this node has of the newest checkpoint and the store lacks; after a fault the run's sender retries."""
    sender = Sender(_plan(run, shared))
    sender.find()
    sender.pending = {one: None for one in sorted(sender.pending)[-1:]}
    sender.step()


def _plan(run: RunConfig, shared: bool) -> Plan:
    settings = run.checkpoint
    return Plan(
        str(settings.save), str(settings.folder), run.launch.node_rank, run.parallel.nnodes, shared,
        settings.keep_last, settings.keep_every,
    )  # fmt: skip


def _claim(variable: str, address: str, root: Path) -> None:
    """Raise UsageError where the local folder holds the checkpoints of another address, or none's."""
    origin = root / ORIGIN
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = origin.read_text().strip() if origin.exists() else ""
        if not held and not any(root.glob("iter_*")):
            origin.write_text(f"{address}\n")
            return
    except OSError as error:
        raise UsageError(f"LOCAL_CKPT_PATH={root} can't be written: {error.strerror}") from None
    if held != address:
        raise UsageError(
            f"LOCAL_CKPT_PATH={root} holds checkpoints of {held or 'a run that keeps them there alone'}, not copies of "
            f"{variable}={address}: name another folder"
        )


def _acts(shared: bool) -> bool:
    """Whether this rank is the one that does what is to be done once in a local folder."""
    return dist.get_rank() == 0 if shared else _leads()


def _leads() -> bool:
    """Whether this rank is its node's first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _together(action: Callable[[], Any] | None) -> list[Any]:
    """Do it on the ranks that have something to do, however long that takes; what it returned on each.

    Raises the UsageError of one on all.
    """
    done: list[_Done] = []

    def act() -> None:
        try:
            done.append(_Done(action() if action else None))
        except UsageError as error:
            done.append(_Done(fault=str(error)))
        except Exception as error:
            done.append(_Done(bug=f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    told: list[_Done | None] = [None]
    while None in told:
        thread.join(HEARTBEAT)
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, done[0] if done else None)
    everyone = [one for one in told if one is not None]
    for one in everyone:
        if one.fault:
            raise UsageError(one.fault)
        if one.bug:
            raise RuntimeError(one.bug)
    return [one.value for one in everyone]
