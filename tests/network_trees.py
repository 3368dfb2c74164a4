"""Trees in the form of the kernel's /sys/class/net and /sys/class/infiniband, each after a published dump.

Names, link layers, states and GID tables are the dumps'. What a dump does not show (speeds, and the ports of a table it
cuts off) is filled in as the machine's makers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

V1, V2 = "IB/RoCE v1", "RoCE v2"


class Nic(NamedTuple):
    """A network interface. `kind` is the kernel's DEVTYPE, or "" for a device, "virtual" for neither."""

    name: str
    driver: str = ""
    state: str = "up"
    kind: str = ""
    speed: int = 0
    type: int = 1
    iflink: int = 0  # 0: its own number


class Port(NamedTuple):
    """A port of an RDMA device. `gids`: (index, type, address in full) each."""

    device: str
    driver: str
    rate: str
    netdev: str = ""
    layer: str = "Ethernet"
    state: str = "4: ACTIVE"
    gids: Sequence[tuple[int, str, str]] = ()


DEVTYPES = ("bond", "bridge", "vlan")
LO = Nic("lo", kind="virtual", state="unknown", type=772)
DOCKER = Nic("docker0", kind="bridge", state="up")


def make(root: Path, nics: Sequence[Nic], ports: Sequence[Port] = ()) -> Path:
    """Write the tree below `root`; returns it."""
    for number, nic in enumerate(nics, 1):
        folder = root / "sys/class/net" / nic.name
        folder.mkdir(parents=True)
        up = nic.state in ("up", "unknown")
        lines = {
            "ifindex": number, "iflink": nic.iflink or number, "operstate": nic.state, "type": nic.type,
            "flags": "0x1003" if up else "0x1002", "carrier": int(up), "speed": nic.speed or -1,
            "uevent": f"DEVTYPE={nic.kind}\nINTERFACE={nic.name}" if nic.kind in DEVTYPES else f"INTERFACE={nic.name}",
        }  # fmt: skip
        _write(folder, lines)
        if not nic.kind:
            _device(folder, nic.driver)
    for port in ports:
        folder = root / "sys/class/infiniband" / port.device
        at = folder / "ports/1"
        _write(at, {"state": port.state, "link_layer": port.layer, "rate": port.rate})
        for index, kind, address in port.gids:
            _write(at / "gids", {str(index): address})
            _write(at / "gid_attrs/types", {str(index): kind})
            if port.netdev and port.layer == "Ethernet":
                _write(at / "gid_attrs/ndevs", {str(index): port.netdev})
        _write(at / "gids", {"200": "0000:0000:0000:0000:0000:0000:0000:0000"})  # an entry that is free
        _device(folder, port.driver)
        if port.netdev:
            (folder / "device/net" / port.netdev).mkdir(parents=True)
    if ports:
        (root / "dev/infiniband").mkdir(parents=True, exist_ok=True)
    return root


def _write(folder: Path, lines: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in lines.items():
        (folder / name).write_text(f"{value}\n")


def _device(folder: Path, driver: str) -> None:
    (folder / "device").mkdir(parents=True, exist_ok=True)
    if driver:
        (folder / "device/driver").symlink_to(f"/sys/bus/pci/drivers/{driver}")


def mapped(address: str) -> str:
    """An IPv4 address as the kernel writes it in a GID table."""
    a, b, c, d = (int(part) for part in address.split("."))
    return f"0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"


def pairs(*addresses: str, first: int = 0) -> list[tuple[int, str, str]]:
    """Each address as RoCE v1 and v2, as Mellanox's and Broadcom's drivers list them."""
    return [
        (first + 2 * number + version, (V1, V2)[version], address)
        for number, address in enumerate(addresses)
        for version in (0, 1)
    ]


LINK = "fe80:0000:0000:0000:{:04x}:c2ff:fe59:d868"


def mellanox(root: Path) -> Path:
    """RoCE, Mellanox: a front interface and eight for the GPUs (show_gids in sgl-project/sglang issue 4978)."""
    nics = [LO, Nic("xgbe0", "mlx5_core", speed=100_000), DOCKER]
    nics += [Nic(f"xgbe{n}", "mlx5_core", speed=400_000) for n in range(1, 9)]
    ports = [
        Port("mlx5_0", "mlx5_core", "100 Gb/sec (4X EDR)", "xgbe0", gids=pairs(LINK.format(0), mapped("10.63.65.208")))
    ]
    ports += [
        Port(
            f"mlx5_{n}",
            "mlx5_core",
            "400 Gb/sec (4X NDR)",
            f"xgbe{n}",
            gids=pairs(LINK.format(n), mapped(f"33.2.160.{16 * n}")),
        )
        for n in range(1, 9)
    ]
    return make(root, nics, ports)


def broadcom(root: Path) -> Path:
    """RoCE, Broadcom: names and the port that is down as in openucx/ucx issue 11048; a GID table of link-local and
    unique local IPv6 addresses alone, as in uccl-project/uccl pull request 803."""
    nics = [LO, Nic("eno1", "tg3", speed=1000)]
    nics += [Nic(f"enp{194 + n}s0f0np0", "bnxt_en", "down" if n == 8 else "up", speed=400_000) for n in range(9)]
    gids = [pairs(LINK.format(n), f"fd93:16d3:59b6:{n:04x}:8e84:74ff:fe1f:2550") for n in range(9)]
    states = ["4: ACTIVE"] * 8 + ["1: DOWN"]
    ports = [
        Port(f"bnxt_re{n}", "bnxt_en", "400 Gb/sec (4X NDR)", f"enp{194 + n}s0f0np0", state=states[n], gids=gids[n])
        for n in range(9)
    ]
    return make(root, nics, ports)


PENSANDO = (105, 121, 137, 153, 233, 249, 25, 9)  # PCI buses; the dump shows the first four


def pensando(root: Path) -> Path:
    """RoCE, AMD Pensando: entries of RoCE v2 alone; a front card with both (kvcache-ai/Mooncake issue 1617)."""
    nics = [LO, Nic("enp193s0f0np0", "bnxt_en", speed=100_000)]
    nics += [Nic(f"enp{bus}s0", "ionic", speed=400_000) for bus in PENSANDO]
    address = "{}:0690:81ff:fe39:e3e8"
    ports = [
        Port(
            f"rocep{bus}s0", "ionic", "400 Gb/sec (4X NDR)", f"enp{bus}s0",
            gids=[(0, V2, address.format("fe80:0:0:0")), (1, V2, address.format(f"fd93:16d3:59b6:{bus:04x}"))],
        )
        for bus in PENSANDO
    ]  # fmt: skip
    front = pairs("fe80:0000:0000:0000:7ec2:55ff:feba:ff88", mapped("10.235.200.207"))
    ports.append(Port("rocep193s0f0", "bnxt_en", "100 Gb/sec (4X EDR)", "enp193s0f0np0", gids=front))
    return make(root, nics, ports)


COMPUTE = {
    0: "ibp26s0", 3: "ibp60s0", 4: "ibp77s0", 5: "ibp94s0",
    6: "ibp156s0", 9: "ibp188s0", 10: "ibp204s0", 11: "ibp220s0",
}  # fmt: skip
FRONT = {1: "enp27s0f0np0", 2: "enp27s0f1np1", 7: "enp157s0f0np0", 8: "enp157s0f1np1"}


def infiniband(root: Path) -> Path:
    """InfiniBand without IP addresses, beside Ethernet ports of which two have a link (ibdev2netdev in
    imbue-ai/cluster-health issue 4): twelve devices, so that mlx5_1 is the beginning of mlx5_10 and mlx5_11."""
    linked = (1, 7)
    nics = [LO, *(Nic(name, "mlx5_core", "up" if n in linked else "down", speed=100_000) for n, name in FRONT.items())]
    nics += [Nic(name, "mlx5_core", "down", type=32) for name in COMPUTE.values()]
    ports = [
        Port(
            f"mlx5_{n}", "mlx5_core", "400 Gb/sec (4X NDR)", name, "InfiniBand",
            gids=[(0, V1, f"fe80:0000:0000:0000:9403:09b0:0087:{n:04x}")],
        )
        for n, name in COMPUTE.items()
    ]  # fmt: skip
    ports += [
        Port(
            f"mlx5_{n}", "mlx5_core", "100 Gb/sec (4X EDR)", name, state="4: ACTIVE" if n in linked else "1: DOWN",
            gids=pairs(LINK.format(n), mapped(f"10.0.7.{n}")),
        )
        for n, name in FRONT.items()
    ]  # fmt: skip
    return make(root, nics, ports)


def ethernet(root: Path) -> Path:
    """Ethernet alone: a bond of two ports, four that have no cable, Docker's bridge (`ip addr` in sgl-project/sglang
    issue 3514)."""
    nics = [LO, *(Nic(name, "bnxt_en", speed=25_000) for name in ("ens8f0np0", "ens8f1np1"))]
    nics += [Nic(f"ens16f{n}", "igb", "down") for n in range(4)]
    return make(root, [*nics, Nic("bond0", kind="bond", speed=50_000), DOCKER])


def vlans(root: Path) -> Path:
    """A bond with a VLAN over it and one over that, whose names it begins (ifconfig in NVIDIA/nccl issue 177)."""
    nics = [LO, Nic("eth0", "ixgbe", speed=10_000), Nic("bond0", kind="bond", speed=20_000)]
    return make(root, [*nics, Nic("bond0.2973", kind="vlan"), Nic("bond0.2973.1", kind="vlan")])


def bonded(root: Path) -> Path:
    """RDMA over bonds, the front one and the GPUs' of one kind (ibv_devinfo of mlx5_bond_0, NVIDIA/nccl issue 769)."""
    nics = [LO, *(Nic(f"bond{n}", kind="bond", speed=200_000) for n in range(5))]
    gids = [pairs(LINK.format(n), mapped(f"200.{n}.209.6")) for n in range(5)]
    ports = [Port(f"mlx5_bond_{n}", "mlx5_core", "200 Gb/sec (4X HDR)", f"bond{n}", gids=gids[n]) for n in range(5)]
    return make(root, nics, ports)


def pods(root: Path) -> Path:
    """A pod, whose entries begin where those of other pods end, at another index on each port (show_gids in
    NVIDIA/nccl issues 1538 and 890)."""
    ends = [Nic("eth0", kind="virtual", iflink=17), *(Nic(f"net{n}", kind="virtual", iflink=20 + n) for n in (1, 2))]
    gids = [pairs(LINK.format(n), mapped(f"10.156.12{n}.132"), first=4 + 4 * n) for n in range(2)]
    ports = [Port(f"mlx5_{n}", "mlx5_core", "200 Gb/sec (4X HDR)", f"net{n + 1}", gids=gids[n]) for n in range(2)]
    return make(root, [LO, *ends], ports)


TREES: dict[str, Callable[[Path], Path]] = {
    "mellanox": mellanox, "broadcom": broadcom, "pensando": pensando, "infiniband": infiniband, "ethernet": ethernet,
}  # fmt: skip
