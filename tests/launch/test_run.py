"""A launch from run folder to exit status, with stand-in workers."""

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from processes import HERE, gone, start, until

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.launch.lock import Lock
from megatron_rocm.launch.preflight import free_port
from megatron_rocm.launch.run import Log

DRIVER = str(HERE / "driver.py")


def launched(folder: Path, *words: str, keys: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    pairs = [
        f"LOG_DIR={folder}",
        "GPUS_PER_NODE=2",
        f"MASTER_PORT={free_port()}",
        f"SAVE_CKPT_PATH={folder}/ckpt",
        *keys,
    ]
    return start([DRIVER, *pairs, "--", *words])


def test_the_run_folder_holds_config_and_log(tmp_path: Path) -> None:
    process = launched(tmp_path, "0.1")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert RunConfig.load(tmp_path / "run.json").parallel.world_size == 2
    assert (tmp_path / "output_perf.log").read_text() == output
    assert f"finished; everything is in {tmp_path}" in output


def test_lines_come_through_whole_and_unchanged(tmp_path: Path) -> None:
    process = launched(tmp_path, "0.1", "--spam", "2000", keys=("TEE_OUTPUT=0",))
    output = process.communicate(timeout=60)[0]
    log = (tmp_path / "output_perf.log").read_text().splitlines()
    for rank in "01":
        wanted = [f"\x1b[3{rank}m{rank}|{line}|{'x' * 300}" for line in range(2000)]
        assert [line for line in log if line.startswith(f"\x1b[3{rank}m")] == wanted
    assert "xxx" not in output and str(tmp_path / "output_perf.log") in output


@pytest.mark.parametrize("whom", ["launcher", "agent", "group"])
def test_a_stop_saves_and_says_how_to_go_on(tmp_path: Path, whom: str) -> None:
    process = launched(tmp_path, "60", "--save", "0.5")
    until(process, "is up", 2)
    if whom == "group":  # Ctrl-C
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid if whom == "launcher" else child(process.pid), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert output.count("saved after 1 signals") == 2
    command = output.splitlines()[-1]
    assert output.splitlines()[-2] == "to go on:"
    assert f"SAVE_CKPT_PATH={tmp_path}/ckpt" in command and command.endswith("examples/llama/train_llama3.sh")


def test_sigusr1_is_handed_on(tmp_path: Path) -> None:
    process = launched(tmp_path, "60")
    until(process, "is up", 2)
    os.kill(process.pid, signal.SIGUSR1)
    until(process, "is to save", 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_failure_names_status_and_log(tmp_path: Path) -> None:
    process = launched(tmp_path, "0.1", "--fail", "0=5")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 5
    assert re.search(rf"rank 0 .* exit status 5; its output is in {tmp_path}/output_perf.log", output)


def test_a_busy_folder_is_refused_and_free_at_once_after_kill_9(tmp_path: Path) -> None:
    port = f"MASTER_PORT={free_port()}"
    first = launched(tmp_path, "60", keys=(port,))
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", until(first, "is up", 2))]
    second = launched(tmp_path, "0.1")
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 2 and f"LOG_DIR={tmp_path}" in output and f"process {first.pid} on host" in output
    third = launched(tmp_path / "other", "0.1", keys=(f"SAVE_CKPT_PATH={tmp_path}/ckpt",))
    assert "SAVE_CKPT_PATH" in third.communicate(timeout=60)[0] and third.returncode == 2
    agent = child(first.pid)
    first.kill()
    again = launched(tmp_path, "0.1", keys=(port,))
    assert gone([agent, *pids])
    assert again.communicate(timeout=60)[0] and again.returncode == 0


def test_a_reader_that_leaves_does_not_stop_training(tmp_path: Path) -> None:
    process = launched(tmp_path, "1", "--spam", "50")
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "output_perf.log").read_text().count("is up") == 2


def test_the_second_node_writes_files_of_its_own(tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        launched(tmp_path, "0.1", keys=("NNODES=2", f"NODE_RANK={rank}", f"MASTER_PORT={port}")) for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert json.loads((tmp_path / "run_node1.json").read_text())["launch"]["node_rank"] == 1
    assert "rank 2 " in (tmp_path / "output_perf_node1.log").read_text()
    assert (tmp_path / ".lock_node1").is_file()


@pytest.mark.parametrize(("rank", "name"), [(0, ".lock"), (1, ".lock_node1")])
def test_each_node_holds_its_run_folder(tmp_path: Path, rank: int, name: str) -> None:
    lock = Lock(tmp_path, "LOG_DIR", name)
    process = launched(tmp_path, "0.1", keys=("NNODES=2", f"NODE_RANK={rank}"))
    output = process.communicate(timeout=60)[0]
    lock.release()
    assert process.returncode == 2 and f"LOG_DIR={tmp_path}: this folder is in use by process {os.getpid()}" in output


@pytest.mark.parametrize(
    ("name", "told"),
    [(".lock", "Is a directory"), ("run.json", "Is a directory"), ("output_perf.log", "Is a directory")],
)
def test_a_file_that_cannot_be_written_is_one_message(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).mkdir()
    process = launched(tmp_path, "0.1")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert len(output.splitlines()) == 1 and f"LOG_DIR={tmp_path}: {tmp_path / name} can't be written: {told}" in output


def test_a_start_that_is_refused_leaves_no_folders(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        process = launched(tmp_path / "run", "0.1", keys=(f"MASTER_PORT={taken.getsockname()[1]}",))
        assert "MASTER_PORT" in process.communicate(timeout=60)[0] and process.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_stop_the_reading(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    log = Log(Path("/dev/full"), show=True)
    log.say("still here")
    assert capfdbinary.readouterr().out == b"still here\n"


def child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
