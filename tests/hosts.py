"""Hosts of a cluster as network namespaces of this machine: real interfaces, a name and an /etc/hosts of their own.

As root, with `ip` (iproute2) and `iptables`. What is started on a host ends with the test's process or before it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# An own name, and files over those in /etc that name hosts: without a name server each look-up would wait for one.
_ENTER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
if [ -e /etc/nsswitch.conf ]; then mount --bind "$3" /etc/nsswitch.conf; fi
shift 3
exec "$@"
"""


def why_not() -> str:
    """Why this machine can't have such hosts, "" where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "iptables", "unshare") if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} missing"
    name = f"probe{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Host:
    """A network namespace called by a host's name."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.namespace = f"{name}-{os.getpid()}"
        self.files = folder / f"{name}.hosts", folder / "nsswitch.conf"
        self.files[1].write_text("hosts: files\n")

    def ip(self, *lines: str) -> None:
        """Commands of `ip` here, one a line."""
        for line in lines:
            subprocess.run(["ip", "-n", self.namespace, *line.split()], check=True)

    def knows(self, **addresses: str) -> None:
        """The names in this host's /etc/hosts."""
        self.files[0].write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))

    def command(self, *words: str) -> list[str]:
        """The words for a program to run on this host; its process keeps the number it is started with."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _ENTER, "sh"]
        return [*enter, self.name, *map(str, self.files), *words]

    def received(self, interface: str) -> int:
        """Bytes that came in through an interface."""
        file = f"/sys/class/net/{interface}/statistics/rx_bytes"
        return int(subprocess.check_output(["ip", "netns", "exec", self.namespace, "cat", file]))

    @contextmanager
    def firewall(self, *rules: str) -> Iterator[None]:
        """Drop what comes in as the rules of iptables say, each without its `-A INPUT`."""
        iptables = ["ip", "netns", "exec", self.namespace, "iptables"]
        try:
            for rule in rules:
                subprocess.run([*iptables, "-A", "INPUT", *rule.split()], check=True)
            yield
        finally:
            subprocess.run([*iptables, "-F", "INPUT"], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each with a wrong network interface, which is the first and has the host's own name, and a right one.

    `eth0` leads nowhere but to the default route of the first host; `eth1` is a cable between the two; `docker0` is a
    bridge without ports. Both know the first one as `master`, by its address on eth1.
    """
    first, second = hosts = (Host("alpha", folder), Host("beta", folder))
    try:
        for number, host in enumerate(hosts, 1):
            subprocess.run(["ip", "netns", "add", host.namespace], check=True)
            host.ip("link set lo up", "link add eth0 type veth peer name far0", "link add docker0 type bridge")
            host.ip(f"addr add 192.168.{50 + number}.1/24 dev eth0", "addr add 172.17.0.1/16 dev docker0")
            host.ip("link set eth0 up", "link set far0 up", "link set docker0 up")
            host.knows(
                localhost="127.0.0.1", **{host.name: f"192.168.{50 + number}.1"}, master="10.77.0.1", here="127.0.1.1"
            )
        first.ip(f"link add eth1 type veth peer name eth1 netns {second.namespace}")
        for number, host in enumerate(hosts, 1):
            host.ip(
                f"addr add 10.77.0.{number}/24 dev eth1",
                f"addr add fd77::{number}/64 dev eth1 nodad",
                "link set eth1 up",
            )
        first.ip("route add default via 192.168.51.254 dev eth0")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
