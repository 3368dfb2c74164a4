"""That a process ends with the one that started it."""

from __future__ import annotations

import os
import subprocess
import sys

from support import environment

from megatron_rocm.platform.process import PARENT

CODE = "from megatron_rocm.platform.process import die_with_parent; die_with_parent()"


def test_a_parent_that_has_ended_and_was_not_waited_for() -> None:
    """Its process id is still in /proc then; it died before the call, so that no signal comes."""
    parent = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert os.path.exists(f"/proc/{parent.pid}")
        child = subprocess.run([sys.executable, "-c", CODE], env=environment(**{PARENT: str(parent.pid)}), check=False)
    finally:
        parent.wait()
    assert child.returncode == 137


def test_a_parent_that_lives() -> None:
    child = subprocess.run([sys.executable, "-c", CODE], env=environment(**{PARENT: str(os.getpid())}), check=False)
    assert child.returncode == 0
