"""A process with torch and megatron-core imported, which forks the processes of runs: importing costs each 10 s of CPU.

A child is as one that torchrun has started, but for what is imported and the folders that were put before the path.
An order is a line of JSON on stdin, answered on stdout by the exit status of the first that failed, or 0:

    program   arguments as for `python`: a file's path, or -m and a module, and what it is told
    ranks     processes, which are one node's
    env, cwd  of each
    said      file that gets what they print
    timeout   seconds, after which they are killed and the answer is -9
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rocm.platform import cpu
from megatron_rocm.platform.process import die_with_parent

POLL, GRACE = 0.01, 10.0  # seconds


def imports() -> None:
    cpu.install()
    import megatron_rocm.parity.measure
    import megatron_rocm.train.loop  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads, of which a child would have one"
    gc.collect()
    gc.freeze()  # or each child goes through all these objects at its end, and copies them: 1.3 s of CPU


def serve() -> tuple[dict[str, Any], int]:
    """Carry out orders until they end, which ends the process. Returns in the children: their order and rank."""
    for line in sys.stdin:
        order = json.loads(line)
        children = set()
        for rank in range(order["ranks"]):
            child = os.fork()
            if not child:
                os.setsid()
                die_with_parent()
                return order, rank
            children.add(child)
        print(status(children, order["timeout"]), flush=True)
    sys.exit()


def status(children: set[int], timeout: float) -> int:
    """Wait for all, and GRACE seconds for the rest once one has failed: they have something to say, or hang."""
    end, failed = time.monotonic() + timeout, 0
    while children:
        child, code = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            if not failed and (failed := os.waitstatus_to_exitcode(code)):
                end = min(end, time.monotonic() + GRACE)
        elif time.monotonic() < end:
            time.sleep(POLL)
        else:
            failed = failed or -signal.SIGKILL
            for late in children:
                for kill in (os.killpg, os.kill):  # before its setsid it has no group
                    with contextlib.suppress(ProcessLookupError):
                        kill(late, signal.SIGKILL)
            end += GRACE
    return failed


def become(order: dict[str, Any], rank: int) -> None:
    """This child runs the program as that rank."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    out = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(source, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    program = order["program"]
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    imports()
    become(*serve())
