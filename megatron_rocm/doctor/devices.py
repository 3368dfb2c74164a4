"""The machine and its GPUs: what it is, which tier it gets and why, masks, partitions, links between GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megatron_rocm.doctor.finding import Finding, fine, problem, warning
from megatron_rocm.doctor.patient import MASKS, Patient
from megatron_rocm.platform import machine
from megatron_rocm.platform.machine import GIB

NAMES = {"amd": "AMD", "nvidia": "NVIDIA"}
# What lets a container use each vendor's GPUs, and what lets a host do so.
IN_CONTAINER = {
    "amd": "start the container with --device /dev/kfd --device /dev/dri",
    "nvidia": "start the container with --gpus all (Docker) or --device nvidia.com/gpu=all (podman)",
}
ON_HOST = {
    "amd": "install the amdgpu driver (ROCm's installation guide), then `sudo modprobe amdgpu`",
    "nvidia": "install NVIDIA's driver with nvidia-smi, then run `nvidia-smi`",
}

# Sold as platforms in which each GPU has a link to every other.
MESHED = ("gfx942", "gfx950")


def checks(patient: Patient) -> Iterator[Finding]:
    """What the machine is."""
    yield _what(patient)
    yield _tier(patient)
    if patient.wants_cpu:
        return
    yield from _unusable(patient)
    yield from _masks(patient)
    yield from _partitions(patient)
    yield from _links(patient)


def _what(patient: Patient) -> Finding:
    here = patient.machine
    memory = f"{here.host_memory / GIB:.0f} GiB of host memory, {here.cores} cores"
    if here.vendor == "cpu":
        return fine("machine", f"no GPU is used: {memory}")
    kinds = {(gpu.name, gpu.memory) for gpu in here.gpus}
    gpus = "; ".join(
        f"{sum((gpu.name, gpu.memory) == kind for gpu in here.gpus)} × {kind[0]} with {kind[1] / GIB:.1f} GiB"
        for kind in sorted(kinds)
    )
    if len(kinds) > 1:
        return warning(
            "machine", f"{gpus} ({here.arch}); {memory}", "every process gets the same share: the smallest GPU decides",
            "keep to GPUs of one kind with HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return fine("machine", f"{gpus} ({here.arch}); {memory}")


def _tier(patient: Patient) -> Finding:
    here = patient.machine
    if here.tier == "te":
        return fine("tier", "Transformer Engine: it is installed, and has attention kernels for this architecture")
    if here.vendor == "cpu":
        return fine("tier", "torch only: Transformer Engine needs a GPU")
    if here.arch == "gfx90a":
        return fine("tier", "torch only: Transformer Engine has no attention kernels for gfx90a")
    if importlib.util.find_spec("transformer_engine") is None:
        return warning(
            "tier", "torch only: Transformer Engine is not installed", "fused layers are what makes a step short",
            "use the image of Dockerfile.rocm, which has AMD's build" if here.vendor == "amd"
            else "pip install --no-build-isolation 'megatron-rocm[te]'",
        )  # fmt: skip
    return fine("tier", "torch only")


def _unusable(patient: Patient) -> Iterator[Finding]:
    """GPUs on the PCI bus that no process here can use: a run would go to the CPU without a word."""
    if patient.whole.vendor != "cpu":
        return
    for vendor, count in machine.accelerators(patient.root).items():
        yield problem(
            "unused GPUs",
            f"{count} {NAMES[vendor]} GPU{'s' * (count > 1)} on the PCI bus that can't be used from here",
            "a run would train on the CPU",
            f"{(IN_CONTAINER if patient.container else ON_HOST)[vendor]}; TARGET=cpu leaves GPUs alone",
        )


def _masks(patient: Patient) -> Iterator[Finding]:
    said = {name: patient.environment[name] for name in MASKS if name in patient.environment}
    if not said or not patient.whole.gpus:
        return
    masks = " ".join(f"{name}={value}" for name, value in said.items())
    has, left = len(patient.whole.gpus), len(patient.machine.gpus)
    if not left:
        yield problem(
            "masks", f"{masks} leaves none of {has} GPUs", "a run would train on the CPU", f"unset {' '.join(said)}"
        )
    elif left < has:
        yield warning(
            "masks", f"{masks} leaves {left} of {has} GPUs", "the others do nothing", f"unset {' '.join(said)}"
        )
    else:
        yield fine("masks", f"{masks} leaves all {has} GPUs")


def _partitions(patient: Patient) -> Iterator[Finding]:
    here = patient.machine
    mig = sum("MIG " in gpu.name for gpu in here.gpus)
    if mig:
        yield warning(
            "partitions", f"{mig} of {len(here.gpus)} devices are MIG instances",
            "a process can use one instance alone, and instances have no links to each other",
            "sudo nvidia-smi -mig 0",
        )  # fmt: skip
    compute, _, memory = here.partition.partition("/")
    if here.partition and (compute, memory) != ("SPX", "NPS1"):
        yield warning(
            "partitions", f"compute {compute}, memory {memory}: {len(here.gpus)} devices of "
            f"{here.gpu_memory / GIB:.0f} GiB",
            "training a large model wants whole GPUs: a partition has a part of the compute units and of the memory",
            "sudo amd-smi set --gpu all --compute-partition SPX && sudo amd-smi set --memory-partition NPS1",
        )  # fmt: skip
    elif here.partition:
        yield fine("partitions", f"compute {compute}, memory {memory}: whole GPUs")


def _links(patient: Patient) -> Iterator[Finding]:
    if patient.whole.vendor != "amd" or len(patient.whole.gpus) < 2:
        return
    linked, pairs = machine.xgmi_pairs(patient.root)
    if linked == pairs:
        yield fine("links", f"XGMI between all {len(patient.whole.gpus)} devices")
    elif patient.whole.arch not in MESHED:
        yield fine("links", f"XGMI between {linked} of {pairs} pairs of devices")
    else:
        yield warning(
            "links", f"XGMI links {linked} of {pairs} pairs of devices", "the other pairs exchange data over PCIe",
            "`amd-smi topology` shows which: on a platform with a full mesh of GPUs, reseat or replace the module",
        )  # fmt: skip
