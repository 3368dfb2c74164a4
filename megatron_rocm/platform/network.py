"""What the processes of several nodes talk over: chosen from what this machine has, each choice with its reason."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform import named
from megatron_rocm.platform.machine import Machine, text
from megatron_rocm.platform.nics import Gid, Hca, Interface, hcas, interfaces, is_link_local
from megatron_rocm.platform.route import NoWay, Way, way_to
from megatron_rocm.platform.settings import YOURS
from megatron_rocm.platform.sources import PRIMUS_AINIC, PRIMUS_AINIC_CONTAINER, Source

__all__ = ["AINIC", "VARIABLES", "Gid", "Hca", "Interface", "choose", "hcas", "interfaces", "socket_interface"]

NCCL, GLOO = "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"
PORTS, GID, NO_RDMA = "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_IB_DISABLE"

Choice = dict[str, tuple[str, str]]
Route = Callable[[str], Way]


class Extra(NamedTuple):
    """A variable that goes with one kind of network card. `source` says who recommends it."""

    name: str
    value: str
    why: str
    source: Source


# RCCL over AMD's Pensando cards. docs/network.md says what of AMD's own set is left out, and why.
AINIC = (
    Extra("RCCL_AINIC_ROCE", "1", "Pensando card: RCCL's own transport for it", PRIMUS_AINIC),
    Extra("NCCL_NET_PLUGIN", "none", "Pensando card: no plugin before RCCL's own transport", PRIMUS_AINIC),
    Extra(
        "NCCL_IB_TC", "104", "Pensando card: DSCP 26, the lossless class; ask who configured the switches", PRIMUS_AINIC
    ),
    Extra("NCCL_IB_FIFO_TC", "192", "Pensando card: DSCP 48, for control messages; the same", PRIMUS_AINIC),
    Extra("NCCL_IB_QPS_PER_CONNECTION", "1", "Pensando card: one queue pair per connection", PRIMUS_AINIC),
    Extra("NCCL_IB_USE_INLINE", "1", "Pensando card: small messages travel in the work request", PRIMUS_AINIC),
    Extra("NCCL_GDR_FLUSH_DISABLE", "1", "Pensando card: no read after each write into a GPU's memory", PRIMUS_AINIC),
    Extra("RCCL_GDR_FLUSH_GPU_MEM_NO_RELAXED_ORDERING", "0", "Pensando card: how such a read is ordered", PRIMUS_AINIC),
    Extra("NCCL_DMABUF_ENABLE", "0", "Pensando card: a GPU's memory is registered without DMA-BUF", PRIMUS_AINIC),
    Extra("NCCL_IGNORE_CPU_AFFINITY", "1", "Pensando card: RCCL's threads go where its GPU is", PRIMUS_AINIC),
    Extra(
        "NCCL_PXN_DISABLE",
        "0",
        "Pensando card: messages may go through another GPU to its card",
        PRIMUS_AINIC_CONTAINER,
    ),
)

VARIABLES = (NCCL, GLOO, PORTS, GID, NO_RDMA)

LATER = "each node chooses when the run starts there"
SAME_MACHINE = "MASTER_ADDR is this machine's loopback: all nodes are taken to be here"


def choose(
    run: RunConfig,
    machine: Machine,
    said: Mapping[str, str],
    root: Path = Path("/"),
    route: Route = way_to,
    *,
    plan: bool = False,
) -> Choice:
    """Variable → (value, why) for this node's processes; "" leaves a variable unset. Nothing for a single node.

    A name in `said` (the user's environment and KEY=VALUE arguments) keeps its value. `route` finds the way to
    MASTER_ADDR; a `plan` does without one. Raises UsageError for a value that names nothing this machine has, and
    where the other nodes can't be reached.
    """
    if run.parallel.nnodes == 1:
        return {}
    own = {name: said[name] for name in (*VARIABLES, *(extra.name for extra in AINIC)) if said.get(name)}
    names = (GLOO,) if machine.vendor == "cpu" else (NCCL, GLOO)
    if not machine.is_here:
        return _elsewhere(run, names, own)
    there = interfaces(root)
    chosen, interface = _sockets(run, names, own, there, root, route, plan)
    if machine.vendor != "cpu":
        chosen |= _rdma(machine, own, interface, root)
    return chosen


def socket_interface(environment: Mapping[str, str], there: Sequence[Interface], vendor: str) -> tuple[str, str] | None:
    """(interface, address) that a process with this environment offers its sockets at; None where nothing says so.

    NCCL takes the first address that its variable allows, of all interfaces IPv4 before IPv6; gloo its interface's
    first. Each reads its own variable alone.
    """
    name = environment.get(GLOO, "").partition(",")[0]
    meant = [one for one in there if one.name == name]
    if vendor != "cpu":
        value = environment.get(NCCL, "")
        meant = [one for one in there if value and one.up and named.matches(value, one.name)]
    addresses = [(one.name, address) for one in meant for address in one.addresses if not is_link_local(address)]
    if vendor != "cpu":
        family = environment.get("NCCL_SOCKET_FAMILY", "")
        unwanted = {"AF_INET": True, "AF_INET6": False}.get(family)
        addresses = sorted((one for one in addresses if (":" in one[1]) != unwanted), key=lambda one: ":" in one[1])
    return addresses[0] if addresses else None


def _elsewhere(run: RunConfig, names: Sequence[str], own: Mapping[str, str]) -> Choice:
    """For a machine that this one is not: what was said, and that the rest is found there."""
    rows = {name: (value, YOURS) for name, value in own.items()}
    if name := run.launch.network_interface:
        rows = {variable: (_written(variable, name), "NETWORK_INTERFACE") for variable in names} | rows
    asked = (*names, PORTS, GID) if NCCL in names else names
    return {variable: ("", LATER) for variable in asked} | rows


def _sockets(
    run: RunConfig, names: Sequence[str], own: Mapping[str, str], there: Sequence[Interface], root: Path, route: Route,
    plan: bool,
) -> tuple[Choice, str]:  # fmt: skip
    """The variables for TCP connections, and the interface they take ("" where none was chosen)."""
    mine = {name: (own[name], YOURS) for name in names if name in own}
    meant = {NCCL: named.nccl_interfaces, GLOO: named.exact_interfaces}
    theirs = [meant[name](name, own[name], there) for name in mine]
    interface: Interface | None
    if said := run.launch.network_interface:
        interface, why = named.exact_interfaces("NETWORK_INTERFACE", said, there)[0], "NETWORK_INTERFACE"
    elif len(theirs) == len(names):
        return mine, theirs[0][0].name
    elif theirs and len(theirs[0]) == 1:  # one of the two was said, and names one interface: the other follows
        interface, why = theirs[0][0], f"as {next(iter(mine))}"
    else:
        try:
            interface, why = _by_route(run, there, root, route)
        except NoWay as error:
            if not plan:
                raise NoWay(f"{error}; {_way_out(there)}") from None
            return {name: ("", f"{LATER}: {error}") for name in names} | mine, ""
        if interface is None:
            return {name: ("", why) for name in names} | mine, ""
    return {name: (_written(name, interface.name), f"{interface}: {why}") for name in names} | mine, interface.name


def _by_route(run: RunConfig, there: Sequence[Interface], root: Path, route: Route) -> tuple[Interface | None, str]:
    """The interface that the route to MASTER_ADDR takes, and why it is that one; None on one machine."""
    master = run.launch.master_addr
    way = route(master)
    if way.is_loopback:
        if run.launch.node_rank or _is_loopback_by_name(master):
            return None, SAME_MACHINE
        why = f"MASTER_ADDR={master} is the loopback here, where other nodes can't come"
        return _outward(there, root, why)
    interface = next((one for one in there if one.name == way.interface), None)
    if interface is None:
        raise NoWay(f"MASTER_ADDR={master}: the route starts at {way.source}, which no interface here has")
    if interface.kind in ("container bridge", "loopback"):
        raise UsageError(
            f"MASTER_ADDR={master}: it is reached over {interface}, where other machines can't come; name node 0 by "
            "its address on the network that all nodes share, or the interface with NETWORK_INTERFACE"
        )
    if run.launch.node_rank:
        return interface, f"the route to MASTER_ADDR={master} takes it"
    if way.address == way.source:
        return interface, f"it has the address of MASTER_ADDR={master}"
    return interface, f"the route to MASTER_ADDR={master} takes it, though that is no address of this node 0"


def _outward(there: Sequence[Interface], root: Path, why: str) -> tuple[Interface | None, str]:
    """Where a machine is most likely reached from outside: its default route, or else its best interface."""
    usable = [one for one in there if one.up and one.address and one.kind in _OUTWARD]
    if not usable:
        return None, f"{why}, but nothing else is up and has an address: all nodes are taken to be here"
    default = _default_interface(root)
    for one in usable:
        if one.name == default:
            return one, f"{why}; the default route takes it"
    best = min(usable, key=lambda one: (_OUTWARD.index(one.kind), -one.speed))
    return best, f"{why}; of those that are up it is the likeliest (NETWORK_INTERFACE names another)"


_OUTWARD = ("bond", "ethernet", "infiniband", "vlan", "bridge", "veth", "virtual")


def _default_interface(root: Path) -> str:
    """The interface of the default route of least metric, IPv4 (proc(5), /proc/net/route)."""
    rows = [line.split() for line in text(root / "proc/net/route").splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(defaults, default=(0, ""))[1]


def _is_loopback_by_name(master: str) -> bool:
    """Said to be the loopback, and not by a host's own name that its /etc/hosts gives to it."""
    if master == "localhost":
        return True
    try:
        return ipaddress.ip_address(master.strip("[]")).is_loopback
    except ValueError:
        return False


def _written(variable: str, interface: str) -> str:
    """NCCL takes names for beginnings of names unless `=` is before them: bond0 would mean bond0.100 too."""
    return f"={interface}" if variable == NCCL else interface


def _way_out(there: Sequence[Interface]) -> str:
    up = ", ".join(str(one) for one in there if one.up and one.kind != "loopback") or "none"
    return f"name node 0 by an address that all nodes reach; interfaces that are up here: {up}"


def _rdma(machine: Machine, own: Mapping[str, str], interface: str, root: Path) -> Choice:
    """The variables for RDMA: which ports, which of their addresses, or that there is none."""
    if own.get(NO_RDMA, "0") != "0":
        return {NO_RDMA: (own[NO_RDMA], YOURS)}
    mine = {NO_RDMA: (own[NO_RDMA], YOURS)} if NO_RDMA in own else {}
    ports = hcas(root)
    if PORTS in own:
        chosen = named.active_ports(own[PORTS], ports)
        rows = {PORTS: (own[PORTS], YOURS)}
    else:
        chosen, why = _ports(ports, len(machine.gpus), interface)
        if not chosen and any(port.link_layer == "Unspecified" for port in ports):
            return {}  # what a plugin of its maker's drives (Amazon's EFA)
        if chosen and not (root / "dev/infiniband").is_dir():
            chosen, why = [], "/dev/infiniband is missing here: start the container with --device /dev/infiniband"
        if not chosen:
            return mine or {NO_RDMA: ("1", f"{why}: gradients go through TCP sockets")}
        rows = {PORTS: ("=" + ",".join(map(str, chosen)), why)}
    if any(port.link_layer == "Ethernet" for port in chosen):
        rows |= _gid_index(chosen, own)
    if machine.vendor == "amd" and all(port.driver.startswith("ionic") for port in chosen):
        rows |= {extra.name: (own[extra.name], YOURS) if extra.name in own else extra[1:3] for extra in AINIC}
    return rows


def _ports(ports: Sequence[Hca], gpus: int, interface: str) -> tuple[list[Hca], str]:
    """The ports that gradients go through, and why these: of one kind, the kind that moves most."""
    left_out = {str(port): port.state.lower() for port in ports if port.state != "ACTIVE"}
    active = [port for port in ports if port.state == "ACTIVE" and port.link_layer in ("InfiniBand", "Ethernet")]
    if not active:
        down = ", ".join(f"{port} is {state}" for port, state in left_out.items())
        return [], f"no RDMA port is active ({down})" if down else "this machine has no RDMA device"
    by_kind = [list(group) for _, group in groupby(sorted(active, key=_kind), key=_kind)]
    best = max(by_kind, key=_moves)
    left_out |= {str(port): f"{_layer(port)} at {port.rate} Gbit/s" for port in active if port not in best}
    routed = [port for port in best if _best_gids(port)[0] == 0]
    if best[0].link_layer == "Ethernet" and routed:
        left_out |= {str(port): "no address but its link's own" for port in best if port not in routed}
        best = routed
    if len(best) > gpus > 0:
        beside = [port for port in best if port.netdev and port.netdev == interface]
        left_out |= {str(port): "it has the sockets, and each GPU a port without it" for port in beside}
        best = [port for port in best if port not in beside] or best
    best.sort(key=ports.index)
    first = best[0]
    what = f"{_layer(first)} at {first.rate} Gbit/s ({first.driver or 'unknown driver'})"
    why = f"{len(best)} of {len(ports)} RDMA ports: {what}"
    out = "; ".join(f"{port}: {reason}" for port, reason in left_out.items())
    return best, f"{why}; left out {out}" if out else why


def _kind(port: Hca) -> tuple[str, str, int]:
    return port.link_layer, port.driver, port.rate


def _moves(group: Sequence[Hca]) -> tuple[int, bool]:
    return sum(max(1, port.rate) for port in group), group[0].link_layer == "InfiniBand"


def _layer(port: Hca) -> str:
    return "RoCE" if port.link_layer == "Ethernet" else port.link_layer


def _best_gids(port: Hca) -> tuple[int, frozenset[int]]:
    """Of a port's best RoCE v2 addresses: 0 if they can be routed, 1 if not, 2 if there are none; their indices."""
    second = [gid for gid in port.gids if gid.kind == "RoCE v2"]
    ranked = {gid.index: (is_link_local(gid.address), ":" in gid.address) for gid in second}
    if not ranked:
        return 2, frozenset()
    best = min(ranked.values())
    return int(best[0]), frozenset(index for index, rank in ranked.items() if rank == best)


def _gid_index(ports: Sequence[Hca], own: Mapping[str, str]) -> Choice:
    """Which entry of the ports' address tables: one index for all, of a RoCE v2 address that can be routed."""
    if GID in own:
        named.check_gid_index(own[GID], ports)
        return {GID: (own[GID], YOURS)}
    common = frozenset.intersection(*(_best_gids(port)[1] for port in ports))
    if not common:
        return {GID: ("", "no index has a RoCE v2 address on each port: NCCL and RCCL from 2.21 on look for them")}
    index = min(common)
    address = next(gid.address for gid in ports[0].gids if gid.index == index)
    kind = "IPv4" if ":" not in address else "IPv6"
    reach = ", which other subnets can't reach" if is_link_local(address) else ""
    return {GID: (str(index), f"RoCE v2 over {kind} on each port, as {address} on {ports[0]}{reach}")}
