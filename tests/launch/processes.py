"""Helpers for tests that start real processes."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment(**more: str) -> dict[str, str]:
    """A small environment: no variable of the machine's own gets into a request."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return {**keep, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(words: Sequence[str], cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
    """A process with both outputs in one pipe, as the leader of a group of its own."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str, times: int = 1) -> str:
    """Read output up to the line in which `pattern` has been seen `times` times. Fails at the output's end."""
    seen = ""
    assert process.stdout
    for line in process.stdout:
        seen += line
        if len(re.findall(pattern, seen)) >= times:
            return seen
    raise AssertionError(f"no {pattern!r} in:\n{seen}")


def gone(pids: Sequence[int], seconds: float = 10) -> bool:
    """Whether all of `pids` end within `seconds`; a zombie has ended."""
    end = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
