"""A file written and hashed by threads of its own, while the caller reads on."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.manifest import File

BLOCK = 16 << 20  # bytes written at once
WAITING = 2  # pieces that wait: what they hold is in memory


class Stream:
    """A new file, from its beginning to its end. Use as a context; `close` has it on disk.

    What is handed to `write` must not change before `close`. OSError of the threads comes out of `write` or `close`.
    """

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self.size = 0
        self._waiting = 0  # bytes that were written since the disk was last asked to begin
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._hash = hashlib.sha256() if hashed else None
        self._fault: BaseException | None = None
        self._lines = [_Line(self._store, self._failed)]
        if self._hash:
            self._lines.append(_Line(self._hash.update, self._failed))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._fault = self._fault or error  # what waits need not be written then
        self.close()

    def write(self, piece: bytes | Tensor) -> None:
        """Append bytes, or a tensor's."""
        if self._fault:
            raise self._fault
        view = memoryview(piece) if isinstance(piece, bytes) else _bytes(piece)
        self.size += len(view)
        for line in self._lines:
            line.put(view)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._end()
        if self._fault:
            raise self._fault

    @property
    def done(self) -> File:
        """What a manifest says of a closed file."""
        assert self._hash
        return File(self.size, f"sha256:{self._hash.hexdigest()}")

    def _end(self) -> None:
        if self._handle < 0:
            return
        for line in self._lines:
            line.join()
        try:
            if not self._fault:
                os.fsync(self._handle)
        except OSError as error:
            self._fault = error
        finally:
            os.close(self._handle)
            self._handle = -1

    def _failed(self, error: BaseException | None = None) -> bool:
        self._fault = self._fault or error
        return self._fault is not None

    def _store(self, block: memoryview) -> None:
        while block:
            written = os.write(self._handle, block)
            block = block[written:]
            self._waiting += written
        if self._waiting >= BLOCK:
            # The system begins to put it on the disk, which it would leave for `close`; nothing is waited for.
            at = os.lseek(self._handle, 0, os.SEEK_CUR)
            os.posix_fadvise(self._handle, at - self._waiting, self._waiting, os.POSIX_FADV_DONTNEED)
            self._waiting = 0


class _Line:
    """A thread that does one thing with every block, in order."""

    def __init__(self, work: Callable[[memoryview], Any], failed: Callable[..., bool]) -> None:
        self._work, self._failed = work, failed
        self._queue: queue.Queue[memoryview | None] = queue.Queue(WAITING)
        self.put = self._queue.put
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            for begin in range(0, len(piece), BLOCK):
                if self._failed():
                    break
                try:
                    self._work(piece[begin : begin + BLOCK])
                except BaseException as error:
                    self._failed(error)

    def join(self) -> None:
        self._queue.put(None)
        self._thread.join()


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, which keep it alive."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
