"""A folder belongs to one run at a time: an advisory lock (flock(2)) that the kernel drops when its run is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from megatron_rocm.errors import UsageError

NAME = ".lock"
# Processes of a run that was killed a moment ago still have to be taken down by the kernel.
PATIENCE = 3.0

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # file systems mounted without locks


class Lock:
    """The lock of `folder`, which exists. Held until `release` or the death of every process that has `fd`."""

    def __init__(self, folder: Path, variable: str, name: str = NAME) -> None:
        """Take it. Raises UsageError naming folder, host and process where another run has it."""
        self.path = folder / name
        self.note = ""  # set where the file system knows no locks
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._take(folder, variable)
        except OSError as error:
            raise UsageError(
                f"{variable}={folder}: {self.path} can't be written: {error.strerror}; "
                f"remove it if no run uses the folder, or choose another {variable}"
            ) from None

    def _take(self, folder: Path, variable: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self._try():
            if time.monotonic() > end:
                owner = _owner(self.fd)
                os.close(self.fd)
                raise UsageError(
                    f"{variable}={folder}: this folder is in use by {owner}; "
                    f"wait for that run, stop it (SIGTERM makes it save), or choose another {variable}"
                )
            time.sleep(0.1)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{owner}\n".encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.note = f"{self.path.parent}: no locks on this file system; see to it that only one run uses the folder"
        return True

    def release(self) -> None:
        """Let go of it in this process. The file stays: removing it would let two runs lock two files of one name."""
        os.close(self.fd)


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"process {owner['pid']} on host {owner['host']}, started {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
