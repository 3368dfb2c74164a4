"""Which checkpoints stay: in a remote store, and as local copies of what has been sent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_rocm.checkpoint import folder
from megatron_rocm.checkpoint.folder import TRACKER, WHOLE, checkpoint_path, kept, named
from megatron_rocm.checkpoint.manifest import MANIFEST
from megatron_rocm.checkpoint.remote.held import content, folder_name, iterations, tracked
from megatron_rocm.checkpoint.remote.store import Store, StoreError
from megatron_rocm.errors import UsageError

LOCAL_COPIES = 2  # of checkpoints that have been sent stay at least, so that a restart here needs no store
ROOM_FOR = 2  # checkpoints that the disk should have room for, or else older ones that wait to be sent are given up


def delete(store: Store, iteration: int) -> None:
    """Remove a checkpoint, first the two files without which what a cut leaves is not taken for a whole one.

    In this order: without its manifest alone it would be one that another tool has put there.
    """
    store.remove(f"{folder_name(iteration)}/{WHOLE}")
    store.remove(f"{folder_name(iteration)}/{MANIFEST}")
    store.remove_all(folder_name(iteration))


def retain(store: Store, last: int, every: int, busy: Collection[int]) -> list[int]:
    """Remove from the store what retention does not keep, and what uploads that were cut left behind; which these were.

    Never the newest whole one, nor the one that the tracker names, nor the incomplete ones in `busy`.
    """
    found = iterations(store)
    whole = {iteration for iteration in found if content(store, iteration) is not None}
    if not whole:
        return []
    latest = tracked(store) or max(whole)
    stay = kept(whole, last, every, latest) | {max(whole), latest} | set(busy)
    # An incomplete one that is newer may be another node's, on its way.
    unwanted = [one for one in found if one not in stay and (one in whole or one < max(whole))]
    for iteration in unwanted:
        delete(store, iteration)
    return unwanted


def prune(
    root: Path, found: Collection[int], is_sent: Callable[[int], bool], last: int, every: int
) -> tuple[list[int], list[int]]:
    """Remove local copies of what the store keeps: (those that were sent, those that were not and had to make room).

    The newest `last`, at least LOCAL_COPIES, and the one that the tracker names stay in any case. An older one goes
    once it is sent; those that still wait to be sent go, oldest first, where the disk has no room for ROOM_FOR more
    checkpoints. What retention does not keep is the saving run's to remove (folder.prune), which may be at it now.
    """
    latest = named(root / TRACKER)
    stay = {*sorted(found)[-max(last, LOCAL_COPIES) :], latest}
    old = sorted(kept(found, last, every, latest) - stay)
    sent = [iteration for iteration in old if is_sent(iteration)]
    given_up: list[int] = []
    for iteration in sent:
        folder.remove(checkpoint_path(root, iteration))
    for iteration in (one for one in old if one not in sent):
        size = sum(path.stat().st_size for path in checkpoint_path(root, max(found)).rglob("*") if path.is_file())
        if shutil.disk_usage(root).free > ROOM_FOR * size:
            break
        folder.remove(checkpoint_path(root, iteration))
        given_up.append(iteration)
    return sent, given_up


def remove(address: str, unwanted: Collection[int]) -> None:
    """Remove checkpoints from a store. Raises UsageError for the last whole one and where the store does not answer."""
    try:
        store = Store(address)
        whole = {iteration for iteration in iterations(store) if content(store, iteration) is not None}
        if whole and whole <= set(unwanted):
            raise UsageError(f"{address}: these are all whole checkpoints there; one has to stay")
        if (named := tracked(store)) in unwanted:
            raise UsageError(f"{address}: iteration {named} is the one that runs go on from; it stays")
        for iteration in unwanted:
            delete(store, iteration)
    except StoreError as error:
        raise UsageError(str(error)) from None
