"""The libraries that choose kernels, as this process has loaded them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

HIPBLASLT = "libhipblaslt.so"


def file() -> str:
    """The file of hipBLASLt; "" where none is loaded. torch's wheels bring one of their own beside ROCm's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line[line.find("/") :]
        if "/" in line and path.rpartition("/")[2].startswith(HIPBLASLT):
            return path
    return ""


def revision() -> str:
    """hipBLASLt's own word for its build, with which its tuning files begin; "" where none is loaded.

    Source: hipblasLtGetGitRevision in ROCm/rocm-libraries projects/hipblaslt/library/include/hipblaslt/hipblaslt.h.
    """
    path = file()
    if not path:
        return ""
    library, handle, text = ctypes.CDLL(path), ctypes.c_void_p(), ctypes.create_string_buffer(128)
    if library.hipblasLtCreate(ctypes.byref(handle)):
        return ""
    library.hipblasLtGetGitRevision(handle, text)
    library.hipblasLtDestroy(handle)
    return text.value.decode()


def tunable_results() -> list[tuple[str, str, str]]:
    """(operator, parameters, kernel) of each product that TunableOp has a result for."""
    import torch

    if not torch.cuda.is_available():
        return []
    rows: Any = torch.cuda.tunable.get_results()  # a tuple for each product, though torch declares one of four values
    return [(row[0], row[1], row[2]) for row in rows]
