"""Bringing a checkpoint from a remote store into a folder, and verifying one where it lies."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from megatron_rocm.checkpoint.manifest import MANIFEST, File, digest
from megatron_rocm.checkpoint.remote.held import content, folder_name, iterations, newest, parsed, split
from megatron_rocm.checkpoint.remote.store import DamagedFile, Store, StoreError
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

FETCHING = ".fetching"  # ends the name of a folder that is being filled; a later try goes on with what it holds
FILES = 2  # fetched at a time, each in store.STREAMS ranges
WAITS = (1, 2, 4, 8, 16, 32)  # seconds between tries
SPARE = 1 << 30  # bytes that stay free on the disk

T = TypeVar("T")


def patiently(action: Callable[[], T], say: Callable[[str], None]) -> T:
    """Do it, and again after each of WAITS while the store fails. Raises UsageError when that has not helped, or would
    not."""
    waits = iter(WAITS)
    while True:
        try:
            return action()
        except StoreError as error:
            wait = next(waits, None)
            if wait is None or error.refused:
                raise UsageError(
                    f"{error}. Is the address right, the store up, and do the credentials of this environment "
                    "(AWS_ACCESS_KEY_ID, ~/.aws/credentials, AWS_ENDPOINT_URL, …) allow it?"
                ) from None
            say(f"warning: {error}; trying again in {wait:g} s")
            time.sleep(wait)


def fetch(
    address: str,
    iteration: int | None,
    folder: str | Path,
    only: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Bring a checkpoint into `folder`, where it is called iter_NNNNNNN, and return its path there.

    `iteration` None: the one to go on from, or that of an address which is one checkpoint's own. `only`: these of its
    files and the manifest, where it has them, straight into `folder`. Files that are there already, or in part, with
    the manifest's bytes are not fetched again. Raises UsageError: no such whole checkpoint, damaged, the store does not
    answer, or the disk is too small.
    """
    root, own = split(address)
    wanted = iteration if iteration is not None else own

    def found() -> tuple[int, dict[str, File]]:
        store = Store(root)
        if wanted is None:
            if chosen := newest(store):
                return chosen
        elif files := content(store, wanted):
            return wanted, files
        there = ", ".join(map(str, iterations(store))) or "none"
        what = "a whole checkpoint" if wanted is None else f"iteration {wanted}, whole"
        raise UsageError(f"{root} does not hold {what} (it holds all or parts of: {there})")

    number, files = patiently(found, say)
    if only:
        return _bring(root, number, {name: files[name] for name in only if name in files}, Path(folder), "", say)
    return _bring(root, number, files, Path(folder), folder_name(number), say)


def _bring(
    address: str, iteration: int, files: dict[str, File], folder: Path, final: str, say: Callable[[str], None]
) -> Path:
    """Fetch files of a checkpoint into `folder`/`final`, whole or not at all; straight into `folder` if that is ''."""
    end = folder / final if final else folder
    work = end.with_name(end.name + FETCHING) if final else folder
    store = Store(address)
    try:
        if final and end.is_dir():
            if not work.exists():
                end.rename(work)
            else:
                shutil.rmtree(end)
        work.mkdir(parents=True, exist_ok=True)
        missing = {name: file for name, file in files.items() if not _is_there(work / name, file)}
        _require_room(work, missing, address)
        if missing:
            size = sum(file.size for file in missing.values()) / 1e9
            say(f"fetching {address}/{folder_name(iteration)} ({len(missing)} files, {size:.2f} GB) into {end}")
        began = time.monotonic()

        def one(name: str) -> None:
            patiently(lambda: store.receive(f"{folder_name(iteration)}/{name}", work / name, files[name]), say)

        with ThreadPoolExecutor(FILES) as pool:
            list(pool.map(one, missing))
        text = patiently(lambda: store.read(f"{folder_name(iteration)}/{MANIFEST}"), say)
        if final:
            _remove_others(work, {*files, MANIFEST} if text else set(files))
        if text:
            (work / MANIFEST).write_bytes(text)
        if final:
            for inner in {(work / name).parent for name in files} | {work}:
                sync_folder(inner)
            work.rename(end)
            sync_folder(folder)
    except DamagedFile as error:
        raise UsageError(
            f"{error}. `megatron-rocm checkpoint ls {address}` lists the other checkpoints there"
        ) from None
    except OSError as error:
        raise UsageError(f"{end}: can't be written: {error.strerror}") from None
    if missing:
        say(f"fetched {end} in {time.monotonic() - began:.1f} s")
    return end


def _is_there(path: Path, file: File) -> bool:
    try:
        return path.stat().st_size == file.size and bool(file.digest) and digest(path) == file.digest
    except OSError:
        return False


def _require_room(folder: Path, missing: dict[str, File], address: str) -> None:
    """Raise UsageError where the files to be fetched don't fit the disk."""
    needed = sum(file.size for file in missing.values())
    begun = sum(part.stat().st_size for part in folder.rglob("*.part"))
    free = shutil.disk_usage(folder).free
    if needed and needed - begun + min(SPARE, needed) > free:
        raise UsageError(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, the checkpoint at {address} needs {needed / 1e9:.1f} GB: "
            "free some, or set LOCAL_CKPT_PATH to a folder on a larger disk"
        )


def _remove_others(folder: Path, kept: Collection[str]) -> None:
    """Whatever else lies in a folder: parts of another checkpoint with the same iteration."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not os.listdir(path):
                path.rmdir()
        elif str(path.relative_to(folder)) not in kept:
            path.unlink()


def faults(address: str, iteration: int, full: bool, say: Callable[[str], None] = print) -> list[str]:
    """What is wrong with a checkpoint in a store, a line each; nothing is written to disk.

    Sizes are compared and, where `full`, every byte is read. Raises UsageError where the store does not answer.
    """
    store, name = Store(address), folder_name(iteration)
    there = patiently(lambda: store.sizes(name), say)
    if MANIFEST not in there:
        return [] if patiently(lambda: content(store, iteration), say) else [f"{MANIFEST} is missing: not all was sent"]
    text = patiently(lambda: store.read(f"{name}/{MANIFEST}"), say) or b""
    try:
        files = parsed(text)
    except ValueError as error:
        return [f"{MANIFEST} is damaged: {error}"]
    found = []
    for path, file in files.items():

        def differs(path: str = path, file: File = file) -> bool:
            return _digest(store, f"{name}/{path}", file.size) != file.digest

        if path not in there:
            found.append(f"{path} is missing")
        elif there[path] != file.size:
            found.append(f"{path} has {there[path]} bytes instead of {file.size}")
        elif full and patiently(differs, say):
            found.append(f"{path} is not as it was written: its checksum differs")
    return found


def _digest(store: Store, name: str, size: int) -> str:
    hashing = hashlib.sha256()
    for block in store.ranges(name, size):
        hashing.update(block)
    return f"sha256:{hashing.hexdigest()}"
