"""The clock of a run's start, and the imports that it leaves out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_rocm.platform import startup


@pytest.fixture(autouse=True)
def forget() -> None:
    startup._marks.clear()


def test_a_process_is_as_old_as_it_is() -> None:
    program = (
        "import time; before = time.time(); time.sleep(1); from megatron_rocm.platform import startup;"
        "print(startup.now() - startup.born() - (time.time() - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) < 60  # what Python takes to start; of a wrong clock hours are to be expected


def test_each_part_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "born", lambda: 13.0)
    monkeypatch.setenv(startup.CLOCK, "10.0 11.5")
    ends = iter([17.0, 17.01, 20.0])
    monkeypatch.setattr(startup, "now", lambda: next(ends))
    startup.begin()
    for part in ("imports", "data", "first step"):
        startup.done(part)
    assert startup.told() == (
        "start-up: 10.0 s to the end of the first step (launcher 1.5, torchrun 1.5, imports 4.0, first step 3.0)"
    )
    assert startup.told() == ""


def test_without_a_launcher_it_begins_with_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(startup.CLOCK, raising=False)
    monkeypatch.setattr(startup, "born", lambda: 13.0)
    monkeypatch.setattr(startup, "now", lambda: 15.0)
    startup.begin()
    startup.done("imports")
    assert startup.told() == "start-up: 2.0 s to the end of the first step (imports 2.0)"


def test_a_process_that_is_no_worker_tells_nothing() -> None:
    startup.done("data")
    assert startup.told() == ""


def test_megatron_core_does_without_what_only_its_timers_want() -> None:
    program = (
        "import sys, torch; from megatron_rocm.platform import cpu, startup\n"
        "with startup.lean_imports(): cpu.install()\n"
        "import megatron.core; print([name for name in ('tensorboard', 'wandb') if name in sys.modules])\n"
        "from torch.utils.tensorboard import SummaryWriter"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
