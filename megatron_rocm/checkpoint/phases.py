"""Where in its work on checkpoints a process is. With MEGATRON_ROCM_PHASES=FOLDER it shows in FOLDER/<process id>.

What a killed process was at is found there, as what was written into mapped memory outlives it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

# Of a save, in their order; `copy` on the step's thread, the others on the writer's.
SAVE = ("copy", "open", "write", "gather", "manifest", "rename", "name", "prune")
FOLDER = "MEGATRON_ROCM_PHASES"
WIDTH = 32  # bytes, filled up with blanks

listener: Callable[[str], None] | None = None


def mark(phase: str) -> None:
    """This process now is in that phase; "" where it is in none."""
    if listener:
        listener(phase)


def shown_in(folder: str | Path) -> Callable[[str], None]:
    """A listener that keeps the phase in the folder's file of this process."""
    with open(Path(folder) / str(os.getpid()), "w+b") as file:
        file.write(b" " * WIDTH)
        file.flush()
        shown = mmap.mmap(file.fileno(), WIDTH)

    def show(phase: str) -> None:
        shown[:] = phase.encode().ljust(WIDTH)

    return show


if os.environ.get(FOLDER):
    listener = shown_in(os.environ[FOLDER])
