"""Two hosts with a wrong network interface and a right one: which is taken, and what is said where none works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hosts import Host, two_hosts, why_not
from processes import HERE, ROOT, environment, until

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "can be done")
Hosts = tuple[Host, Host]

PORT = "6000"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


class Started:
    """Processes on hosts, in groups of their own."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def on(self, host: Host, *words: str, **more: str) -> None:
        self.processes.append(
            subprocess.Popen(
                host.command(sys.executable, *words), cwd=ROOT, text=True, start_new_session=True,
                env=environment(**more) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip

    def ends(self) -> list[tuple[int, str]]:
        """(exit status, what it printed) of each, once all have ended."""
        outputs = [process.communicate(timeout=150)[0] for process in self.processes]
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]


@pytest.fixture
def started() -> Iterator[Started]:
    one = Started()
    yield one
    for process in one.processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(rank: int, *words: str) -> list[str]:
    pairs = ["MODEL_SIZE=tiny", "TARGET=cpu", "GPUS_PER_NODE=1", "NNODES=2", f"NODE_RANK={rank}", f"MASTER_PORT={PORT}"]
    return ["-m", "megatron_rocm.cli", "train", "--family", "llama3", *pairs, *words]


def test_they_train_over_the_right_interface_without_being_told(hosts: Hosts, started: Started, tmp_path: Path) -> None:
    """Without the choice gloo takes the interface that has the host's own name, which is the wrong one."""
    before = [host.received("eth1") for host in hosts]
    for rank, host in enumerate(hosts):
        started.on(host, *train(rank, "MASTER_ADDR=master", "TOTAL_ITERS=2", f"LOG_DIR={tmp_path / host.name}"))
    for (status, output), host, came in zip(started.ends(), hosts, before, strict=True):
        assert status == 0, output
        assert "network: GLOO_SOCKET_IFNAME=eth1: eth1 (10.77.0." in output, output
        assert host.received("eth1") - came > 100_000  # gradients
        assert host.received("eth0") < 10_000
    assert (tmp_path / "alpha" / "metrics.jsonl").read_text().count("lm_loss") >= 2


TAKES = "the route to MASTER_ADDR={} takes it"
PLANS = [  # host, what is typed beside DRY_RUN=1, what is told of GLOO_SOCKET_IFNAME
    (1, ["MASTER_ADDR=master"], ["eth1 eth1 (10.77.0.2,", f": {TAKES.format('master')}"]),
    (0, ["MASTER_ADDR=10.77.0.1"], ["eth1 eth1 (10.77.0.1,", "): it has the address of MASTER_ADDR=10.77.0.1"]),
    (1, ["MASTER_ADDR=fd77::1"], ["eth1 eth1 (10.77.0.2,", f"): {TAKES.format('fd77::1')}"]),
    (0, ["MASTER_ADDR=here"], ["eth0 eth0 (192.168.51.1,", "): MASTER_ADDR=here is the loopback here"]),
    (0, ["MASTER_ADDR=8.8.8.8"], ["eth0 eth0 (192.168.51.1,", f"): {TAKES.format('8.8.8.8')}, though"]),
    (1, ["MASTER_ADDR=master", "NETWORK_INTERFACE=eth0"], ["eth0 eth0 (192.168.52.1,", "): NETWORK_INTERFACE"]),
    (1, ["MASTER_ADDR=master", "GLOO_SOCKET_IFNAME=eth0"], ["eth0 set by you"]),
    (
        1,
        ["MASTER_ADDR=10.99.0.1"],
        ["each node chooses when the run starts there: MASTER_ADDR=10.99.0.1: this machine"],
    ),
]
REFUSED = [  # what is typed on the second host, what is told
    (
        ["MASTER_ADDR=10.99.0.1"],
        ["this machine has no route there (10.99.0.1: network is unreachable)", "eth1 (10.77.0.2"],
    ),
    (["MASTER_ADDR=nobody", "RDZV_TIMEOUT=5"], ["nobody: no address for this name here", "eth1 (10.77.0.2"]),
    (["MASTER_ADDR=172.17.0.9"], ["it is reached over docker0 (172.17.0.1, container bridge"]),
    (["MASTER_ADDR=master", "NETWORK_INTERFACE=eth7"], ["NETWORK_INTERFACE=eth7: this machine", "eth1 (10.77.0.2"]),
    (
        ["MASTER_ADDR=master", "NETWORK_INTERFACE=far0"],
        ["NETWORK_INTERFACE=far0: far0 has no IP address", "eth1 (10.77.0.2"],
    ),
    (["MASTER_ADDR=master", "GLOO_SOCKET_IFNAME=eth"], ["GLOO_SOCKET_IFNAME=eth: this machine", "eth1 (10.77.0.2"]),
]
COMMANDS = """
import contextlib, io, json, sys
from megatron_rocm import cli
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main(words)
    print(json.dumps([status, " ".join(out.getvalue().split())]))
"""


def commands(started: Started, host: Host, words: list[list[str]]) -> list[tuple[int, str]]:
    """(exit status, what is told, on one line) of several commands, one after the other in one process on the host."""
    started.on(host, "-c", COMMANDS, json.dumps([one[2:] for one in words]))
    status, output = started.ends()[-1]
    assert status == 0, output
    return [tuple(json.loads(line)) for line in output.splitlines()]


@pytest.mark.parametrize("at", [0, 1])
def test_a_plan_tells_which_and_why(hosts: Hosts, started: Started, at: int) -> None:
    plans = [(words, told) for host, words, told in PLANS if host == at]
    answers = commands(started, hosts[at], [train(at, *words, "DRY_RUN=1") for words, _ in plans])
    for (words, told), (status, output) in zip(plans, answers, strict=True):
        assert status == 0, (words, output)
        row = output.partition(" GLOO_SOCKET_IFNAME ")[2]
        assert row.startswith(told[0]) and told[-1] in row, (words, row)


def test_what_can_not_be_reached_is_refused_before_anything_starts(
    hosts: Hosts, started: Started, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    answers = commands(started, hosts[1], [train(1, *words, f"LOG_DIR={folder}") for words, _ in REFUSED])
    for (words, told), (status, output) in zip(REFUSED, answers, strict=True):
        assert status == 2 and all(part in output for part in told), (words, output)
    assert not folder.exists()


def test_a_blocked_master_port_is_told_on_both_sides(hosts: Hosts, started: Started, tmp_path: Path) -> None:
    with hosts[0].firewall(f"-i eth1 -p tcp --dport {PORT} -j DROP"):
        for rank, host in enumerate(hosts):
            words = [
                f"LOG_DIR={tmp_path / host.name}",
                "GPUS_PER_NODE=1",
                "NNODES=2",
                f"NODE_RANK={rank}",
                "RDZV_TIMEOUT=8",
            ]
            started.on(host, str(HERE / "driver.py"), *words, "MASTER_ADDR=master", f"MASTER_PORT={PORT}", "--", "1")
        (master, said_there), (other, said_here) = started.ends()
    assert (master, other) == (2, 2), said_there + said_here
    assert "not all of NNODES=2 nodes arrived within RDZV_TIMEOUT seconds" in said_there
    assert f"node 0 waited at 10.77.0.1 port {PORT}, which is eth1 (10.77.0.1)" in said_there
    assert (
        f"tried 10.77.0.1 port {PORT} over eth1 (10.77.0.2): no answer within 5 seconds: a firewall drops it"
        in said_here
    )


def test_a_master_address_that_is_another_machines_is_told(hosts: Hosts, started: Started, tmp_path: Path) -> None:
    words = [
        f"LOG_DIR={tmp_path}",
        "GPUS_PER_NODE=1",
        "NNODES=2",
        "NODE_RANK=0",
        "RDZV_TIMEOUT=5",
        f"MASTER_PORT={PORT}",
    ]
    started.on(hosts[0], str(HERE / "driver.py"), *words, "MASTER_ADDR=10.77.0.2", "--", "1")
    [(status, output)] = started.ends()
    assert status == 2, output
    assert "10.77.0.2 is none of node 0's addresses; its route there is eth1 (10.77.0.1)" in output, output


def test_a_name_may_get_its_address_late(hosts: Hosts, started: Started) -> None:
    started.on(hosts[1], *train(1, "MASTER_ADDR=late", "LOG_DIR=/proc/nowhere"))
    until(started.processes[0], "MASTER_ADDR=late has no address yet; asking for 600 seconds")
    hosts[1].knows(localhost="127.0.0.1", master="10.77.0.1", late="10.77.0.1")
    [(status, output)] = started.ends()
    assert status == 2 and "LOG_DIR=/proc/nowhere: can't write there" in output, output  # what comes after the network


MEET = [str(HERE / "meeting_worker.py"), "master", PORT]


def test_blocked_ports_between_the_nodes_are_told_on_both_sides(hosts: Hosts, started: Started) -> None:
    """The rendezvous comes about; the ports of NCCL and gloo do not."""
    with hosts[0].firewall(f"-i eth1 -p tcp --dport {PORT} -j ACCEPT", "-i eth1 -p tcp --syn -j DROP"):
        for rank, host in enumerate(hosts):
            started.on(host, *MEET, str(rank), "GLOO_SOCKET_IFNAME=eth1")
        ends = started.ends()
    for status, output in ends:
        assert status == 0, output
        assert "node 1, eth1 (10.77.0.2), to node 0, eth1 (10.77.0.1) port " in output, output
        assert "no answer within 5 seconds: a firewall drops it" in output
        assert "\n  node 0," not in output


def test_an_interface_that_leads_elsewhere_is_told_and_the_right_one_works(hosts: Hosts, started: Started) -> None:
    for rank, host in enumerate(hosts):
        started.on(host, *MEET, str(rank), "NCCL_SOCKET_IFNAME==eth0", "NCCL_SOCKET_IFNAME=eth1")
    for status, output in started.ends():
        assert status == 0, output
        wrong, right = output.split("NCCL_SOCKET_IFNAME=eth1: ")
        assert "node 1, eth0 (192.168.52.1), to node 0, eth0 (192.168.51.1) port " in wrong, output
        assert "no route to that network" in wrong and right == "met\n"


def test_each_node_is_told_and_a_node_that_goes_away_is_named(hosts: Hosts, started: Started) -> None:
    """What one node can't do is in the log of every node; gloo alone does not read NCCL's variable."""
    for rank, host in enumerate(hosts):
        started.on(host, *MEET, str(rank), "GLOO_SOCKET_IFNAME=eth0", "stays=away", NCCL_SOCKET_IFNAME="far0")
    (_, first), (_, second) = started.ends()
    assert "GLOO_SOCKET_IFNAME=eth0: node 0: the nodes can't reach each other:" in first, first
    assert "GLOO_SOCKET_IFNAME=eth0: node 1: the nodes can't reach each other:" in second, second
    assert "stays=away: node 0: node 1 went away before the nodes had tried to reach each other" in first, first


def test_a_host_with_nccls_variable_trains_without_a_gpu(hosts: Hosts, started: Started) -> None:
    for rank, host in enumerate(hosts):
        started.on(host, *MEET, str(rank), "GLOO_SOCKET_IFNAME=eth1", NCCL_SOCKET_IFNAME="eth0")
    assert [output for _, output in started.ends()] == ["GLOO_SOCKET_IFNAME=eth1: met\n"] * 2
