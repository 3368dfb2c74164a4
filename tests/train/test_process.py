"""How a process of a run ends when something is wrong."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import environment, free_port, start, tiny_run

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.train.process import must_be_the_machine


def worker(run: RunConfig, file: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[str]:
    """A worker without a launcher."""
    file.parent.mkdir(parents=True, exist_ok=True)
    run.save(file)
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_rocm.train", "--config", str(file)],
        env=environment(
            RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_different_runs(tmp_path: Path) -> None:
    """Two nodes with different variables: both end, one message names them."""
    port = free_port()
    workers = [
        worker(tiny_run(tmp_path / str(rank), dp=2, seed=rank), tmp_path / str(rank) / "run.json", rank, 2, port)
        for rank in (0, 1)
    ]
    texts = [process.communicate(timeout=120)[0] for process in workers]
    assert [process.returncode for process in workers] == [2, 2], texts
    text = "".join(texts)
    assert text.count("the processes have different runs") == 1
    assert "rank 0 on node 0" in text and "rank 1 on node 0" in text
    assert "Traceback" not in text


def test_a_master_that_can_not_be_reached(tmp_path: Path) -> None:
    with socket.socket() as silent:  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        run = tiny_run(tmp_path, dp=2, node_rank=1, rdzv_timeout=5)
        began = time.monotonic()
        process = worker(run, tmp_path / "run.json", 1, 2, port)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert f"could not reach the master at 127.0.0.1, port {port} within 5 seconds" in text
    assert "Traceback" not in text
    assert time.monotonic() - began < 60


def test_a_node_that_does_not_come(tmp_path: Path) -> None:
    process = worker(tiny_run(tmp_path, dp=2, rdzv_timeout=5), tmp_path / "run.json", 0, 2, free_port())
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert "not all of the run's 2 processes have reached the master" in text
    assert "Traceback" not in text


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, init_std=1e38, save=str(tmp_path / "checkpoints"))
    text, _ = (process := start(run)).communicate(timeout=120)
    assert process.returncode == 1, text
    assert re.search("error: iteration 1: the lm loss is nan; first not finite is the weight of .* on rank 0", text)
    assert "Traceback" not in text
    assert json.loads((tmp_path / "status.json").read_text())["outcome"] == "diverged"
    assert not list((tmp_path / "checkpoints").glob("iter_*"))


def test_another_machine_than_the_launcher_found(tmp_path: Path) -> None:
    process = worker(tiny_run(tmp_path, vendor="amd", arch="gfx942"), tmp_path / "run.json", 0, 1, free_port())
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert len(text.splitlines()) == 1 and "the launcher found a GPU (gfx942), but torch" in text
    with pytest.raises(UsageError, match="torch sees a GPU that the launcher did not find"):
        must_be_the_machine(tiny_run(), on_cpu=False)
    must_be_the_machine(tiny_run(), on_cpu=True)


def test_a_configuration_that_was_changed(tmp_path: Path) -> None:
    tiny_run().save(tmp_path / "run.json")
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace('"seed": 1234', '"seed": 1'))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rocm.train", "--config", str(tmp_path / "run.json")],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "changed by hand" in done.stderr
    assert "Traceback" not in done.stderr
