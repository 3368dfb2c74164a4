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


def hang(deadline: float, seconds: float) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(deadline), str(seconds)], text=True, timeout=90,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
    )  # fmt: skip
    return done.returncode, done.stdout
