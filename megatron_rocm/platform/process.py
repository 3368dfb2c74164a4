"""What a process of a run needs before anything else: to find the package, end with its parent, write whole lines."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import megatron_rocm

# Names the process that a child must not outlive; set by whoever starts one.
PARENT = "MEGATRON_ROCM_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PF_EXITING = 0x4  # linux/sched.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that dies (prctl(2), PR_SET_PDEATHSIG).

    The signal follows the thread that started this process: it must live as long as its process.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    parent = os.environ.get(PARENT, "")
    if parent and _ended(parent):  # before the call
        os._exit(128 + signal.SIGKILL)


def _ended(pid: str) -> bool:
    """Whether a process is gone, or has begun to go: its name stays until it is waited for (proc(5), stat)."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return bool(int(said.rpartition(")")[2].split()[6]) & _PF_EXITING)


def write_whole_lines() -> None:
    """One write per line: lines of processes that share a pipe don't mix. torchrun's `python -u` would split them."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]


def make_importable(environment: dict[str, str]) -> None:
    """Have `python -m megatron_rocm…` with this environment find this very package, wherever it is started."""
    # A folder `megatron` where the user happens to stand must not be taken for the package (Python 3.11 and later).
    environment.setdefault("PYTHONSAFEPATH", "1")
    home = Path(megatron_rocm.__file__).resolve().parents[1]
    if home.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join([str(home), *filter(None, [environment.get("PYTHONPATH")])])
