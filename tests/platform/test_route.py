"""Routes and ports of this machine itself; those of several interfaces: tests/launch/test_two_hosts.py."""

from __future__ import annotations

import socket

import pytest
from support import free_port

from megatron_rocm.platform import nics
from megatron_rocm.platform.route import NoWay, knock, tried, way_to


def test_the_loopback_leads_to_itself() -> None:
    way = way_to("127.0.0.1")
    assert (way.address, way.source, way.interface, way.is_loopback) == ("127.0.0.1", "127.0.0.1", "lo", True)


def test_the_interfaces_of_this_machine_are_found() -> None:
    lo = next(one for one in nics.interfaces() if one.name == "lo")
    assert lo.kind == "loopback" and lo.up and lo.addresses[0] == "127.0.0.1"


def test_what_is_no_host_name_is_told() -> None:
    name = "a" * 70
    with pytest.raises(NoWay, match=f"MASTER_ADDR={name}: no address for this name here"):
        way_to(name)


def test_a_port_answers_or_says_why_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        assert knock("127.0.0.1", door.getsockname()[1]) == ""
    port = free_port()
    assert knock("127.0.0.1", port) == "refused: nothing listens there"
    assert tried("127.0.0.1", port, is_master=False) == (
        f"tried 127.0.0.1 port {port} over lo (127.0.0.1): refused: nothing listens there"
    )
