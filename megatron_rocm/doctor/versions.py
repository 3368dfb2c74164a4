"""The libraries: which are here, and whether they fit each other, the driver and the GPUs."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Iterator
from typing import Any

from megatron_rocm.doctor.finding import Finding, fine, problem, warning
from megatron_rocm.doctor.patient import Patient
from megatron_rocm.launch import preflight
from megatron_rocm.platform import machine

# Distribution → the least version and the first that is too new, None for no such bound. As in pyproject.toml, but for
# Transformer Engine, whose numbers on ROCm are AMD's own: its symbols are compared instead.
BOUNDS: dict[str, tuple[str, str | None]] = {
    "megatron-core": ("0.16.1", "0.17"),
    "transformers": ("4.51", None),
    "flash-attn": ("2.7", None),
}
TORCH = ("2.6", None)
OPTIONAL = ("flash-attn",)

# CUDA's major version → the least driver. https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {11: 450, 12: 525, 13: 580}
# amdgpu's own version, as in /sys/module/amdgpu/version → the ROCm release that it came with. AMD has tested a driver
# with two releases after its own, and up to four before. Source: "User and kernel-space support matrix" of ROCm's
# installation guide, and ROCm/amdgpu-docs docs/compatibility/compatibility-matrix.rst.
ROCM_RELEASES = ("6.0", "6.1", "6.2", "6.3", "6.4", "7.0", "7.1", "7.2")
AMDGPU = {"6.3": "6.0", "6.7": "6.1", "6.8": "6.2", "6.10": "6.3", "6.12": "6.4", "6.14": "7.0", "6.16": "7.1"}
TESTED = range(-4, 3)  # releases from the driver's own

GET_TORCH = {
    "amd": "use the image of Dockerfile.rocm, or `make venv TORCH_INDEX_URL=…` with torch's index for ROCm",
    "nvidia": "use the image of Dockerfile.cuda, or `make venv TORCH_INDEX_URL=…` with torch's index for CUDA",
    "cpu": "`make venv`, or pip install torch",
}  # fmt: skip


def checks(patient: Patient) -> Iterator[Finding]:
    """Python, torch against GPUs and driver, then what is trained with."""
    yield fine("Python", platform.python_version())
    torch = patient.probe("torch")
    yield from _torch(patient, torch)
    for module, way_out in preflight.NEEDED:
        if module != "torch" and not preflight.importable(module):
            yield problem(module, "not installed", "workers import it", way_out)
    for name, (least, most) in BOUNDS.items():
        yield from _bounded(patient, name, least, most)
    if "error" not in torch:  # or Transformer Engine, which imports it, would only fail, or hang, once more
        yield from _transformer_engine(patient)


def _torch(patient: Patient, told: dict[str, Any]) -> Iterator[Finding]:
    mend = GET_TORCH[patient.machine.vendor]
    if told.get("absent"):
        yield problem("torch", "not installed", "nothing runs without it", mend)
        return
    if "error" in told:
        yield problem("torch", f"installed, but broken: {told['error']}", "nothing runs without it", mend)
        return
    built = f"ROCm {told['hip']}" if told["hip"] else f"CUDA {told['cuda']}" if told["cuda"] else "the CPU"
    collectives = f", {'RCCL' if told['hip'] else 'NCCL'} {told['collectives']}" if told.get("collectives") else ""
    found = f"{told['version']}, built for {built}, sees {told['devices']} GPUs{collectives}"
    if not _between(told["version"], *TORCH):
        yield warning("torch", found, f"this package is written for torch {TORCH[0]} and later", mend)
    elif wrong := _misfit(patient, told):
        yield problem("torch", found, *wrong)
    else:
        yield fine("torch", found)
    yield from _driver(patient, told)


def _misfit(patient: Patient, told: dict[str, Any]) -> tuple[str, str] | None:
    """Why this torch can't use the machine's GPUs and what to do; None where it can."""
    here = patient.machine
    if patient.wants_cpu:
        return None
    if here.vendor == "cpu":
        seen = "torch sees a GPU that neither /sys/class/kfd nor nvidia-smi shows: a run refuses to choose"
        return (seen, "make these readable here, or set TARGET=cpu") if told["devices"] else None
    wanted = patient.run.parallel.gpus_per_node if patient.run else len(here.gpus)
    if told["devices"] < wanted:
        return f"{wanted} are to be used here", GET_TORCH[here.vendor]
    if told["architectures"] and not has_kernels(here.arch, told["architectures"]):
        built = " ".join(told["architectures"])
        return f"it has kernels for {built}, none for {here.arch}", GET_TORCH[here.vendor]
    return None


def has_kernels(arch: str, built: list[str]) -> bool:
    """Whether a torch whose get_arch_list() is `built` runs on `arch`.

    AMD's code is for one architecture. NVIDIA's runs on later minor versions of its major (sm_80 on sm_86), but not
    that for an architecture's own features (sm_90a), and PTX (compute_90) on all that is later.
    """
    if arch.startswith("gfx"):
        return arch in {name.split(":")[0] for name in built}  # gfx90a:sramecc+:xnack-
    ours = _capability(arch)
    for name in built:
        kind, major, minor, only = _capability(name)
        if only == "a" and (major, minor) == ours[1:3]:
            return True
        if not only and kind == "compute" and (major, minor) <= ours[1:3]:
            return True
        if only != "a" and kind == "sm" and major == ours[1] and minor <= ours[2]:
            return True
    return False


def _capability(name: str) -> tuple[str, int, int, str]:
    """("sm" or "compute", major, minor, "" or the suffix a or f)."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    return (match[1], int(match[2]), int(match[3]), match[4]) if match else ("", 0, 0, "")


def _driver(patient: Patient, told: dict[str, Any]) -> Iterator[Finding]:
    vendor = patient.whole.vendor
    if vendor == "cpu" or patient.wants_cpu:
        return
    version = machine.driver(vendor, patient.root)
    if not version:
        yield fine("driver", "amdgpu of the kernel itself, without a number" if vendor == "amd" else "version unknown")
    elif vendor == "nvidia" and told["cuda"] and _numbers(version)[0] < DRIVERS.get(_numbers(told["cuda"])[0], 0):
        least = DRIVERS[_numbers(told["cuda"])[0]]
        text = f"{version}, older than the {least} that CUDA {told['cuda']} asks for"
        if told["devices"]:  # NVIDIA's forward compatibility package is installed
            yield fine("driver", f"{text}; torch sees GPUs all the same")
        else:
            yield problem(
                "driver", text, "torch sees no GPU", f"install a driver {least} or later, or torch for an older CUDA"
            )
    elif vendor == "amd" and told["hip"] and not known_to_fit(version, told["hip"]):
        yield warning(
            "driver", f"amdgpu {version}, of ROCm {_release_of(version)}; torch has ROCm {told['hip']}",
            "AMD has not tested them with each other: errors may be silent or late",
            "install the amdgpu driver of the ROCm that torch was built for, or a torch for the driver's ROCm",
        )  # fmt: skip
    else:
        yield fine("driver", version)


def known_to_fit(driver: str, hip: str) -> bool:
    """Whether AMD tests the amdgpu driver with that ROCm; also where either is too new for the table."""
    of, release = _release_of(driver), ".".join(hip.split(".")[:2])
    if of not in ROCM_RELEASES or release not in ROCM_RELEASES:
        return True
    return ROCM_RELEASES.index(release) - ROCM_RELEASES.index(of) in TESTED


def _release_of(driver: str) -> str:
    return AMDGPU.get(".".join(driver.split(".")[:2]), "")


def _bounded(patient: Patient, name: str, least: str, most: str | None) -> Iterator[Finding]:
    version = patient.installed(name)
    asked = f"{least} or later" + (f", before {most}" if most else "")
    if not version:
        if name not in OPTIONAL and name.replace("-", ".") not in [module for module, _ in preflight.NEEDED]:
            yield warning(name, "not installed", "tokenizers and conversions need it", f"pip install '{name}>={least}'")
        elif name in OPTIONAL and patient.machine.vendor != "cpu":
            yield fine(name, "not installed; torch's and Transformer Engine's own attention kernels do without it")
    elif not _between(version, least, most):
        upper = f",<{most}" if most else ""
        yield warning(name, version, f"this package is written for {asked}", f"pip install '{name}>={least}{upper}'")
    else:
        yield fine(name, version)


def _transformer_engine(patient: Patient) -> Iterator[Finding]:
    """What megatron-core calls of it, not its number: AMD's numbers are not NVIDIA's."""
    if patient.machine.vendor == "cpu" or importlib.util.find_spec("transformer_engine") is None:
        return  # the tier says so
    told = patient.probe("transformer_engine")
    version = patient.installed("transformer-engine") or "of unknown version"
    used = patient.machine.tier == "te"
    judge = problem if used else warning
    why = "this machine's tier trains with it" if used else "it can't be used"
    mend = "install a build for this torch, or uninstall it to train with torch alone: docs/transformer_engine.md"
    if "error" in told:
        yield judge("Transformer Engine", f"{version}, but broken: {told['error']}", why, mend)
        return
    if told["vital"]:
        yield judge("Transformer Engine", f"{version}; it lacks: {'; '.join(told['vital'])}", why, mend)
    if told["missing"]:
        yield warning(
            "Transformer Engine", f"{version}; it lacks: {'; '.join(told['missing'])}",
            "a run that uses it fails", "choose a version from docs/transformer_engine.md",
        )  # fmt: skip
    if not told["vital"] and not told["missing"]:
        yield fine("Transformer Engine", f"{version}; it has all that megatron-core calls")


def _between(version: str, least: str, most: str | None) -> bool:
    return _numbers(version) >= _numbers(least) and (most is None or _numbers(version) < _numbers(most))


def _numbers(version: str) -> tuple[int, ...]:
    """The release number: (2, 13, 0) of 2.13.0a0+git1."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)
