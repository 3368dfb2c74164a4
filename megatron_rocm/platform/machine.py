"""What there is: vendor, architecture, GPUs and their memory, host memory and cores, found without importing torch.

AMD GPUs are read from the kernel driver's topology (`/sys/class/kfd`), where each partition of a GPU in CPX or DPX
mode is a node of its own with its own memory; NVIDIA's from `nvidia-smi`. The visible-devices masks are applied in
the runtimes' own order.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_rocm.errors import UsageError

GIB = 2**30

Vendor = Literal["amd", "nvidia", "cpu"]
Tier = Literal["torch", "te"]


@dataclass(frozen=True)
class Gpu:
    """One device a process can use. Memory in bytes."""

    memory: int
    name: str = ""
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """One node. `gpus` are those that a new process would see; memory in bytes."""

    name: str
    vendor: Vendor
    arch: str
    gpus: tuple[Gpu, ...]
    host_memory: int
    cores: int
    tier: Tier
    partition: str = ""  # AMD's compute and memory partition modes, where the driver tells
    is_here: bool = True  # False: a TARGET that this process does not run on
    hides_gpus: bool = False  # TARGET=cpu: GPUs that may be here are left alone

    @property
    def gpu_memory(self) -> int:
        """Bytes of the smallest GPU; on a CPU the node's memory."""
        return min((gpu.memory for gpu in self.gpus), default=self.host_memory)


@dataclass(frozen=True)
class Target:
    """A node of eight devices as vendors sell it. Memory in bytes per device, as its driver reports it."""

    name: str
    vendor: Vendor
    arch: str
    memory: int
    tier: Tier = "te"


# Memory: AMD's and NVIDIA's data sheets; an MI250X is two devices of 64 GiB each. Transformer Engine's attention
# kernels are not built for gfx90a (ROCm/TransformerEngine issue 439), so an MI250X trains with torch alone.
TARGETS = {
    "mi250x": Target("AMD Instinct MI250X", "amd", "gfx90a", 64 * GIB, tier="torch"),
    "mi300x": Target("AMD Instinct MI300X", "amd", "gfx942", 192 * GIB),
    "mi325x": Target("AMD Instinct MI325X", "amd", "gfx942", 256 * GIB),
    "mi355x": Target("AMD Instinct MI355X", "amd", "gfx950", 288 * GIB),
    "a100": Target("NVIDIA A100 80GB", "nvidia", "sm_80", 80 * GIB),
    "h100": Target("NVIDIA H100 80GB", "nvidia", "sm_90", 80 * GIB),
    "h200": Target("NVIDIA H200", "nvidia", "sm_90", 141 * 10**9),
    "b200": Target("NVIDIA B200", "nvidia", "sm_100", 180 * 10**9),
}
GPUS_PER_TARGET = 8
TARGET_HOST_MEMORY = 2048 * GIB
TARGET_CORES = 128


def find(target: str = "", environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Machine:
    """The machine named by `target`, or this one. Raises UsageError for an unknown target."""
    if not target:
        return detect(environment, root)
    if target == "cpu":
        here = detect(environment, root)
        return replace(here, name="CPU", vendor="cpu", arch="cpu", gpus=(), tier="torch", hides_gpus=True)
    if target not in TARGETS:
        raise UsageError(f"TARGET={target}: no such machine; choose one of {', '.join([*TARGETS, 'cpu'])}")
    kind = TARGETS[target]
    gpus = (Gpu(kind.memory, kind.name),) * GPUS_PER_TARGET
    return Machine(
        kind.name, kind.vendor, kind.arch, gpus, TARGET_HOST_MEMORY, TARGET_CORES, kind.tier, is_here=False
    )  # fmt: skip


def detect(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Machine:
    """This machine, with the visible-devices masks of `environment` applied. `root` holds sys/ and proc/."""
    memory, cores = _host_memory(root), _cores()
    amd = _amd_gpus(root)
    if amd:
        gpus, arch = amd
        gpus = _masked(gpus, environment.get("ROCR_VISIBLE_DEVICES"))
        # HIP renumbers what ROCr leaves, takes CUDA's name for the same mask, and takes an empty one for none.
        gpus = _masked(gpus, environment.get("HIP_VISIBLE_DEVICES") or environment.get("CUDA_VISIBLE_DEVICES") or None)
        if gpus:
            tier = _tier(arch)
            return Machine(gpus[0].name, "amd", arch, gpus, memory, cores, tier, partition=_partition(root))
    nvidia = _nvidia_gpus(environment)
    if nvidia:
        gpus, arch = nvidia
        gpus = _masked(gpus, environment.get("CUDA_VISIBLE_DEVICES"))
        if gpus:
            return Machine(gpus[0].name, "nvidia", arch, gpus, memory, cores, _tier(arch))
    return Machine("CPU", "cpu", "cpu", (), memory, cores, "torch")


def _tier(arch: str) -> Tier:
    missing = arch == "gfx90a" or importlib.util.find_spec("transformer_engine") is None
    return "torch" if missing else "te"


def _amd_gpus(root: Path) -> tuple[tuple[Gpu, ...], str] | None:
    """GPUs of the KFD topology: nodes with compute units. Source: Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c."""
    found, arch = [], ""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    for node in sorted(nodes, key=lambda path: int(path.name)):
        properties = _properties(node / "properties")  # empty where this container may not read the node
        if not properties.get("simd_count"):
            continue
        version = properties.get("gfx_target_version", 0)
        arch = arch or f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        banks = [_properties(bank / "properties") for bank in node.glob("mem_banks/[0-9]*")]
        # Heap types 1 and 2 are the GPU's own memory (HSA_HEAPTYPE_FRAME_BUFFER_PUBLIC and _PRIVATE).
        memory = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2))
        found.append(Gpu(memory, _amd_name(root, node, properties, arch), f"GPU-{properties.get('unique_id', 0):016x}"))
    return (tuple(found), arch) if found else None


def _amd_name(root: Path, node: Path, properties: Mapping[str, int], arch: str) -> str:
    """What its maker calls it, where the card's memory tells (product_name, Linux Documentation/gpu/amdgpu).

    Else the driver's code name; newer chips have none ("ip discovery"), only an architecture.
    """
    card = root / f"sys/class/drm/renderD{properties.get('drm_render_minor', 0)}/device"
    code = text(node / "name")
    product = text(card / "product_name") or ("" if code == "ip discovery" else code) or arch
    return product if product.startswith("AMD") else f"AMD {product}"


def _properties(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def xgmi_pairs(root: Path = Path("/")) -> tuple[int, int]:
    """Pairs of AMD GPUs (or partitions) that XGMI links, and all pairs, from the KFD topology.

    Link type 11 is XGMI (HSA_IOLINKTYPE_XGMI in Linux drivers/gpu/drm/amd/amdkfd/kfd_crat.h).
    """
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    gpus = {int(node.name): node for node in nodes if _properties(node / "properties").get("simd_count")}
    linked = set()
    for number, node in gpus.items():
        for link in node.glob("io_links/[0-9]*/properties"):
            properties = _properties(link)
            if properties.get("type") == 11 and properties.get("node_to") in gpus:
                linked.add(frozenset((number, properties["node_to"])))
    return len(linked), len(gpus) * (len(gpus) - 1) // 2


def render_devices(root: Path = Path("/")) -> tuple[str, ...]:
    """Names under /dev/dri of the AMD GPUs that this container may read, from the KFD topology."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*/properties")
    minors = {properties.get("drm_render_minor", 0) for properties in map(_properties, nodes)}
    return tuple(f"renderD{minor}" for minor in sorted(minors) if minor)


# PCI vendor → its classes of compute devices: 3D and display controllers without a monitor, processing accelerators.
_ACCELERATORS = {"0x1002": ("0x0380", "0x1200"), "0x10de": ("0x0302",)}
_VENDORS: dict[str, Vendor] = {"0x1002": "amd", "0x10de": "nvidia"}


def accelerators(root: Path = Path("/")) -> dict[Vendor, int]:
    """Vendor → compute devices on the PCI bus, whether or not a driver or a container lets them be used."""
    found: dict[Vendor, int] = {}
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor = text(device / "vendor")
        if text(device / "class")[:6] in _ACCELERATORS.get(vendor, ()):
            found[_VENDORS[vendor]] = found.get(_VENDORS[vendor], 0) + 1
    return found


def driver(vendor: Vendor, root: Path = Path("/")) -> str:
    """The kernel driver's version; "" where there is none, or it is the kernel's own and has no number."""
    if vendor == "amd":
        return text(root / "sys/module/amdgpu/version")
    said = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", text(root / "proc/driver/nvidia/version"))
    return said[1] if vendor == "nvidia" and said else ""


def _partition(root: Path) -> str:
    for device in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        modes = [text(device / f"current_{what}_partition") for what in ("compute", "memory")]
        if all(modes):
            return "/".join(modes)
    return ""


def _nvidia_gpus(environment: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str] | None:
    """GPUs that nvidia-smi lists, MIG instances in the place of the GPU that is divided into them."""
    listed = _output(
        environment, "nvidia-smi", "--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"
    )
    found, arch = [], ""
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or not parts[2].isdigit():
            continue
        arch = arch or f"sm_{parts[3].replace('.', '')}"
        found.append(Gpu(int(parts[2]) * 2**20, parts[1], parts[0]))
    if not found:
        return None
    return tuple(_with_mig(found, _output(environment, "nvidia-smi", "-L"))), arch


def _with_mig(gpus: list[Gpu], listing: str) -> list[Gpu]:
    """Put the MIG instances of `nvidia-smi -L` where their GPU stood; `1g.10gb` names the memory of one."""
    by_uuid: dict[str, list[Gpu]] = {}
    current = ""
    for line in listing.splitlines():
        if gpu := re.search(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)", line):
            current = gpu[1]
        elif mig := re.search(r"MIG \S*?\.(\d+)gb.*\(UUID:\s*(MIG-[^)]+)\)", line):
            by_uuid.setdefault(current, []).append(Gpu(int(mig[1]) * 10**9, line.strip().split(" Device")[0], mig[2]))
    return [instance for gpu in gpus for instance in by_uuid.get(gpu.uuid, [gpu])]


def _masked(gpus: tuple[Gpu, ...], mask: str | None) -> tuple[Gpu, ...]:
    """What a visible-devices mask of numbers or UUID beginnings leaves; as for the runtimes, it ends at a wrong one."""
    if mask is None:
        return gpus
    left: list[Gpu] = []
    for entry in (entry.strip() for entry in mask.split(",")):
        if entry.isdigit():
            match = gpus[int(entry) : int(entry) + 1]
        else:
            match = tuple(gpu for gpu in gpus if entry and gpu.uuid.lower().startswith(entry.lower()))
        if len(match) != 1 or match[0] in left and gpus.count(match[0]) == 1:
            break
        left += match
    return tuple(left)


def _output(environment: Mapping[str, str], *command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, env={"PATH": os.defpath, **environment}, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _host_memory(root: Path) -> int:
    """Bytes of memory this process may use: the machine's, or its control group's where that is less."""
    total = re.search(r"MemTotal:\s+(\d+) kB", text(root / "proc/meminfo"))
    limits = [int(total[1]) * 1024] if total else []
    for group in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = text(root / group)
        if limit.isdigit():
            limits.append(int(limit))
    return min(limits, default=0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text(path: Path) -> str:
    """A file's content without the space around it, "" where it can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
