"""What doctor says of networks: RoCE, InfiniBand and Ethernet alone, for one node and for several."""

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from machines import KINDS, patient, tree, write
from network_trees import TREES

from megatron_rocm.doctor import nics
from megatron_rocm.doctor.finding import Finding
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.platform.network import interfaces
from megatron_rocm.platform.route import Way

MANY = ("NNODES=2", "NODE_RANK=1", "MASTER_ADDR=10.0.0.1")
# Network → an interface that is up, what is said of the RDMA ports, the user-space libraries of its cards.
NETWORKS = {
    "mellanox": ("xgbe0", "9 active, RoCE: mlx5_0:1 mlx5_1:1", ("mlx5",)),
    "broadcom": ("eno1", "8 of 9 are active; not: bnxt_re8:1 (DOWN)", ("bnxt_re",)),
    "pensando": ("enp193s0f0np0", "9 active, RoCE: rocep9s0:1", ("bnxt_re", "ionic")),
    "infiniband": ("enp27s0f0np0", "10 of 12 are active; not: mlx5_2:1 (DOWN) mlx5_8:1 (DOWN)", ("mlx5",)),
    "ethernet": ("bond0", "none", ()),
}  # fmt: skip


def looked_at(here: Patient) -> dict[str, Finding]:
    """The findings by name."""
    return {finding.check: finding for finding in nics.checks(here)}


def of_network(root: Path, name: str, network: str, *words: str) -> Patient:
    """A machine on that network, whose way to node 0 is the interface of NETWORKS."""
    environment = tree(root, KINDS[name])
    TREES[network](root)
    up, _, libraries = NETWORKS[network]
    write(root, {f"etc/libibverbs.d/{library}.driver": f"driver {library}" for library in libraries})
    size = () if name == "none" else ("MODEL_SIZE=8",)
    here = patient(root, KINDS[name], *size, *words, environment=environment)
    assert not here.refused
    return replace(here, route=lambda master: Way(master, "10.0.0.2", up))


@pytest.mark.parametrize("network", TREES)
@pytest.mark.parametrize("words", [(), MANY], ids=["one", "two"])
@pytest.mark.parametrize("name", KINDS)
def test_networks(tmp_path: Path, name: str, words: tuple[str, ...], network: str) -> None:
    found = looked_at(of_network(tmp_path, name, network, *words))
    up, ports, _ = NETWORKS[network]
    assert f"{up} (" in found["interfaces"].found and "lo (" not in found["interfaces"].found
    assert found["RDMA ports"].found.startswith(ports)
    slow = network == "ethernet" and bool(words) and name != "none"
    assert found["RDMA ports"].status == ("warning" if slow or " not: " in ports else "ok")
    assert all(one.status == "ok" for one in found.values() if one.check != "RDMA ports"), found
    chosen = {check: one.found for check, one in found.items() if check.startswith(("NCCL_", "GLOO_"))}
    assert bool(chosen) == bool(words)
    if words:
        assert chosen["GLOO_SOCKET_IFNAME"].startswith(f"{up}: ")
        assert ("NCCL_IB_HCA" in chosen) == (name != "none" and network != "ethernet")
        assert ("NCCL_IB_DISABLE" in chosen) == (name != "none" and network == "ethernet")


@pytest.mark.parametrize("network", ["mellanox", "broadcom", "pensando"])
def test_a_container_without_the_cards_library(tmp_path: Path, network: str) -> None:
    here = of_network(tmp_path, "mi300x", network)
    library = NETWORKS[network][2][-1]
    (tmp_path / f"etc/libibverbs.d/{library}.driver").unlink()
    told = looked_at(here)["RDMA library"]
    assert told.status == "warning" and f"{library}.driver" in told.found and told.mend


def test_an_interface_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    here = of_network(tmp_path, "none", "ethernet", *MANY)
    said: Mapping[str, str] = {**here.environment, "GLOO_SOCKET_IFNAME": "ens51np0"}
    told = looked_at(replace(here, environment=said))["network"]
    assert told.status == "problem" and "ens51np0" in told.found


def test_no_interface_at_all(tmp_path: Path) -> None:
    assert looked_at(patient(tmp_path / "one", KINDS["none"]))["interfaces"].status == "ok"
    root = tmp_path / "two"
    environment = tree(root, KINDS["none"])
    write(root, {".dockerenv": ""})
    told = next(iter(nics.checks(patient(root, KINDS["none"], *MANY, environment=environment))))
    assert told.status == "problem" and "--network host" in told.mend


def test_this_machine_has_what_the_kernel_lists() -> None:
    assert {one.name for one in interfaces()} == {name for _, name in socket.if_nameindex()}


def test_a_master_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        told = looked_at(patient(tmp_path, KINDS["none"], f"MASTER_PORT={port}"))["MASTER_PORT"]
    assert told.status == "warning" and str(port) in told.found
