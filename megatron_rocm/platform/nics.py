"""What this machine's network is: its interfaces and its RDMA ports, as the kernel tells them.

Sources: Linux Documentation/ABI/testing/sysfs-class-net and Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rocm.platform.machine import text

Kind = Literal["ethernet", "infiniband", "bond", "vlan", "bridge", "container bridge", "veth", "loopback", "virtual"]

# Names that container and virtual machine software gives to what leads nowhere but to its own guests; its networks
# between machines (flannel.1, cilium_host, weave) are not among them.
CONTAINERS = re.compile(r"docker|br-[0-9a-f]{12}$|podman|cni|nerdctl|virbr|lxcbr|lxdbr|incusbr|kube-|cbr\d|cali|lxc")
LOOPBACK_TYPE, INFINIBAND_TYPE = "772", "32"  # ARPHRD_ of Linux include/uapi/linux/if_arp.h
IS_UP = 1  # IFF_UP of Linux include/uapi/linux/if.h


@dataclass(frozen=True)
class Interface:
    """A network interface. `addresses` without prefix lengths, IPv4 first; `speed` in Mbit/s, 0 where unknown.

    Addresses are known of this machine alone, not of the tree of another.
    """

    name: str
    addresses: tuple[str, ...]
    up: bool
    kind: Kind
    speed: int
    driver: str

    @property
    def address(self) -> str:
        """The first that other machines can use, "" where there is none."""
        return next((one for one in self.addresses if not is_link_local(one)), "")

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, (self.address, self.kind, '' if self.up else 'down')))})"


@dataclass(frozen=True)
class Gid:
    """An entry of an RDMA port's address table: `kind` is "RoCE v2" or "IB/RoCE v1", as the kernel says."""

    index: int
    kind: str
    address: str


@dataclass(frozen=True)
class Hca:
    """A port of an RDMA device. `netdev` is the interface over the same port, "" where there is none."""

    name: str
    port: int
    link_layer: str  # "InfiniBand" or "Ethernet"; "Unspecified" for what libibverbs' common operations don't drive
    state: str  # "ACTIVE", "DOWN", "INIT", "ARMED"
    driver: str
    netdev: str
    gids: tuple[Gid, ...]
    rate: int = 0  # Gbit/s

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


def interfaces(root: Path = Path("/")) -> tuple[Interface, ...]:
    """The network interfaces, in the kernel's order. `root` holds sys/."""
    folder = root / "sys/class/net"
    if root != Path("/"):
        there = sorted(_listed(folder), key=lambda path: _number(path / "ifindex"))
        return tuple(_interface(path, (), _is_up(path), _number(path / "speed")) for path in there)
    import psutil

    # Asked for by system call: /sys is of the network namespace it was mounted in, which need not be this process's.
    states, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    return tuple(
        _interface(folder / name, _usable(addresses.get(name, ())), states[name].isup, states[name].speed)
        for _, name in socket.if_nameindex()
        if name in states
    )


def hcas(root: Path = Path("/")) -> tuple[Hca, ...]:
    """The ports of the RDMA devices, by name and port; mlx5_2 is before mlx5_10. `root` holds sys/."""
    devices = sorted(_listed(root / "sys/class/infiniband"), key=_natural)
    return tuple(_hca(device, port) for device in devices for port in sorted(_listed(device / "ports"), key=_natural))


def is_link_local(address: str) -> bool:
    """Whether an address holds within one link alone (169.254.0.0/16, fe80::/10)."""
    return ipaddress.ip_address(address).is_link_local


def _interface(folder: Path, addresses: tuple[str, ...], up: bool, speed: int) -> Interface:
    return Interface(folder.name, addresses, up, _kind(folder), max(0, speed), _driver(folder))


def _kind(folder: Path) -> Kind:
    """What an interface is by its folder in /sys; `virtual` where it is no device's and none of the kinds we know."""
    kind = text(folder / "type")
    told = re.search(r"DEVTYPE=(bond|vlan|bridge)\b", text(folder / "uevent"))
    if kind == LOOPBACK_TYPE or folder.name == "lo":
        return "loopback"
    if (folder / "device").exists() or (folder / "device").is_symlink():
        return "infiniband" if kind == INFINIBAND_TYPE else "ethernet"
    if CONTAINERS.match(folder.name):
        return "container bridge"
    if told:
        return told[1]  # type: ignore[return-value]
    elsewhere = text(folder / "iflink") not in ("", text(folder / "ifindex"))  # its other end has a number of its own
    return "veth" if elsewhere and not list(folder.glob("lower_*")) else "virtual"


def _is_up(folder: Path) -> bool:
    """Up, with a cable that has a signal; some drivers tell no more than that they were brought up."""
    state = text(folder / "operstate")
    brought_up = int(text(folder / "flags") or "0", 16) & IS_UP
    return state == "up" or bool(state == "unknown" and brought_up and text(folder / "carrier") != "0")


def _usable(answer: Iterable[Any]) -> tuple[str, ...]:
    """IP addresses of psutil's answer: IPv4 first, those of one link last."""
    found = [one.address.partition("%")[0] for one in answer if one.family in (socket.AF_INET, socket.AF_INET6)]
    return tuple(sorted(found, key=lambda one: (is_link_local(one), ":" in one)))


def _hca(device: Path, port: Path) -> Hca:
    rate = re.match(r"[\d.]+", text(port / "rate"))
    gids = tuple(_gids(port))
    return Hca(
        name=device.name,
        port=int(port.name),
        link_layer=text(port / "link_layer"),
        state=text(port / "state").partition(": ")[2] or "unknown",
        driver=_driver(device),
        netdev=_netdev(device, port, gids),
        gids=gids,
        rate=int(float(rate[0])) if rate else 0,
    )


def _gids(port: Path) -> Iterator[Gid]:
    """The entries in use. Those of other network namespaces read as zeros."""
    for file in sorted(_listed(port / "gids"), key=lambda path: int(path.name)):
        written = text(file)
        if written.strip("0:"):
            address = ipaddress.IPv6Address(written)
            kind = text(port / "gid_attrs/types" / file.name)
            yield Gid(int(file.name), kind, str(address.ipv4_mapped or address))


def _netdev(device: Path, port: Path, gids: tuple[Gid, ...]) -> str:
    for gid in gids:
        if name := text(port / "gid_attrs/ndevs" / str(gid.index)):
            return name
    under = sorted(_listed(device / "device/net"))
    same = [path for path in under if len(under) == 1 or _number(path / "dev_port") == int(port.name) - 1]
    return same[0].name if same else ""


def _driver(folder: Path) -> str:
    try:
        return os.path.basename(os.readlink(folder / "device/driver"))
    except OSError:
        return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _number(file: Path) -> int:
    said = text(file)
    return int(said) if said.lstrip("-").isdigit() else 0


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", path.name)]
