"""A first collective that never comes about. That of nodes over a network: tests/launch/test_two_hosts.py."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT, environment

HANGS = """
import sys, threading
from support import tiny_run
from megatron_rocm.train import meeting

lock = threading.Lock()
with lock, meeting.deadline(float(sys.argv[1]), tiny_run(), 0):
    lock.acquire(timeout=float(sys.argv[2]))
print("came about")
"""


def test_what_hangs_ends_with_a_message() -> None:
    status, output = hang(0.5, 100)
    assert status == 2 and "\ncame about" not in output, output
    assert output.startswith("error: node 0: the first collective did not come about within 0.5 seconds"), output


def test_what_comes_about_goes_on() -> None:
    assert hang(100, 0.1) == (0, "came about\n")


FAILS = """
import os
from support import tiny_run
from megatron_rocm.errors import UsageError
from megatron_rocm.train import meeting

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="6000", NCCL_IB_HCA="=mlx5_1:1")
for nodes in (2, 1):
    try:
        with meeting.deadline(100, tiny_run(nnodes=nodes, dp=2), 1):
            raise RuntimeError("NCCL error: unhandled system error")
    except (UsageError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


def test_what_fails_between_nodes_says_over_what() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS], text=True, timeout=90, capture_output=True,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
    )  # fmt: skip
    several, one = done.stdout.splitlines()
    assert several.startswith(
        "UsageError node 1: the first collective did not come about, over lo (127.0.0.1) and RDMA ports =mlx5_1:1; "
        "the master is 127.0.0.1, port 6000 (NCCL error: unhandled system error). "
    ), done
    assert one == "RuntimeError NCCL error: unhandled system error"


def hang(deadline: float, seconds: float) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(deadline), str(seconds)], text=True, timeout=90,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
    )  # fmt: skip
    return done.returncode, done.stdout
