"""The way from this machine to another: which interface it takes, and whether a port answers there."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import time
from dataclasses import dataclass

from megatron_rocm.errors import UsageError
from megatron_rocm.platform import nics

ASK_AGAIN = 2.0  # seconds between questions for a name that has no address yet
KNOCK = 5.0  # seconds for an answer to a connection, which takes a round trip


class NoWay(UsageError):
    """A name without an address, or an address without a route."""


@dataclass(frozen=True)
class Way:
    """The route to `address`: this machine's own address `source` on it, and the interface that has that."""

    address: str
    source: str
    interface: str

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.source).is_loopback


def way_to(master: str, patience: float = 0.0) -> Way:
    """The route to a host name or address, as the kernel would take it; nothing is sent.

    A name is asked for over `patience` seconds: a cluster may tell it only once the other node is up. Raises NoWay.
    """
    found = _addresses(master, patience)
    reasons = []
    for family, target in found:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)  # of a datagram socket: routes, and sends nothing
            except OSError as error:
                reasons.append(f"{target[0]}: {(error.strerror or str(error)).lower()}")
                continue
            source = probe.getsockname()
        own = source[0].partition("%")[0]
        return Way(target[0], own, _owner(own, source[3] if family == socket.AF_INET6 else 0))
    raise NoWay(f"MASTER_ADDR={master}: this machine has no route there ({'; '.join(reasons)})")


def knock(address: str, port: int, seconds: float = KNOCK) -> str:
    """ "" where a TCP connection to the port comes about, or else what came of it."""
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except OSError as error:
        if isinstance(error, TimeoutError):
            return f"no answer within {seconds:g} seconds: a firewall drops it, or no machine has that address"
        return _MEANINGS.get(error.errno or 0, error.strerror or str(error))
    return ""


def tried(master: str, port: int, is_master: bool) -> str:
    """What a rendezvous that failed went over: interface, addresses and port, and what the port answers now."""
    try:
        way = way_to(master)
    except NoWay as error:
        return str(error).removeprefix(f"MASTER_ADDR={master}: ")
    here = f"{way.interface or 'an interface'} ({way.source})"
    if is_master and way.address == way.source:
        return f"node 0 waited at {way.address} port {port}, which is {here}"
    if is_master:
        return f"{way.address} is none of node 0's addresses; its route there is {here}"
    answer = knock(way.address, port) or "it answers now"
    return f"tried {way.address} port {port} over {here}: {answer}"


_MEANINGS = {
    errno.ECONNREFUSED: "refused: nothing listens there",
    errno.EHOSTUNREACH: "no route to that host, or a firewall turns it away",
    errno.ENETUNREACH: "no route to that network",
}


def _addresses(master: str, patience: float) -> list[tuple[int, tuple[str, ...]]]:
    """(family, socket address) of each address the name has."""
    end = time.monotonic() + patience
    told = False
    while True:
        try:
            answers = socket.getaddrinfo(master.strip("[]"), 9, type=socket.SOCK_DGRAM)  # port 9, discard: none is sent
            return [(family, address) for family, _, _, _, address in answers]  # type: ignore[misc]
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            if time.monotonic() >= end:
                raise NoWay(f"MASTER_ADDR={master}: no address for this name here ({reason})") from None
        if not told:
            print(
                f"megatron-rocm: MASTER_ADDR={master} has no address yet; asking for {patience:g} seconds",
                file=sys.stderr,
            )
            told = True
        time.sleep(min(ASK_AGAIN, max(0.0, end - time.monotonic())))


def _owner(address: str, scope: int) -> str:
    """The interface that has this address; `scope` is its number where the address holds within one link alone."""
    if scope:
        return socket.if_indextoname(scope)
    return next((one.name for one in nics.interfaces() if address in one.addresses), "")
