"""Trees in the form of the kernel's for the machines that doctor knows, and what a library would say on each.

Figures are those of public dumps, named with each row. Nothing here was taken on hardware of ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_rocm.config.request import read
from megatron_rocm.doctor.patient import UNLIMITED, Patient, examine
from megatron_rocm.platform.settings import LIBRARY_PREFIXES

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """A machine of eight devices. `device_memory` in bytes, `driver` its kernel driver's version."""

    name: str
    vendor: str
    arch: str
    device_memory: int
    driver: str
    toolkit: str  # the ROCm or CUDA that torch was built for
    simds: int = 0
    hive: int = 8  # devices that XGMI links with each other
    capability: str = ""
    product: str = ""  # as the card's own memory has it


KINDS = {
    # ROCm/aiter issue 179 (rocminfo) and ROCm/rocm_smi_lib issue 160 (memory); links in hives of four as in
    # ROCm/k8s-device-plugin testdata/topo-mi210-xgmi-pcie.
    "mi250x": Kind("aldebaran", "amd", "gfx90a", 67092480 * 1024, "6.10.5", "6.3.42131", simds=440, hive=4),
    # ROCm/legacy-rocm-build issue 4414 (memory); fields as in ROCm/k8s-device-plugin testdata/topo-mi300-cpx.
    "mi300x": Kind(
        "ip discovery", "amd", "gfx942", 201310208 * 1024, "6.12.12", "6.4.43482", simds=1216,
        product="AMD Instinct MI300X OAM",
    ),
    # ROCm/rocm-systems pull request 10274, from rocprofiler-sdk's tests/data/topology.
    "mi355x": Kind("ip discovery", "amd", "gfx950", 309220868096, "6.14.14", "7.0.51831", simds=1024),
    # NVIDIA/deepops issue 1215.
    "a100": Kind("NVIDIA A100 80GB PCIe", "nvidia", "sm_80", 81920 * 2**20, "535.86.10", "12.4", capability="8.0"),
    # NVIDIA/nccl issue 1264.
    "h100": Kind("NVIDIA H100 80GB HBM3", "nvidia", "sm_90", 81559 * 2**20, "550.54.15", "12.4", capability="9.0"),
    # NVIDIA/TensorRT-LLM issue 10278.
    "b200": Kind("NVIDIA B200", "nvidia", "sm_100", 183359 * 2**20, "580.95.05", "13.0", capability="10.0"),
    "none": Kind("CPU", "cpu", "cpu", 0, "", ""),
}  # fmt: skip
VERSIONS = {"gfx90a": 90010, "gfx942": 90402, "gfx950": 90500}
DEVICES = 8
WELL = {"numa_balancing": "0", "nmi_watchdog": "0"}  # /proc/sys/kernel


def write(root: Path, files: Mapping[str, str]) -> None:
    """Files under `root` with their folders."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def tree(root: Path, kind: Kind, devices: int = DEVICES) -> dict[str, str]:
    """The machine under `root`, in order in each respect. Returns the environment in which it is looked at."""
    write(root, {
        "proc/meminfo": "MemTotal:       2097152000 kB",
        "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro pci=realloc=off iommu=pt",
        "proc/self/status": "Name:\tpython3\nSeccomp:\t0",
        **{f"proc/sys/kernel/{name}": value for name, value in WELL.items()},
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
        "sys/devices/system/cpu/cpu0/cpuidle/state2/disable": "1",
    })  # fmt: skip
    bins = root / "bin"
    bins.mkdir()
    if kind.vendor == "amd":
        _amd(root, kind, devices)
    if kind.vendor == "nvidia":
        _nvidia(root, bins, kind, devices)
    return {"PATH": f"{bins}:{os.defpath}", "HOME": str(root)}


def pci(number: int, vendor: str, kind: str) -> dict[str, str]:
    """A device on the PCI bus, of that vendor and class."""
    device = f"sys/bus/pci/devices/0000:{number:02x}:00.0"
    return {f"{device}/vendor": vendor, f"{device}/class": kind}


def _amd(root: Path, kind: Kind, devices: int) -> None:
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    write(nodes, {"0/properties": "cpu_cores_count 96\nsimd_count 0\ndrm_render_minor 0"})
    for device in range(devices):
        node = nodes / str(1 + device)
        write(node, {
            "name": kind.name,
            "properties": (
                f"cpu_cores_count 0\nsimd_count {kind.simds}\ngfx_target_version {VERSIONS[kind.arch]}\n"
                f"vendor_id 4098\ndrm_render_minor {128 + device}\nunique_id {16404946649897475633 + device}"
            ),
            "mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {kind.device_memory}\nflags 0",
            "io_links/0/properties": f"type 2\nnode_from {1 + device}\nnode_to 0",
        })  # fmt: skip
        write(root, {f"dev/dri/renderD{128 + device}": ""})
        if kind.product:
            write(root, {f"sys/class/drm/renderD{128 + device}/device/product_name": kind.product})
        # The class of MI60 (akash-network/provider-configs issue 40) and of MI325X (apache/cloudstack issue 11701).
        write(root, pci(device, "0x1002", "0x038000" if kind.arch == "gfx90a" else "0x120000"))
    for number, (one, other) in enumerate(combinations(range(1, 1 + devices), 2), 1):
        if (one - 1) // kind.hive == (other - 1) // kind.hive:
            write(nodes / str(one), {f"io_links/{number}/properties": f"type 11\nnode_from {one}\nnode_to {other}"})
    write(root, {"dev/kfd": "", "sys/module/amdgpu/version": kind.driver})
    if kind.arch != "gfx90a":
        card = "sys/class/drm/card1/device/current"
        write(root, {f"{card}_compute_partition": "SPX", f"{card}_memory_partition": "NPS1"})


def _nvidia(root: Path, bins: Path, kind: Kind, devices: int) -> None:
    rows = [f"GPU-{n}a, {kind.name}, {kind.device_memory // 2**20}, {kind.capability}" for n in range(devices)]
    listed = [f"GPU {n}: {kind.name} (UUID: GPU-{n}a)" for n in range(devices)]
    script = "\n".join(
        ["#!/bin/sh", "if [ \"$1\" = -L ]; then cat <<'E'", *listed, "E", "else cat <<'E'", *rows, "E", "fi"]
    )
    write(bins, {"nvidia-smi": script})
    (bins / "nvidia-smi").chmod(0o755)
    write(root, {
        "dev/nvidiactl": "", "dev/nvidia-uvm": "",
        # Both forms: nix-community/nixGL issue 186. Blackwell has the open one alone.
        "proc/driver/nvidia/version": (
            f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {kind.driver}  Release Build  (dvs-builder)"
            if kind.arch == "sm_100"
            else f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {kind.driver}  Thu Feb 22 2024"
        ),
    })  # fmt: skip
    for n in range(devices):
        write(root, pci(n, "0x10de", "0x030200"))


def probes(kind: Kind, devices: int = DEVICES, **changes: Any) -> dict[str, dict[str, Any]]:
    """What a process of its own would say on that machine in order; `changes` replaces whole answers."""
    amd, nvidia = kind.vendor == "amd", kind.vendor == "nvidia"
    torch = {
        "version": "2.8.0", "hip": kind.toolkit if amd else None, "cuda": kind.toolkit if nvidia else None,
        "devices": devices if amd or nvidia else 0,
        "architectures": ["gfx90a", "gfx942", "gfx950"] if amd else ["sm_80", "sm_90", "sm_100"] if nvidia else [],
        "collectives": "2.26.6",
    }  # fmt: skip
    amd_gpu = {"uncorrectable": 0, "retired": [], "throttled": [], "link_errors": 0, "used": 2**28}
    nvidia_gpu = {
        "uncorrectable": 0, "remap_pending": False, "remap_failed": False, "throttled": [], "links_down": 0,
        "links": 18, "used": 2**28,
    }  # fmt: skip
    answers = {
        "torch": torch,
        "transformer_engine": {"vital": [], "missing": []},
        "amd": {"gpus": [{"id": f"0000:{n:02x}:00.0", **amd_gpu} for n in range(devices)]},
        "nvidia": {"gpus": [{"id": f"GPU-{n}a", **nvidia_gpu} for n in range(devices)]},
    }
    return {**answers, **changes}


def patient(
    root: Path,
    kind: Kind,
    *words: str,
    devices: int = DEVICES,
    shared_memory: int | None = 64 * GIB,
    limits: Mapping[str, int] | None = None,
    said: Mapping[str, str] | None = None,
    answers: Mapping[str, dict[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Patient:
    """A patient whose machine is `kind`, for a run of those KEY=VALUE words. `environment`: a tree that is made."""
    where = tree(root, kind, devices) if environment is None else environment
    told = probes(kind, devices) if answers is None else answers
    request = read("llama3", [f"LOG_DIR={root / 'log'}", *words], said or {}, LIBRARY_PREFIXES)
    limits = limits or {"memlock": UNLIMITED, "nofile": 2**20}
    environment = {**where, **(said or {}), **request.exports}
    return examine(
        request, environment, root, shared_memory, limits, frozenset(os.getgroups()), os.geteuid(), told.__getitem__
    )
