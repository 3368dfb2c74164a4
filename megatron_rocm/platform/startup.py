"""What a run does until its first step is done: lean imports, and how long each part took.

The clock is Linux's CLOCK_BOOTTIME, which all processes of a machine share and which /proc/pid/stat counts their starts
in. A launcher begun by `exec`, as from the shell scripts, started when its script did.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# From the launcher: when it was started itself, and when it started torchrun.
CLOCK = "MEGATRON_ROCM_CLOCK"
# megatron-core imports these if they are installed (timers.py:13 and :18), for a timer that we don't use.
UNUSED = ("wandb", "torch.utils.tensorboard")

_marks: list[tuple[str, float]] = []  # (what was done, when), in order; none before `begin`


def now() -> float:
    """Seconds since the machine's start."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def born() -> float:
    """When this process was started (proc(5), field 22 of /proc/pid/stat)."""
    with open("/proc/self/stat") as file:
        after_name = file.read().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within this UNUSED are not found, unless they are imported already."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: an ImportError, by Python's rules
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def begin() -> None:
    """This process is a worker that has begun; the parts before it are known from the launcher, if there was one."""
    launcher, torchrun = _launched()
    _marks[:] = [("", launcher), ("launcher", torchrun), ("torchrun", max(born(), torchrun))]


def run_born() -> float:
    """When the run that this process is of was started: its launcher, or this process where there is none."""
    return _launched()[0]


def _launched() -> tuple[float, float]:
    """When the launcher was started, and when it started torchrun."""
    words = os.environ.get(CLOCK, "").split()
    mine = born()
    return (float(words[0]), float(words[1])) if len(words) == 2 else (mine, mine)


def done(part: str) -> None:
    """The part of the start that went on since the last call has ended."""
    if _marks:
        _marks.append((part, now()))


def told() -> str:
    """One line with the time of each part, once; "" where the start was told or `begin` was never called."""
    if not _marks:
        return ""
    parts = [
        f"{name} {end - start:.1f}"
        for (_, start), (name, end) in zip(_marks, _marks[1:], strict=False)
        if end - start >= 0.05
    ]
    whole = _marks[-1][1] - _marks[0][1]
    _marks.clear()
    return f"start-up: {whole:.1f} s to the end of the first step ({', '.join(parts)})"
