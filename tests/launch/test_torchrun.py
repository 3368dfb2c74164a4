"""The agent as a process of its own, with stand-in workers."""

import os
import re
import signal
import time

import pytest
from processes import HERE, gone, start, until

from megatron_rocm.launch.preflight import free_port

WORKER = str(HERE / "worker.py")


def agent(*words: str, node: str = "0", nodes: str = "1", port: int = 0, timeout: int = 60):
    return start([
        "-m", "megatron_rocm.launch.torchrun", "--nnodes", nodes, "--node-rank", node, "--nproc-per-node", "2",
        "--master-addr", "localhost", "--master-port", str(port or free_port()), "--rdzv-conf", f"timeout={timeout}",
        "--", WORKER, *words,
    ])  # fmt: skip


def test_status_of_a_failed_worker_is_passed_on_in_one_line() -> None:
    process = agent("0.2", "--fail", "1=3")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3
    told = [line for line in output.splitlines() if "is up" not in line and "saved" not in line]
    assert len(told) == 1 and re.search(r"rank 1 \(process \d+\) ended with exit status 3", told[0])


def test_a_killed_worker_is_named_before_its_peers() -> None:
    process = agent("5", "--fail", "1=-9")
    until(process, "is up", 2)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 137 and "rank 1" in output and "SIGKILL" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_worker_once_and_the_agent_ends_with_0(number: int) -> None:
    process = agent("60", "--save", "1")
    until(process, "is up", 2)
    process.send_signal(number)
    process.send_signal(number)  # Slurm's and the launcher's: one signal
    time.sleep(0.5)
    assert process.poll() is None
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len(re.findall("saved after 1 signals", output)) == 2
    assert "one more signal kills" not in output


def test_sigusr1_reaches_each_worker_and_the_run_goes_on() -> None:
    process = agent("60")
    until(process, "is up", 2)
    process.send_signal(signal.SIGUSR1)
    until(process, "is to save", 2)
    assert process.poll() is None
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and output.count("saved after 1 signals") == 2, output


@pytest.mark.slow
def test_a_save_longer_than_torchruns_grace_of_30_s_survives() -> None:
    process = agent("60", "--save", "32")
    until(process, "is up", 2)
    process.terminate()
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 0, output
    assert output.count("saved after 1 signals") == 2


def test_the_third_signal_kills() -> None:
    process = agent("60", "--save", "60")
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", until(process, "is up", 2))]
    for _ in range(3):
        process.terminate()
        time.sleep(1.2)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert gone(pids)
    assert process.stdout and "one more signal kills" in process.stdout.read()


def test_workers_die_with_a_killed_agent() -> None:
    process = agent("60")
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", until(process, "is up", 2))]
    process.kill()
    assert gone(pids)


def test_two_nodes_meet() -> None:
    port = free_port()
    nodes = [agent("0.2", node=str(rank), nodes="2", port=port) for rank in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert sorted(re.findall(r"rank (\d) ", "".join(outputs))) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_node_that_stays_alone_says_where_it_waited(node: str) -> None:
    port = free_port()
    process = agent("1", node=node, nodes="2", port=port, timeout=5)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert len(output.splitlines()) == 1, output
    assert f"MASTER_ADDR=localhost MASTER_PORT={port}" in output
    assert ("node rank 1 can't reach" if node == "1" else "not all of NNODES=2") in output


def test_a_signal_while_waiting_for_other_nodes_ends_at_once() -> None:
    process = agent("1", nodes="2", timeout=60)
    time.sleep(4)
    before = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=10) == 143 and time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ({0: (1, 5.0), 1: (2, 6.0)}, 1),  # a usage error, though later
        ({0: (1, 5.0), 1: (-11, 5.1)}, 1),  # rank 1 crashed, rank 0 lost its peer
        ({0: (-9, 35.0), 1: (1, 5.0)}, 1),  # rank 0 hung on and was killed by the agent
        ({0: (-15, 5.1), 1: (1, 5.0)}, 1),
        ({0: (-9, 5.0), 1: (1, 5.2)}, 0),  # the kernel ended rank 0 for its memory
    ],
)
def test_the_cause_is_named_and_not_its_consequences(
    failures: dict[int, tuple[int, float]], cause: int, capfd: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    from megatron_rocm.launch.torchrun import Agent, Stop

    told = {rank: SimpleNamespace(exitcode=code, timestamp=at, pid=7) for rank, (code, at) in failures.items()}
    Agent([], Stop())._failed(told)
    assert f"rank {cause} " in capfd.readouterr().err
