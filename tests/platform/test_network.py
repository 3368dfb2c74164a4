"""What is chosen on trees of RoCE, InfiniBand and Ethernet machines, and what users name themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import network_trees as trees
import pytest
from support import tiny_run

from megatron_rocm.config import read
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.machine import Machine, find
from megatron_rocm.platform.network import (
    AINIC,
    LATER,
    VARIABLES,
    Interface,
    choose,
    hcas,
    interfaces,
    socket_interface,
)
from megatron_rocm.platform.route import NoWay, Way
from megatron_rocm.platform.settings import LIBRARY_PREFIXES, YOURS
from megatron_rocm.resolve import resolve

MACHINES = ("mi250x", "mi300x", "mi355x", "a100", "h100", "b200", "cpu")
# Tree → the interface that the route to the master takes there, and what is chosen for RDMA.
CHOSEN: dict[str, tuple[str, dict[str, str]]] = {
    "mellanox": ("xgbe0", {
        "NCCL_IB_HCA": "=" + ",".join(f"mlx5_{n}:1" for n in range(1, 9)), "NCCL_IB_GID_INDEX": "3"}),
    "broadcom": ("eno1", {
        "NCCL_IB_HCA": "=" + ",".join(f"bnxt_re{n}:1" for n in range(8)), "NCCL_IB_GID_INDEX": "3"}),
    "pensando": ("enp193s0f0np0", {
        "NCCL_IB_HCA": "=" + ",".join(f"rocep{bus}s0:1" for bus in sorted(trees.PENSANDO)), "NCCL_IB_GID_INDEX": "1"}),
    "infiniband": ("enp27s0f0np0", {
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_3:1,mlx5_4:1,mlx5_5:1,mlx5_6:1,mlx5_9:1,mlx5_10:1,mlx5_11:1"}),
    "ethernet": ("bond0", {"NCCL_IB_DISABLE": "1"}),
}  # fmt: skip


def here(name: str) -> Machine:
    """A machine of this kind, as one that this process runs on."""
    return replace(find(name), is_here=True)


def two_nodes(**fields: Any) -> RunConfig:
    return tiny_run(**{"nnodes": 2, "dp": 2, "node_rank": 1, "master_addr": "10.0.0.1", **fields})


def over(interface: str, address: str = "10.0.0.1", source: str = "10.0.0.2") -> Callable[[str], Way]:
    """A route to the master through this interface."""
    return lambda master: Way(address, source, interface)


def values(chosen: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, (value, _) in chosen.items()}


@pytest.mark.parametrize("tree", trees.TREES)
@pytest.mark.parametrize("machine", MACHINES)
def test_several_nodes(tmp_path: Path, machine: str, tree: str) -> None:
    interface, rdma = CHOSEN[tree]
    chosen = choose(two_nodes(), here(machine), {}, trees.TREES[tree](tmp_path), over(interface))
    expected = {"GLOO_SOCKET_IFNAME": interface}
    if machine != "cpu":
        expected |= {"NCCL_SOCKET_IFNAME": f"={interface}", **rdma}
    if tree == "pensando" and machine.startswith("mi"):
        expected |= {extra.name: extra.value for extra in AINIC}
    assert values(chosen) == expected
    assert all(why for _, why in chosen.values())


@pytest.mark.parametrize("tree", trees.TREES)
@pytest.mark.parametrize("machine", MACHINES)
def test_one_node_needs_nothing(tmp_path: Path, machine: str, tree: str) -> None:
    def no_route(master: str) -> Way:
        raise AssertionError("asked for a route")

    assert choose(tiny_run(), here(machine), {}, trees.TREES[tree](tmp_path), no_route) == {}


def test_what_a_tree_says_is_read_whole(tmp_path: Path) -> None:
    there = {one.name: one for one in interfaces(trees.ethernet(tmp_path / "a"))}
    assert [one.name for one in there.values()][:2] == ["lo", "ens8f0np0"]
    kinds = {name: there[name].kind for name in ("lo", "ens16f0", "bond0", "docker0")}
    assert kinds == {"lo": "loopback", "ens16f0": "ethernet", "bond0": "bond", "docker0": "container bridge"}
    assert (there["bond0"].speed, there["ens16f0"].speed, there["ens8f0np0"].driver) == (50_000, 0, "bnxt_en")
    assert [there[name].up for name in ("ens8f0np0", "ens16f0", "lo")] == [True, False, True]
    port = hcas(trees.mellanox(tmp_path / "b"))[1]
    assert (port.name, port.port, port.link_layer, port.state) == ("mlx5_1", 1, "Ethernet", "ACTIVE")
    assert (port.driver, port.netdev, port.rate) == ("mlx5_core", "xgbe1", 400)
    assert [(gid.index, gid.kind, gid.address) for gid in port.gids][-1] == (3, "RoCE v2", "33.2.160.16")
    assert [one.name for one in hcas(trees.infiniband(tmp_path / "c"))][-3:] == ["mlx5_9", "mlx5_10", "mlx5_11"]
    pod = {one.name: one.kind for one in interfaces(trees.pods(tmp_path / "d"))}
    assert pod == {"lo": "loopback", "eth0": "veth", "net1": "veth", "net2": "veth"}
    assert {one.name: one.kind for one in interfaces(trees.vlans(tmp_path / "e"))}["bond0.2973"] == "vlan"


def test_what_is_left_out_is_told_with_its_reason(tmp_path: Path) -> None:
    _, why = choose(two_nodes(), here("mi300x"), {}, trees.broadcom(tmp_path / "a"), over("eno1"))["NCCL_IB_HCA"]
    assert why == "8 of 9 RDMA ports: RoCE at 400 Gbit/s (bnxt_en); left out bnxt_re8:1: down"
    _, why = choose(two_nodes(), here("h100"), {}, trees.infiniband(tmp_path / "b"), over("enp27s0f0np0"))[
        "NCCL_IB_HCA"
    ]
    assert "8 of 12 RDMA ports: InfiniBand at 400 Gbit/s" in why
    assert "mlx5_1:1: RoCE at 100 Gbit/s" in why and "mlx5_8:1: down" in why


def test_the_port_that_has_the_sockets_is_left_out_where_the_gpus_have_enough(tmp_path: Path) -> None:
    machine = here("a100")
    four = replace(machine, gpus=machine.gpus[:4])
    root = trees.bonded(tmp_path)
    assert values(choose(two_nodes(), four, {}, root, over("bond0")))["NCCL_IB_HCA"] == (
        "=mlx5_bond_1:1,mlx5_bond_2:1,mlx5_bond_3:1,mlx5_bond_4:1"
    )
    assert "mlx5_bond_0:1" in values(choose(two_nodes(), machine, {}, root, over("bond0")))["NCCL_IB_HCA"]


def test_a_port_without_an_address_is_left_out(tmp_path: Path) -> None:
    bare = trees.Port("mlx5_9", "mlx5_core", "400 Gb/sec (4X NDR)", "xgbe9", gids=trees.pairs(trees.LINK.format(9)))
    root = trees.make(trees.mellanox(tmp_path), [], [bare])
    value, why = choose(two_nodes(), here("h100"), {}, root, over("xgbe0"))["NCCL_IB_HCA"]
    assert "mlx5_8:1" in value and "mlx5_9" not in value and "mlx5_9:1: no address but its link's own" in why


def test_an_index_that_differs_is_left_to_the_library(tmp_path: Path) -> None:
    value, why = choose(two_nodes(), here("h100"), {}, trees.pods(tmp_path), over("eth0"))["NCCL_IB_GID_INDEX"]
    assert value == "" and "look for them" in why


def test_a_container_without_its_devices_says_which_flag_it_lacks(tmp_path: Path) -> None:
    root = trees.mellanox(tmp_path)
    (root / "dev/infiniband").rmdir()
    chosen = choose(two_nodes(), here("mi300x"), {}, root, over("xgbe0"))
    assert chosen["NCCL_IB_DISABLE"][0] == "1" and "--device /dev/infiniband" in chosen["NCCL_IB_DISABLE"][1]
    assert "NCCL_IB_HCA" not in chosen


def test_a_bond_is_named_in_whole(tmp_path: Path) -> None:
    """NCCL takes `bond0` for bond0.2973 too."""
    chosen = choose(two_nodes(), here("h100"), {}, trees.vlans(tmp_path), over("bond0"))
    assert chosen["NCCL_SOCKET_IFNAME"][0] == "=bond0" and chosen["GLOO_SOCKET_IFNAME"][0] == "bond0"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loopback_is_never_chosen(tmp_path: Path, rank: int) -> None:
    lo = over("lo", "127.0.0.1", "127.0.0.1")
    run = two_nodes(node_rank=rank, master_addr="localhost")
    chosen = choose(run, here("h100"), {}, trees.ethernet(tmp_path), lo)
    assert chosen["NCCL_SOCKET_IFNAME"] == chosen["GLOO_SOCKET_IFNAME"]
    assert chosen["GLOO_SOCKET_IFNAME"][0] == "" and "all nodes are taken to be here" in chosen["GLOO_SOCKET_IFNAME"][1]


def test_a_bridge_to_containers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR=10.0.0.1: it is reached over docker0"):
        choose(two_nodes(), here("h100"), {}, trees.ethernet(tmp_path), over("docker0"))


def test_a_network_between_containers_of_several_machines_is_taken(tmp_path: Path) -> None:
    root = trees.make(tmp_path, [trees.LO, trees.Nic("eth0", "igb"), trees.Nic("flannel.1", kind="virtual")])
    assert choose(two_nodes(), here("cpu"), {}, root, over("flannel.1"))["GLOO_SOCKET_IFNAME"][0] == "flannel.1"


def test_a_plan_for_another_machine_leaves_it_to_the_nodes() -> None:
    chosen = choose(two_nodes(network_interface="bond0"), find("mi300x"), {"NCCL_IB_HCA": "mlx5"})
    assert values(chosen) == {
        "NCCL_SOCKET_IFNAME": "=bond0", "GLOO_SOCKET_IFNAME": "bond0", "NCCL_IB_HCA": "mlx5", "NCCL_IB_GID_INDEX": "",
    }  # fmt: skip
    assert chosen["NCCL_IB_GID_INDEX"][1] == LATER


def test_a_resolved_plan_has_what_was_chosen_beside_the_settings() -> None:
    words = ["MODEL_SIZE=8", "NNODES=2", "NETWORK_INTERFACE=ens51np0", "NCCL_IB_HCA=rdma"]
    ours = {}
    for target in ("mi300x", "h100"):
        environment = resolve(read("llama3", words, {}, LIBRARY_PREFIXES), find(target), {}, dry_run=True).environment
        ours[target] = {name: environment[name] for name in environment if name in VARIABLES}
        assert len(environment) > len(ours[target])
    assert ours["mi300x"] == ours["h100"]
    assert values(ours["h100"]) == {
        "NCCL_SOCKET_IFNAME": "=ens51np0", "GLOO_SOCKET_IFNAME": "ens51np0",
        "NCCL_IB_HCA": "rdma", "NCCL_IB_GID_INDEX": "",
    }  # fmt: skip


@pytest.mark.parametrize("plan", [True, False])
def test_no_route_ends_a_run_but_not_a_plan(tmp_path: Path, plan: bool) -> None:
    def none(master: str) -> Way:
        raise NoWay(f"MASTER_ADDR={master}: this machine has no route there (10.0.0.1: network is unreachable)")

    root = trees.ethernet(tmp_path)
    if not plan:
        with pytest.raises(UsageError, match=r"no route there .*interfaces that are up here: .*bond0 \(bond\)"):
            choose(two_nodes(), here("h100"), {}, root, none)
        return
    chosen = choose(two_nodes(), here("h100"), {}, root, none, plan=True)
    assert chosen["GLOO_SOCKET_IFNAME"][0] == "" and "no route there" in chosen["GLOO_SOCKET_IFNAME"][1]
    assert chosen["NCCL_IB_DISABLE"][0] == "1"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"NCCL_SOCKET_IFNAME": "xgbe1,eno"}, {"GLOO_SOCKET_IFNAME": "xgbe1"}),  # a list for nodes of several kinds
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, {"GLOO_SOCKET_IFNAME": "xgbe0"}),
        ({"NCCL_SOCKET_IFNAME": "^=docker0"}, {"GLOO_SOCKET_IFNAME": "xgbe0"}),
        ({"GLOO_SOCKET_IFNAME": "xgbe2"}, {"NCCL_SOCKET_IFNAME": "=xgbe2"}),
        ({"NCCL_IB_HCA": "=mlx5_3,mlx5_4"}, {"NCCL_IB_GID_INDEX": "3"}),
        ({"NCCL_IB_HCA": "mlx5_3:1"}, {"NCCL_IB_GID_INDEX": "3"}),
        ({"NCCL_IB_HCA": "^mlx5_0"}, {"NCCL_IB_GID_INDEX": "3"}),
        ({"NCCL_IB_GID_INDEX": "2"}, {"NCCL_SOCKET_IFNAME": "=xgbe0"}),
        ({"NCCL_IB_GID_INDEX": "-1"}, {}),
        ({"NCCL_IB_DISABLE": "1"}, {"GLOO_SOCKET_IFNAME": "xgbe0"}),
    ],
)
def test_a_users_own_value_wins(tmp_path: Path, said: dict[str, str], kept: dict[str, str]) -> None:
    chosen = choose(two_nodes(), here("h100"), said, trees.mellanox(tmp_path), over("xgbe0"))
    for name, value in said.items():
        assert chosen[name] == (value, YOURS)
    assert kept.items() <= values(chosen).items()
    assert ("NCCL_IB_HCA" in chosen) == ("NCCL_IB_DISABLE" not in said)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {"NCCL_SOCKET_IFNAME": "eth9"},
            "NCCL_SOCKET_IFNAME=eth9: no interface of this machine has such a name; there is",
        ),
        ({"NCCL_SOCKET_IFNAME": "=xgbe"}, "NCCL_SOCKET_IFNAME==xgbe: no interface"),
        ({"GLOO_SOCKET_IFNAME": "xgbe"}, "GLOO_SOCKET_IFNAME=xgbe: this machine has no interface 'xgbe'"),
        ({"NCCL_IB_HCA": "=mlx5"}, r"NCCL_IB_HCA==mlx5: no RDMA device .* there is mlx5_0:1 \(ACTIVE\)"),
        ({"NCCL_IB_HCA": "mlx5_1:2"}, "NCCL_IB_HCA=mlx5_1:2: no RDMA device"),
        ({"NCCL_IB_GID_INDEX": "7"}, "NCCL_IB_GID_INDEX=7: mlx5_1:1 has no address at this index; it has 0: fe80"),
        ({"NCCL_IB_GID_INDEX": "three"}, "NCCL_IB_GID_INDEX=three: must be a whole number"),
    ],
)
def test_a_users_own_value_has_to_exist(tmp_path: Path, said: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        choose(two_nodes(), here("h100"), said, trees.mellanox(tmp_path), over("xgbe0"))


def test_a_port_or_interface_that_is_down_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"NCCL_IB_HCA=bnxt_re8: no such port is active \(bnxt_re8:1 is DOWN\)"):
        choose(two_nodes(), here("h100"), {"NCCL_IB_HCA": "bnxt_re8"}, trees.broadcom(tmp_path / "a"), over("eno1"))
    with pytest.raises(UsageError, match="NCCL_SOCKET_IFNAME=eno1,ens16f3: ens16f3 is down; there is"):
        said = {"NCCL_SOCKET_IFNAME": "eno1,ens16f3"}
        choose(two_nodes(), here("h100"), said, trees.ethernet(tmp_path / "c"), over("bond0"))
    with pytest.raises(UsageError, match="NETWORK_INTERFACE=ens16f0: ens16f0 is down"):
        choose(two_nodes(network_interface="ens16f0"), here("h100"), {}, trees.ethernet(tmp_path / "b"), over("bond0"))


def test_network_interface_says_it_for_both_libraries(tmp_path: Path) -> None:
    run = two_nodes(network_interface="xgbe3")
    chosen = choose(run, here("mi300x"), {}, trees.mellanox(tmp_path / "a"), over("xgbe0"))
    assert chosen["NCCL_SOCKET_IFNAME"][0] == "=xgbe3" and chosen["GLOO_SOCKET_IFNAME"][0] == "xgbe3"
    said = {"NCCL_SOCKET_IFNAME": "xgbe1"}
    chosen = choose(run, here("mi300x"), said, trees.mellanox(tmp_path / "b"), over("xgbe0"))
    assert chosen["NCCL_SOCKET_IFNAME"] == ("xgbe1", YOURS) and chosen["GLOO_SOCKET_IFNAME"][0] == "xgbe3"


@pytest.mark.parametrize(
    ("said", "vendor", "offered"),
    [
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "amd", ("eth1", "10.0.0.2")),  # IPv4 first, of all that are meant
        ({"NCCL_SOCKET_IFNAME": "^docker,lo", "NCCL_SOCKET_FAMILY": "AF_INET6"}, "amd", ("eth0", "fd77::1")),
        ({"NCCL_SOCKET_IFNAME": "=eth1", "NCCL_SOCKET_FAMILY": "AF_INET6"}, "nvidia", ("eth1", "fd77::2")),
        ({"NCCL_SOCKET_IFNAME": "far"}, "nvidia", None),
        ({"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth1"}, "cpu", ("eth1", "10.0.0.2")),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "amd", None),
        ({}, "amd", None),
    ],
)
def test_what_a_library_offers_its_sockets_at(
    said: dict[str, str], vendor: str, offered: tuple[str, str] | None
) -> None:
    addresses = {"docker0": ("172.17.0.1",), "far0": (), "eth0": ("fd77::1",), "eth1": ("10.0.0.2", "fd77::2")}
    there = [Interface(name, own, True, "ethernet", 0, "") for name, own in addresses.items()]
    assert socket_interface(said, there, vendor) == offered


def test_a_users_word_for_rdma_stays_where_there_is_none(tmp_path: Path) -> None:
    said = {"NCCL_IB_DISABLE": "0"}
    chosen = choose(two_nodes(), here("mi300x"), said, trees.ethernet(tmp_path), over("bond0"))
    assert chosen["NCCL_IB_DISABLE"] == ("0", YOURS)


def test_each_of_the_cards_own_settings_says_who_recommends_it() -> None:
    for extra in AINIC:
        assert extra.why and extra.source.link.startswith("https://github.com/"), extra
    assert len({extra.name for extra in AINIC}) == len(AINIC)


def test_node_0_by_its_own_name_on_a_machine_with_the_loopback_alone(tmp_path: Path) -> None:
    root = trees.make(tmp_path, [trees.LO, trees.Nic("eth0", "igb", "down")])
    run = two_nodes(node_rank=0, master_addr="node0")
    value, why = choose(run, here("cpu"), {}, root, over("lo", "127.0.1.1", "127.0.0.1"))["GLOO_SOCKET_IFNAME"]
    assert value == "" and "all nodes are taken to be here" in why
