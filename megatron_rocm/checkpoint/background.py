"""What work in the background needs: a board on which the ranks' threads tell each other things, a limit of time."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rocm.train import distributed


class Board:
    """What the ranks' threads tell each other, through the run's store.

    A reader asks again and again instead of waiting in the store, which would keep the process's other threads from it.
    """

    FIRST, LONGEST = 0.001, 0.2  # seconds between two questions

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self.store = distributed.store()

    def post(self, key: str, value: Any) -> None:
        self.store.set(f"{self.name}/{key}", zlib.compress(pickle.dumps(value), 1))  # type: ignore[arg-type]

    def read(self, key: str) -> Any:
        """The value, once it is there: `bounded` ends a wait."""
        key, pause = f"{self.name}/{key}", self.FIRST
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, self.LONGEST)
        return pickle.loads(zlib.decompress(self.store.get(key)))

    def forget(self, *keys: str) -> None:
        """Remove messages that all have read."""
        for key in keys:
            self.store.delete_key(f"{self.name}/{key}")


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """End this process, saying on which rank and in which call it hung, where the block takes longer."""
    main = threading.get_ident()

    def end() -> None:
        print(
            f"rank {dist.get_rank()}: {what} has not ended after {seconds:g} seconds, in {_whereabouts(main)}. "
            "The checkpoint before it is untouched. Is the disk full or hanging, or another rank dead? "
            "SAVE_TIMEOUT sets the limit",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _whereabouts(thread: int) -> str:
    """The innermost calls of a thread."""
    frame = sys._current_frames().get(thread)
    calls: list[str] = []
    while frame and len(calls) < 3:
        calls.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(calls)
