"""`python -m megatron_rocm.doctor.probe WHAT`: asks a library that may hang or crash, and prints one line of JSON.

In a process of its own: what a broken driver takes down is then this process alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from megatron_rocm.platform.process import die_with_parent

Asked = dict[str, Any]

# Most NVLinks that a GPU has (NVML_NVLINK_MAX_LINKS); 18 on Hopper and Blackwell, and NVML refuses to tell of the rest.
NVLINKS = 36


def torch() -> Asked:
    """Version, what it was built for, and the devices it sees."""
    import torch as library

    answer: Asked = {
        "version": library.__version__,
        "hip": library.version.hip,
        "cuda": library.version.cuda,
        "devices": library.cuda.device_count(),
        "architectures": [],
    }
    if answer["devices"]:
        answer["architectures"] = library.cuda.get_arch_list()
        answer["collectives"] = ".".join(map(str, library.cuda.nccl.version()))
    return answer


def transformer_engine() -> Asked:
    """What megatron-core needs of it and the installed one lacks: `vital` what nothing trains without, and the rest."""
    from megatron_rocm.platform.transformer_engine import VITAL, missing

    vital = missing(VITAL)
    return {"vital": vital, "missing": [line for line in missing() if line not in vital]}


def amd() -> Asked:
    """Health of each GPU by AMD SMI. What a GPU or version can't tell is left out."""
    import amdsmi

    amdsmi.amdsmi_init()
    try:
        return {"gpus": [_amd_gpu(amdsmi, handle) for handle in amdsmi.amdsmi_get_processor_handles()]}
    finally:
        amdsmi.amdsmi_shut_down()


def _amd_gpu(amdsmi: Any, handle: Any) -> Asked:
    def ask(name: str) -> Any:
        return _told(lambda: getattr(amdsmi, name)(handle))

    errors = ask("amdsmi_get_gpu_total_ecc_count") or {}
    limits = ask("amdsmi_get_violation_status") or {}
    pages = ask("amdsmi_get_gpu_bad_page_info")
    usage = ask("amdsmi_get_gpu_vram_usage") or {}
    active = {name: said for name, said in limits.items() if name.startswith("active_") and said is True}
    return {
        "id": ask("amdsmi_get_gpu_device_bdf") or "",
        "uncorrectable": errors.get("uncorrectable_count"),
        "retired": [page["status"] for page in pages] if isinstance(pages, list) else None,
        "throttled": sorted(name.removeprefix("active_") for name in active) if limits else None,
        "link_errors": ask("amdsmi_gpu_xgmi_error_status"),
        "used": usage["vram_used"] * 2**20 if isinstance(usage.get("vram_used"), int) else None,
    }


# Why clocks are held down, by NVML's bit: idling, fixed clocks and the power cap are no fault.
THROTTLES = {0x08: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}


def nvidia() -> Asked:
    """Health of each GPU by NVML. What a GPU can't tell is left out."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return {"gpus": [_nvidia_gpu(pynvml, handle) for handle in handles]}
    finally:
        pynvml.nvmlShutdown()


def _nvidia_gpu(nvml: Any, handle: Any) -> Asked:
    def ask(name: str, *more: Any) -> Any:
        return _told(lambda: getattr(nvml, name)(handle, *more))

    uuid = ask("nvmlDeviceGetUUID")
    rows = ask("nvmlDeviceGetRemappedRows")
    clocks = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    memory = ask("nvmlDeviceGetMemoryInfo")
    links = [ask("nvmlDeviceGetNvLinkState", link) for link in range(NVLINKS)]
    return {
        "id": uuid.decode() if isinstance(uuid, bytes) else uuid or "",
        "uncorrectable": ask("nvmlDeviceGetTotalEccErrors", 1, 0),  # uncorrected, since the driver was loaded
        "remap_pending": bool(rows[2]) if rows else None,
        "remap_failed": bool(rows[3]) if rows else None,
        "throttled": None if clocks is None else [why for bit, why in THROTTLES.items() if clocks & bit],
        "links_down": links.count(0) if 1 in links else 0,
        "links": links.count(1),
        "used": memory.used if memory else None,
    }


def _told(ask: Callable[[], Any]) -> Any:
    """What a library says; None where it can't: each raises an error of its own kind, or lacks the function."""
    try:
        return ask()
    except Exception:
        return None


WHAT: dict[str, Callable[[], Asked]] = {
    "torch": torch, "transformer_engine": transformer_engine, "amd": amd, "nvidia": nvidia,
}  # fmt: skip


def main(what: str) -> int:
    """Print the answer. An error is an answer too: what the library raised, in one line."""
    die_with_parent()  # a library that hangs must not pile up, a process for each health check that was cut off
    try:
        answer = WHAT[what]()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "absent": _absent(error)}
    print(json.dumps(answer, default=str))
    return 0


def _absent(error: Exception) -> bool:
    """Whether the library itself is not installed, rather than broken."""
    return isinstance(error, ModuleNotFoundError) and error.name in ("torch", "amdsmi", "pynvml", "transformer_engine")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
