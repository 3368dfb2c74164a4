"""What checkpoints a remote store holds, which of them are whole, and what their manifests say.

ADDRESS/
  latest_checkpointed_iteration.txt    written last
  iter_0000100/
    .sending/node-0.json               while it is being sent: what each node has sent so far
    manifest.json                      written when all other files are there
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from megatron_rocm.checkpoint.folder import TRACKER, WHOLE
from megatron_rocm.checkpoint.manifest import MANIFEST, File
from megatron_rocm.checkpoint.remote.store import Store, StoreError
from megatron_rocm.errors import UsageError

SENDING = ".sending"
_ITERATION = re.compile(r"iter_(\d{7,18})")


@dataclass(frozen=True)
class Held:
    """A checkpoint that a store holds: its size in bytes, whether it is whole, whether the tracker names it."""

    iteration: int
    size: int
    whole: bool
    latest: bool


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def split(address: str) -> tuple[str, int | None]:
    """An address of checkpoints, and the iteration where it is that of one checkpoint's own folder."""
    parent, _, last = address.rstrip("/").rpartition("/")
    match = _ITERATION.fullmatch(last)
    return (parent, int(match[1])) if match else (address, None)


def iterations(store: Store) -> list[int]:
    """Of every checkpoint that the store holds at least a part of, ascending."""
    return sorted(int(match[1]) for name in store.children() if (match := _ITERATION.fullmatch(name)))


def manifest(store: Store, iteration: int) -> dict[str, File] | None:
    """What the manifest of a checkpoint says; None where it has none or a damaged one."""
    text = store.read(f"{folder_name(iteration)}/{MANIFEST}")
    try:
        return parsed(text) if text else None
    except ValueError:
        return None


def parsed(text: bytes) -> dict[str, File]:
    """The files that a manifest names. Raises ValueError where it is damaged or names one outside its folder."""
    try:
        files = {str(name): File(int(of["size"]), str(of["digest"])) for name, of in json.loads(text)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None
    if any(not name or name.startswith("/") or ".." in name.split("/") or "\\" in name for name in files):
        raise ValueError("it names a file outside its folder")
    return files


def content(store: Store, iteration: int) -> dict[str, File] | None:
    """The files of a whole checkpoint; None where it is not whole.

    Those of the manifest, if each is there with its size. Where another tool has put a checkpoint into the store, which
    has no manifest, whatever is there, with empty digests: unless a trace of being sent says that it was cut.
    """
    there = store.sizes(folder_name(iteration))
    if MANIFEST in there:
        files = manifest(store, iteration)
        sound = files is not None and all(there.get(name) == file.size for name, file in files.items())
        return files if sound else None
    if WHOLE not in there or any(name.startswith(f"{SENDING}/") for name in there):
        return None
    return {name: File(size, "") for name, size in there.items()}


def tracked(store: Store) -> int | None:
    """The iteration that the store's tracker names; None where there is none, or it names no iteration."""
    text = (store.read(TRACKER) or b"").decode(errors="replace").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def newest(store: Store) -> tuple[int, dict[str, File]] | None:
    """The checkpoint to go on from, and its files: the one that the tracker names or, where that is not whole, the
    newest whole one before it, or else of all."""
    named = tracked(store)
    for iteration in sorted(iterations(store), key=lambda one: (named is not None and one <= named, one), reverse=True):
        if (files := content(store, iteration)) is not None:
            return iteration, files
    return None


def listing(address: str) -> list[Held]:
    """Every checkpoint at an address, ascending, parts of them too. Raises UsageError where the store can't be read."""
    try:
        store = Store(address)
        named, found = tracked(store), []
        for iteration in iterations(store):
            sizes = store.sizes(folder_name(iteration))
            whole = content(store, iteration) is not None
            found.append(Held(iteration, sum(sizes.values()), whole, iteration == named))
    except StoreError as error:
        raise UsageError(f"{error}") from None
    return found
