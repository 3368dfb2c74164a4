"""Network interfaces, RDMA ports and what a run over several nodes would use."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rocm.doctor.finding import Finding, fine, problem, warning
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.errors import UsageError
from megatron_rocm.launch import preflight
from megatron_rocm.platform import network
from megatron_rocm.platform.network import Hca

# Kernel driver → the library that programs use it through, and its package. Without it NCCL and RCCL take TCP sockets.
PROVIDERS = {
    "mlx5_core": ("mlx5", "ibverbs-providers, or NVIDIA's DOCA-OFED"),
    "mlx5_ib": ("mlx5", "ibverbs-providers, or NVIDIA's DOCA-OFED"),
    "bnxt_en": ("bnxt_re", "Broadcom's libbnxt_re, of the version of the host's driver"),
    "bnxt_re": ("bnxt_re", "Broadcom's libbnxt_re, of the version of the host's driver"),
    "ionic": ("ionic", "AMD's libionic, of the version of the host's driver"),
    "ionic_rdma": ("ionic", "AMD's libionic, of the version of the host's driver"),
}


def checks(patient: Patient) -> Iterator[Finding]:
    """The network as it is, then what a run over several nodes makes of it."""
    yield _interfaces(patient)
    ports = network.hcas(patient.root)
    yield from _ports(patient, ports)
    yield from _providers(patient, ports)
    if patient.run and patient.nodes > 1:
        yield from _choice(patient)
    if patient.run and patient.run.launch.node_rank == 0:
        yield _master_port(patient.run.launch.master_port)


def _interfaces(patient: Patient) -> Finding:
    up = [one for one in network.interfaces(patient.root) if one.up and one.kind != "loopback"]
    shown = "; ".join(f"{one.name} ({one.kind}{_speed(one.speed)}) {' '.join(one.addresses)}".strip() for one in up)
    if up or patient.nodes == 1:
        return fine("interfaces", shown or "none is up; one node needs none")
    return problem(
        "interfaces", "none is up", "nodes can't reach each other",
        "start the container with --network host" if patient.container else "`ip link` shows what there is",
    )  # fmt: skip


def _speed(megabits: int) -> str:
    return f", {megabits / 1000:g} Gbit/s" if megabits > 0 else ""


def _ports(patient: Patient, ports: tuple[Hca, ...]) -> Iterator[Finding]:
    active = [port for port in ports if port.state == "ACTIVE"]
    if len(active) < len(ports):
        yield warning(
            "RDMA ports", f"{len(active)} of {len(ports)} are active; not: "
            + " ".join(f"{port.name}:{port.port} ({port.state})" for port in ports if port not in active),
            "the others carry the traffic of all", "check cables and switch; `rdma link` shows the state",
        )  # fmt: skip
    elif ports:
        layers = "/".join(sorted({"RoCE" if port.link_layer == "Ethernet" else port.link_layer for port in ports}))
        yield fine(
            "RDMA ports", f"{len(ports)} active, {layers}: {' '.join(f'{one.name}:{one.port}' for one in ports)}"
        )
    elif patient.nodes > 1 and patient.machine.vendor != "cpu":
        yield warning(
            "RDMA ports", "none", "gradients between nodes go through TCP sockets, a tenth of the speed",
            "start the container with --device /dev/infiniband --network host" if patient.container
            else "install the network card's RDMA driver",
        )  # fmt: skip
    else:
        yield fine("RDMA ports", "none")


def _providers(patient: Patient, ports: tuple[Hca, ...]) -> Iterator[Finding]:
    """The user-space half of each RDMA driver: a container has its own, or none."""
    for driver in sorted({port.driver for port in ports} & PROVIDERS.keys()):
        name, package = PROVIDERS[driver]
        if not any((patient.root / folder / f"{name}.driver").exists() for folder in _PROVIDER_FOLDERS):
            yield warning(
                "RDMA library", f"{name}.driver is missing in /etc/libibverbs.d, for the kernel's {driver}",
                "libibverbs does not know the card: NCCL and RCCL take TCP sockets, or hang", f"install {package}",
            )  # fmt: skip


_PROVIDER_FOLDERS = ("etc/libibverbs.d", "usr/local/etc/libibverbs.d")


def _choice(patient: Patient) -> Iterator[Finding]:
    assert patient.run
    try:
        chosen = network.choose(patient.run, patient.machine, patient.environment, patient.root, patient.route)
    except UsageError as error:
        yield problem("network", str(error), "nodes can't reach each other over what was said", "see docs/network.md")
        return
    for name, (value, why) in chosen.items():
        yield fine(name, f"{value or 'unset'}: {why}")


def _master_port(port: int) -> Finding:
    try:
        preflight.check_port(port, patience=0)
    except UsageError as error:
        return warning("MASTER_PORT", str(error), "a run that starts now would end at once")
    return fine("MASTER_PORT", f"{port} is free")
