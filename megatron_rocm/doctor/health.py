"""What the GPUs say of their own state, through AMD SMI or NVML where these are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rocm.doctor.finding import Finding, fine, warning
from megatron_rocm.doctor.patient import Patient

LIBRARIES = {
    "amd": ("amdsmi", "pip install /opt/rocm/share/amd_smi"),
    "nvidia": ("nvidia-ml-py", "pip install 'megatron-rocm[nvml]'"),
}
MUCH = 2 * 2**30  # bytes of GPU memory: drivers keep less for themselves
PENDING = 1  # AMD SMI's AmdSmiMemoryPageStatus.PENDING: a page that is retired at the next reset
# Held down by the power cap is how a busy GPU runs.
NO_FAULT = ("ppt_pwr",)


@dataclass(frozen=True)
class Fault:
    """One thing that can be wrong with a GPU: `of` says what is, or "". `mend` by vendor, {n} is the GPU's number."""

    name: str
    of: Callable[[dict[str, Any]], str]
    why: str
    mend: dict[str, str]


def _errors(gpu: dict[str, Any]) -> str:
    return f"{gpu['uncorrectable']} uncorrectable" if gpu.get("uncorrectable") else ""


def _pages(gpu: dict[str, Any]) -> str:
    if gpu.get("remap_failed"):
        return "a row could not be remapped"
    pending = (gpu.get("retired") or []).count(PENDING) + bool(gpu.get("remap_pending"))
    return "pages wait to be retired" if pending else ""


def _throttled(gpu: dict[str, Any]) -> str:
    return ", ".join(reason for reason in gpu.get("throttled") or () if reason not in NO_FAULT)


def _links(gpu: dict[str, Any]) -> str:
    if down := gpu.get("links_down"):
        return f"{down} of {down + gpu['links']} NVLinks are down"
    return "XGMI errors" if gpu.get("link_errors") else ""


def _used(gpu: dict[str, Any]) -> str:
    used = gpu.get("used") or 0
    return f"{used / 2**30:.0f} GiB in use" if used > MUCH else ""


FAULTS = (
    Fault("GPU memory errors", _errors, "values may be wrong, and a process that meets one is killed", {"amd": "drain the node, `sudo amd-smi reset --gpureset --gpu {n}`; again: replace the GPU", "nvidia": "drain the node, `sudo nvidia-smi --gpu-reset -i {n}`; again: replace the GPU"}),
    Fault("GPU memory pages", _pages, "errors come back until the page is out of use", {"amd": "reboot, or `sudo amd-smi reset --gpureset --gpu {n}`", "nvidia": "`sudo nvidia-smi --gpu-reset -i {n}`; where remapping failed, replace the GPU"}),
    Fault("GPU clocks", _throttled, "the GPU is slowed down, and all others wait for it in each step", {"amd": "cooling and power: `amd-smi metric --temperature --power`", "nvidia": "cooling and power: `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"}),
    Fault("GPU links", _links, "data between GPUs takes a longer or a slower way", {"amd": "`amd-smi xgmi`; reset the GPUs, else reseat the module", "nvidia": "`nvidia-smi nvlink --status`; is nvidia-fabricmanager running?"}),
    Fault("GPU memory in use", _used, "other processes are there: less memory and less speed for the run", {"amd": "`amd-smi process` shows whose", "nvidia": "`nvidia-smi` shows whose"}),
)  # fmt: skip


def checks(patient: Patient) -> Iterator[Finding]:
    """Each fault that any GPU has, or that there is none."""
    vendor = patient.whole.vendor
    if vendor == "cpu" or patient.wants_cpu:
        return
    library, get = LIBRARIES[vendor]
    told = patient.probe(vendor)
    if told.get("absent"):
        yield fine("GPU health", f"not asked: {library} is not installed (`{get}`)")
        return
    if "error" in told:
        yield warning(
            "GPU health", f"{library}: {told['error']}", "the GPUs' state is unknown", "`sudo dmesg` may say more"
        )
        return
    gpus = told["gpus"]
    sick = [finding for fault in FAULTS for finding in _found(fault, vendor, gpus)]
    yield from sick
    if not sick:
        asked = [name for name, keys in _ASKED if any(gpu.get(key) is not None for gpu in gpus for key in keys)]
        yield fine("GPU health", f"{len(gpus)} devices without a fault; they told of {', '.join(asked) or 'nothing'}")


_ASKED = (
    ("memory errors", ("uncorrectable",)),
    ("retired pages", ("retired", "remap_pending")),
    ("throttling", ("throttled",)),
    ("links", ("link_errors", "links")),
    ("memory in use", ("used",)),
)


def _found(fault: Fault, vendor: str, gpus: list[dict[str, Any]]) -> Iterator[Finding]:
    has = [(number, gpu, said) for number, gpu in enumerate(gpus) if (said := fault.of(gpu))]
    if has:
        listed = "; ".join(f"GPU {number} ({gpu['id']}): {said}" for number, gpu, said in has)
        numbers = ",".join(str(number) for number, _, _ in has)
        yield warning(fault.name, listed, fault.why, fault.mend[vendor].replace("{n}", numbers))
