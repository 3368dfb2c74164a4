"""What a process of a run does before anything else: end with its parent, and write whole lines."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Names the process that a child must not outlive; set by whoever starts one.
PARENT = "MEGATRON_ROCM_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that dies (prctl(2), PR_SET_PDEATHSIG).

    The signal follows the thread that started this process: it must live as long as its process.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    parent = os.environ.get(PARENT, "")
    if parent and not os.path.exists(f"/proc/{parent}"):  # it died before the call
        os._exit(128 + signal.SIGKILL)


def write_whole_lines() -> None:
    """One write per line: lines of processes that share a pipe don't mix. torchrun's `python -u` would split them."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
