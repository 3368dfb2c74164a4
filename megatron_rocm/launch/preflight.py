"""What would go wrong once processes run, found before any is started. Every finding is a UsageError."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import time
from pathlib import Path

from megatron_rocm.checkpoint.choose import find
from megatron_rocm.checkpoint.remote.store import require
from megatron_rocm.config.address import is_remote
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.launch.lock import PATIENCE

# What workers import, and where a person gets it.
NEEDED = (
    ("torch", "install torch for this machine's GPUs (`make venv` does)"),
    ("megatron.core", "`pip install megatron-core`"),
    ("psutil", "`pip install psutil`: without it megatron-core's checkpoint saving hangs"),
)


def folders(run: RunConfig) -> None:
    """Create the folders this run writes to. Raises UsageError for the first that can't be written."""
    named = (
        ("LOG_DIR", run.launch.log_dir),
        ("LOCAL_CKPT_PATH" if is_remote(run.checkpoint.save) else "SAVE_CKPT_PATH", run.checkpoint.folder),
        ("DATA_CACHE_PATH", run.data.cache_path if run.data.paths else None),
    )
    for variable, folder in named:
        if folder:
            writable(variable, Path(folder))


def check(run: RunConfig) -> None:
    """The libraries and the checkpoint are there, the port is free. Raises UsageError for the first that is not so."""
    for module, way_out in NEEDED:
        if not importable(module):
            raise UsageError(f"the Python package {module} is missing: {way_out}")
    checkpoint(run)
    if run.launch.node_rank == 0:
        check_port(run.launch.master_port)


def checkpoint(run: RunConfig) -> None:
    """What the run would go on from can be used. Raises UsageError where it can't."""
    remote = {"SAVE_CKPT_PATH": run.checkpoint.save, "LOAD_CKPT_PATH": run.checkpoint.load}
    remote = {variable: address for variable, address in remote.items() if is_remote(address)}
    for variable, address in remote.items():
        require(variable, str(address))
    if not remote:  # or else what is there is known when the store is asked, by the run's own processes
        find(run)


def writable(variable: str, folder: Path) -> None:
    """Create `folder` and try a file in it. Raises UsageError naming `variable`."""
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        culprit = f" ({error.filename})" if error.filename and error.filename != str(probe) else ""
        raise UsageError(
            f"{variable}={folder}: can't write there: {error.strerror}{culprit}; name a folder you can write to"
        ) from None


def check_port(port: int, patience: float = PATIENCE) -> None:
    """Raises UsageError where `port` can't be bound within `patience` seconds, with one that can."""
    end = time.monotonic() + patience
    try:
        while True:
            try:
                _bind(port)
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    raise
            time.sleep(0.1)
    except OSError as error:
        other = free_port()
        raise UsageError(
            f"MASTER_PORT={port}: {(error.strerror or str(error)).lower()} on this machine; another run may have it: "
            f"MASTER_PORT={other} is free"
        ) from None


def free_port() -> int:
    """A TCP port nobody listens on."""
    return _bind(0)


def _bind(port: int) -> int:
    """Bind as torch's store does: on every address, in both families. Returns the port."""
    for family, address in ((socket.AF_INET, ""), (socket.AF_INET6, "::")):
        try:
            trial = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no such family in this kernel
            continue
        with trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                trial.bind((address, port))
            except OSError as error:
                if family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL:  # compiled in but switched off
                    continue
                raise
            port = trial.getsockname()[1]
    return port


def importable(module: str) -> bool:
    """Whether the module is there, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
