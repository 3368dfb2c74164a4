"""Settings of the host's kernel that vendors ask for, each with the command that sets it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_rocm.doctor.finding import Finding, fine, warning
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.platform.machine import Vendor

_AMD = "ROCm/amdgpu-docs docs/system-optimization/mi300x.rst"
_SLURM = "ROCm/Megatron-LM examples/llama/train_llama_slurm.sh"


@dataclass(frozen=True)
class Tunable:
    """One setting: where its value stands (a file, or the first of a pattern), which values are good, what sets it.

    A `*` in `path` stands for every file there: all must be good. A missing file is no finding: the kernel of this
    machine has no such setting, or a container hides it.
    """

    name: str
    path: str
    good: Callable[[str], bool]
    why: str
    mend: str
    source: str
    vendors: tuple[Vendor, ...] = ("amd", "nvidia")


def _is(*values: str) -> Callable[[str], bool]:
    return lambda said: said in values


def _chosen(*values: str) -> Callable[[str], bool]:
    """One of `values` in brackets, as in `always [madvise] never`."""
    return lambda said: bool(re.search(rf"\[({'|'.join(values)})\]", said))


def _says(*words: str) -> Callable[[str], bool]:
    return lambda said: any(word in said.split() for word in words)


TUNABLES = (
    Tunable("numa_balancing", "proc/sys/kernel/numa_balancing", _is("0"), "the kernel moves pages between memory nodes and stalls GPU work meanwhile", "sudo sysctl -w kernel.numa_balancing=0", _AMD),
    Tunable("governor", "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor", _is("performance"), "cores that launch kernels slow down between launches", "sudo cpupower frequency-set -g performance", _SLURM, ("amd", "nvidia", "cpu")),
    Tunable("transparent_hugepage", "sys/kernel/mm/transparent_hugepage/enabled", _chosen("always", "madvise"), "host memory in small pages costs time to map and to pin", "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled", _SLURM, ("amd", "nvidia", "cpu")),
    Tunable("nmi_watchdog", "proc/sys/kernel/nmi_watchdog", _is("0"), "the watchdog interrupts every core", "sudo sysctl -w kernel.nmi_watchdog=0", _SLURM),
    Tunable("idle state C2", "sys/devices/system/cpu/cpu[0-9]*/cpuidle/state2/disable", _is("1"), "cores that sleep deeply answer GPUs and network cards late", "sudo cpupower idle-set -d 2", _AMD, ("amd",)),
    Tunable("iommu", "proc/cmdline", _says("iommu=pt", "iommu=off", "amd_iommu=off", "intel_iommu=off"), "the IOMMU translates every transfer between GPUs and network cards", "add iommu=pt to GRUB_CMDLINE_LINUX in /etc/default/grub, then `sudo update-grub` and reboot", _AMD, ("amd",)),
    Tunable("pci realloc", "proc/cmdline", _says("pci=realloc=off"), "the kernel may take the GPUs' large memory windows away", "add pci=realloc=off to GRUB_CMDLINE_LINUX in /etc/default/grub, then `sudo update-grub` and reboot", _AMD, ("amd",)),
)  # fmt: skip


def checks(patient: Patient) -> Iterator[Finding]:
    """What each tunable of this vendor is set to."""
    for tunable in TUNABLES:
        if patient.machine.vendor in tunable.vendors and (said := _values(patient, tunable.path)):
            wrong = [value for value in said if not tunable.good(value)]
            shown = "absent" if tunable.path == "proc/cmdline" else ", ".join(sorted(set(wrong)))
            if wrong:
                yield warning(tunable.name, shown, tunable.why, tunable.mend)
            else:
                yield fine(tunable.name, "set" if tunable.path == "proc/cmdline" else said[0])


def _values(patient: Patient, path: str) -> list[str]:
    return [
        said for file in sorted(patient.root.glob(path)) if (said := patient.text(str(file.relative_to(patient.root))))
    ]
