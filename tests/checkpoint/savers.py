"""Workers that save under circumstances: `savers.py HOW RUN.json`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rocm.checkpoint import parts, save
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import startup
from megatron_rocm.train import loop, signals
from megatron_rocm.train.faults import Fault

steps_done = threading.Semaphore(0)
write, train_step = parts.write, loop.train_step


def before_step(action: Callable[[int], None]) -> None:
    """Have `action` called with the number of each step before it."""

    def step(run: Any, state: Any, batches: Any) -> Any:
        action(state.iteration + 1)
        result = train_step(run, state, batches)
        steps_done.release()
        return result

    loop.train_step = step


def asked(step: int) -> None:
    if step == 3:
        os.kill(os.getpid(), signal.SIGUSR1)


def clock(step: int) -> None:
    startup.now = lambda: 25.0 * step  # type: ignore[assignment]


def late(path: Path, *rest: Any) -> parts.Written:
    """Writes the third step's once training has done the fifth, and so has changed all that it has."""
    if path.parent.name.startswith("iter_0000003"):
        for _ in range(5):
            steps_done.acquire()
    return write(path, *rest)


def diverges(step: int) -> None:
    """The fifth step's loss is not finite."""
    if step == 4:
        loop.train_step = lambda *rest: train_step(*rest)._replace(fault=Fault("nan", "stop", "the lm loss is nan"))


def until_it_diverges(path: Path, *rest: Any) -> parts.Written:
    """Writes the third step's while the run is ending."""
    for _ in range(4):
        steps_done.acquire()
    time.sleep(2)
    return write(path, *rest)


def refused(path: Path, *rest: Any) -> parts.Written:
    """Rank 1's disk is full for the iterations in FULL."""
    if os.environ["RANK"] == "1" and path.parent.name.removesuffix(".partial")[-2:] in os.environ["FULL"].split():
        write(path, *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(path, *rest)


def apart(run: RunConfig) -> None:
    """Each process is a node with a folder of its own, whose thread tells what it has written."""
    from megatron_rocm.checkpoint.save import Saver
    from megatron_rocm.train import distributed

    distributed.connect(run)
    distributed.form_groups(run)
    rank, os.environ["LOCAL_RANK"] = os.environ["RANK"], "0"
    root = Path(run.checkpoint.save or "") / rank

    def uploads(folder: Path, files: Any) -> None:
        print(f"rank {rank} uploads {folder.name}: {', '.join(sorted(files))}")
        if rank == "1":
            raise OSError(errno.ECONNRESET, "cut")

    state = loop.build(run)
    saver = Saver(run, root, shared=False, after=[uploads])
    for state.iteration in (1, 2, 3):
        saver.save(state)
    saver.close()
    print("\n".join(f"rank {rank}: {line}" for line in saver.news()))
    distributed.leave()


if __name__ == "__main__":
    how, path = sys.argv[1:]
    if how == "apart":
        sys.exit(apart(RunConfig.load(path)))
    signals.install()
    if how == "clock":
        clock(0)
    if how in ("asked", "clock", "late", "diverges"):
        before_step({"asked": asked, "clock": clock, "diverges": diverges}.get(how, lambda step: None))
    if how in ("late", "refused", "diverges"):
        parts.write = {"late": late, "refused": refused, "diverges": until_it_diverges}[how]
    save.PATIENCE = 0.0
    from megatron_rocm.train.process import main

    sys.exit(main(["--config", path]))
