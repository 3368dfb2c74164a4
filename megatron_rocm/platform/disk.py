"""Writing what a power cut must not undo and a second process must not write too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_rocm.errors import UsageError


def sync_folder(folder: Path) -> None:
    """Have the names in `folder`, renamed ones too, on disk before going on."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Have the file's content on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def to_ourselves(prefix: str, key: str) -> Iterator[None]:
    """Hold the name `prefix` against a second writer until the block ends or the process dies; makes its folder.

    Raises UsageError, naming `key`, where another holds it or the folder can't be written.
    """
    import fcntl

    path = Path(f"{prefix}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            lock = open(path, "w")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise UsageError(
                    f"{key}={prefix}: another run is writing there. Wait for it, or name another place"
                ) from None
            except OSError:
                break  # a file system without locks
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    break
            lock.close()  # the one who held it has just removed it
    except OSError as error:
        raise UsageError(
            f"{key}={prefix}: {path.parent} can't be written ({error.strerror}). Give a folder that this user may "
            "write to"
        ) from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
