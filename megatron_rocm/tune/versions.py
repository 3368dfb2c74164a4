"""What a tuned kernel's worth depends on: the GPU, its driver, and the libraries that choose. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rocm.platform.machine import Machine, driver

LIBRARY = "hipBLASLt"
ARCHITECTURE = "GPU architecture"


def stamp(machine: Machine, library: str, root: Path = Path("/")) -> dict[str, str]:
    """Name → value, for the GPUs, driver and libraries of this machine. `library` is the file of hipBLASLt, or ""."""
    torch = torch_build()
    values = {
        ARCHITECTURE: machine.arch,
        "GPU": machine.name,
        "partition": machine.partition,
        "driver": driver(machine.vendor, root) or f"of Linux {os.uname().release}",
        "torch": torch.get("__version__", ""),
        "HIP": torch.get("hip", ""),
        "CUDA": torch.get("cuda", ""),
        "Transformer Engine": _installed("transformer-engine") if machine.tier == "te" else "",
        LIBRARY: digest(Path(library)) if library else "",
    }
    return {name: value or "none" for name, value in values.items()}


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each value that is not what it was."""
    names = [*then, *(name for name in now if name not in then)]
    return [
        f"{name} was {then.get(name, 'none')} and is {now.get(name, 'none')}"
        for name in names
        if then.get(name, "none") != now.get(name, "none")
    ]


def torch_build() -> dict[str, str]:
    """The names that torch/version.py gives a text: __version__, hip, cuda and others. Empty without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for line in ast.parse((Path(spec.origin).parent / "version.py").read_text()).body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            found[target.id] = value.value
    return found


def digest(path: Path) -> str:
    """The name of a file and the beginning of its SHA-256; "missing" in its place where it can't be read."""
    try:
        with open(path, "rb") as file:
            whole = hashlib.sha256()
            while block := file.read(1 << 20):
                whole.update(block)
    except OSError:
        return f"{path.name} missing"
    return f"{path.name} {whole.hexdigest()[:16]}"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
