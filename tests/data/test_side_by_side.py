from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_rocm.data.side_by_side import side_by_side

# Two tasks that never end, in a process that Ctrl-C must end all the same.
ENDLESS = """
import time
from megatron_rocm.data.side_by_side import side_by_side
def task():
    print("begun", flush=True)
    time.sleep(600)
side_by_side([task, task], 2)
"""


def test_all_tasks_run():
    done = []
    side_by_side([lambda number=number: done.append(number) for number in range(20)], 3)
    assert sorted(done) == list(range(20))
    side_by_side([], 3)


def test_a_failure_waits_for_nobody_and_nothing_begins_after_it():
    never, begun = threading.Event(), []

    def fail():
        raise ValueError("of the task")

    with pytest.raises(ValueError, match="of the task"):
        side_by_side([never.wait, fail, lambda: begun.append(1)], 2)
    never.set()
    time.sleep(0.1)
    assert not begun


def test_an_interrupt_waits_for_nobody():
    run = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert run.stdout.readline() == "begun\n"
    run.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in run.communicate(timeout=60)[1]
