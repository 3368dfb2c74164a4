"""How fast the disk under the run's folders is, and how much room it has."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_rocm.config.address import is_remote
from megatron_rocm.doctor.finding import Finding, fine, problem, warning
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.platform.machine import GIB

CHUNK = 2**22
CHUNKS = 16  # a health check repeats this: 64 MiB at most,
SECONDS = 1.0  # or what is written in so long
SLOW = 50 * 2**20  # bytes per second: a plain hard disk does three times that
LEAST_ROOM = 10 * GIB


def checks(patient: Patient) -> Iterator[Finding]:
    """Write and read a file where each folder of the run is, or will be made."""
    asked = {name: patient.request.text(name) for name in ("LOG_DIR", "SAVE_CKPT_PATH", "DATA_CACHE_PATH")}
    folders = {"LOG_DIR": Path(asked["LOG_DIR"] or "experiment")}
    folders |= {name: Path(said) for name, said in asked.items() if said and not is_remote(said)}
    seen = set()
    for name, folder in folders.items():
        try:
            parent = existing(folder)
            if parent not in seen:
                seen.add(parent)
                yield _of(name, parent)
        except OSError as error:
            yield problem(
                f"disk {name}", f"{error.filename or folder}: can't write there: {error.strerror}",
                "a run keeps its log and checkpoints there", f"{name}=<a folder you can write to>",
            )  # fmt: skip


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there. Raises OSError where this user may not look."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _of(name: str, parent: Path) -> Finding:
    check = f"disk {name}"
    try:
        written, read = speed(parent)
    except OSError as error:
        error.filename = str(parent)  # rather than the name of a file that nobody has asked for
        raise
    room = shutil.disk_usage(parent).free
    found = (
        f"{parent}: {written / 1e9:.2f} GB/s written and synced, {read / 1e9:.2f} GB/s read, {room / GIB:.0f} GiB free"
    )
    if room < LEAST_ROOM:
        return warning(
            check, found, "one checkpoint of an 8B model takes about 100 GiB", f"{name}=<a folder with more room>"
        )
    if written < SLOW:
        return warning(check, found, "saving a checkpoint takes long here", f"{name}=<a folder on a faster disk>")
    return fine(check, found)


def speed(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing and syncing a new file, and of reading it back from the disk. Raises OSError.

    The file has no name while it is written, so that nothing is left behind where this process is killed.
    """
    block = os.urandom(CHUNK)  # file systems that compress or leave out zeros would shine
    handle, name = tempfile.mkstemp(prefix=".megatron-rocm-", dir=folder)
    try:
        os.unlink(name)
        start = time.perf_counter()
        size = 0
        while size < CHUNK * CHUNKS and (not size or time.perf_counter() - start < SECONDS):
            size += os.write(handle, block)
        os.fsync(handle)
        written = size / (time.perf_counter() - start)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # or the reading would be from memory
        os.lseek(handle, 0, os.SEEK_SET)
        start = time.perf_counter()
        got = 0
        while chunk := os.read(handle, CHUNK):
            got += len(chunk)
        return written, got / (time.perf_counter() - start)
    finally:
        os.close(handle)
