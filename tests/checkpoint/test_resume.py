"""A run that is stopped or killed goes on exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import execute, kill, losses, metrics, start, tiny_run, train_all

from megatron_rocm.checkpoint.folder import latest
from megatron_rocm.config.schema import RunConfig

OVERLAPPED = {
    "dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "dtype": "bf16",
}  # fmt: skip
CASES = {
    1: {"adam": {}, "sgd": {"name": "sgd"}, "tensorboard": {"tensorboard": True}},
    2: {
        "tp": {"tp": 2, "sequence_parallel": True},
        "vpp": {"pp": 2, "vpp": 2},
        "fsdp": {"dp": 2, "fsdp": True, "vocab_size": 301, "padded_vocab_size": 513},  # cut into uneven parts
        "fsdp, bf16": {"dp": 2, "fsdp": True, "dtype": "bf16"},
    },
}


def wait_for_steps(run: RunConfig, steps: int, seconds: float = 120) -> None:
    """Until metrics.jsonl has so many."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (Path(run.launch.log_dir) / "metrics.jsonl").exists() and len(losses(run)) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {steps} steps within {seconds} seconds")


@pytest.mark.timeout(400)
def test_killed_and_stopped(tmp_path: Path) -> None:
    """kill -9 in mid-run, SIGTERM to one worker of the next, and the third start prints an undisturbed run's losses."""
    fields = {"train_iters": 40, "save_interval": 5, "eval_iters": 1, "eval_interval": 7, **OVERLAPPED}
    whole = tiny_run(tmp_path / "whole", **fields)
    execute(whole)
    run = tiny_run(tmp_path / "run", **fields, save=str(tmp_path / "checkpoints"))

    killed = start(run)
    wait_for_steps(run, 7)
    kill(killed)
    leftover = tmp_path / "checkpoints" / "iter_0000999.partial"
    leftover.mkdir()

    stopped = start(run)
    wait_for_steps(run, len(losses(run)) + 1)
    workers = [child for child in psutil.Process(stopped.pid).children(recursive=True) if "--config" in child.cmdline()]
    workers[-1].send_signal(signal.SIGTERM)
    text, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, text
    assert "start the same command again" in text
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["outcome"] == "stopped"
    assert Path(status["checkpoint"]) == latest(tmp_path / "checkpoints")
    assert status["iteration"] == len(losses(run)) < 40
    assert not leftover.exists()

    execute(run)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["outcome"] == "finished"
    assert losses(run) == losses(whole)
    assert [row["iteration"] for row in metrics(run)] == [row["iteration"] for row in metrics(whole)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("processes", CASES)
def test_goes_on_exactly(tmp_path: Path, processes: int) -> None:
    whole, first, then = {}, [], {}
    for name, fields in CASES[processes].items():
        save = {"save": str(tmp_path / name / "checkpoints")}
        whole[name] = tiny_run(tmp_path / name / "whole", train_iters=4, **fields)
        first.append(tiny_run(tmp_path / name / "first", train_iters=2, **fields, **save))
        then[name] = tiny_run(tmp_path / name / "then", train_iters=4, **fields, **save)
    train_all(*whole.values(), *first, *then.values())
    for name in whole:
        assert losses(then[name]) == losses(whole[name])[2:], name


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    """Another model and a damaged file: status 2, one message, and the checkpoint stays as it is."""
    save = {"save": str(tmp_path / "checkpoints"), "train_iters": 2}
    execute(tiny_run(tmp_path / "first", **save))
    path = latest(tmp_path / "checkpoints")
    assert path
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "damaged")
    for file in (tmp_path / "damaged" / path.name).glob("*.distcp"):
        os.truncate(file, 1000)
    starts = {
        "of another run: HIDDEN_SIZE 64 → 128": tiny_run(tmp_path / "wider", hidden_size=128, **save),
        "No whole one is left": tiny_run(tmp_path / "again", load=str(tmp_path / "damaged")),
    }
    for expected, run in starts.items():
        text = execute(run, status=2)
        assert expected in text
        assert "Traceback" not in text
    assert latest(tmp_path / "checkpoints") == path


def test_a_save_that_hangs_ends(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, save=str(tmp_path / "checkpoints"), save_timeout=2, train_iters=1)
    text = execute(run, str(Path(__file__).parent / "hanging_save.py"), str(tmp_path / "run.json"), status=1)
    assert "rank 0: saving" in text
    assert "has not ended after 2 seconds, in never_ends (hanging_save.py" in text
    assert latest(tmp_path / "checkpoints") is None
