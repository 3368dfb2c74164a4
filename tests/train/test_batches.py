"""Loaders outlive signals to the whole run, and end with their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

# Runs as a training process does, with one loader; a batch is printed before and after signals to the loader.
SCRIPT = """
import multiprocessing, os, signal, sys, time
from types import SimpleNamespace
import torch
from support import tiny_run
from megatron_rocm.train import batches

batches.loaders = lambda run: 1
batches.core = lambda chunk: SimpleNamespace(pre_process=True, post_process=True)
batches.mpu = SimpleNamespace(get_data_parallel_rank=lambda: 0, get_data_parallel_world_size=lambda: 1)
class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"tokens": torch.tensor([index])}

found = batches.micro_batches(tiny_run(), Numbers(), 0, None)
print(next(found)["tokens"].item(), flush=True)
loader, = multiprocessing.active_children()
os.system(f"kill -TERM {loader.pid}; kill -INT {loader.pid}; kill -HUP {loader.pid}")  # from another process
time.sleep(0.3)
for step in range(8):
    print(next(found)["tokens"].item(), flush=True)
print("loader", loader.pid, flush=True)
if sys.argv[1] == "fails":
    raise RuntimeError("on purpose")  # its traceback keeps the loaders until the very end
"""


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_signals_to_a_loader(tmp_path: Path, how: str) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    tests = str(Path(__file__).parents[1])
    env = environment()
    done = subprocess.run(
        [sys.executable, str(file), how], env={**env, "PYTHONPATH": env["PYTHONPATH"] + os.pathsep + tests},
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == (how == "fails"), done.stderr
    *numbers, last = done.stdout.splitlines()
    assert numbers == [str(number) for number in range(9)]
    with pytest.raises(ProcessLookupError):
        os.kill(int(last.split()[1]), signal.SIGKILL)
