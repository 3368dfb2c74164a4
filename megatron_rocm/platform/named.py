"""Interfaces and RDMA ports as users name them, in the syntax of the library that reads the variable.

Source: NCCL's user guide, NCCL_SOCKET_IFNAME and NCCL_IB_HCA; torch.distributed, "Choosing the network interface to
use", for GLOO_SOCKET_IFNAME.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.nics import Hca, Interface


def matches(value: str, name: str, port: int | None = None) -> bool:
    """Whether NCCL takes an interface, or an RDMA device's port, for one that `value` means.

    `value` is a list of name beginnings with an optional `:port`; `=` before the list asks for whole names, `^` for
    all but these, `^=` for both.
    """
    others = value.startswith("^")
    exact = value[others:].startswith("=")
    for entry in value[others + exact :].split(","):
        said, _, said_port = entry.strip().partition(":")
        same = name == said if exact else bool(said) and name.startswith(said)
        if same and (port is None or not said_port or said_port == str(port)):
            return not others
    return others


def nccl_interfaces(variable: str, value: str, there: Sequence[Interface]) -> list[Interface]:
    """The interfaces meant by NCCL's syntax that are up with an address. Raises UsageError where there are none.

    A list may name interfaces that other nodes have, so one of its entries is enough.
    """
    named = [one for one in there if matches(value, one.name)]
    meant = [one for one in named if not _complaint(one, there)]
    if not meant:
        what = "; ".join(_complaint(one, there) for one in named) or "no interface of this machine has such a name"
        raise UsageError(f"{variable}={value}: {what}; {_those(there)}")
    return meant


def exact_interfaces(variable: str, value: str, there: Sequence[Interface]) -> list[Interface]:
    """The interfaces named in whole, separated by commas. Raises UsageError for one that is missing or of no use."""
    by_name = {one.name: one for one in there}
    meant = []
    for name in value.split(","):
        one = by_name.get(name)
        if one is None:
            raise UsageError(f"{variable}={value}: this machine has no interface {name!r}; {_those(there)}")
        if complaint := _complaint(one, there):
            raise UsageError(f"{variable}={value}: {complaint}; {_those(there)}")
        meant.append(one)
    return meant


def active_ports(value: str, ports: Sequence[Hca]) -> list[Hca]:
    """The active RDMA ports that NCCL_IB_HCA means. Raises UsageError where there are none."""
    meant = [port for port in ports if matches(value, port.name, port.port)]
    active = [port for port in meant if port.state == "ACTIVE"]
    if active:
        return active
    if meant:
        states = ", ".join(f"{port} is {port.state}" for port in meant)
        raise UsageError(f"NCCL_IB_HCA={value}: no such port is active ({states})")
    there = ", ".join(f"{port} ({port.state})" for port in ports) or "none"
    raise UsageError(f"NCCL_IB_HCA={value}: no RDMA device of this machine has such a name; there is {there}")


def check_gid_index(value: str, ports: Sequence[Hca]) -> None:
    """Raises UsageError unless each RoCE port has an address at this index; -1 leaves the choice to NCCL."""
    if not value.lstrip("-").isdigit() or int(value) < -1:
        raise UsageError(f"NCCL_IB_GID_INDEX={value}: must be a whole number, or -1 for NCCL's own choice")
    if int(value) == -1:
        return
    for port in ports:
        at = {gid.index: gid for gid in port.gids}
        if port.link_layer == "Ethernet" and int(value) not in at:
            has = ", ".join(f"{gid.index}: {gid.address} ({gid.kind})" for gid in port.gids) or "none"
            raise UsageError(f"NCCL_IB_GID_INDEX={value}: {port} has no address at this index; it has {has}")


def _complaint(one: Interface, there: Sequence[Interface]) -> str:
    """Why nobody can connect to an interface, "" where one can. Of a tree's interfaces no address is known."""
    if not one.up:
        return f"{one.name} is down"
    return f"{one.name} has no IP address" if not one.address and any(other.address for other in there) else ""


def _those(there: Sequence[Interface]) -> str:
    return f"there is {', '.join(str(one) for one in there if one.kind != 'loopback') or 'none but the loopback'}"
