"""What the checks look at: this machine and process, or a test's tree and figures in their place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rocm.config.request import RunRequest
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.errors import UsageError
from megatron_rocm.platform import machine
from megatron_rocm.platform.machine import Machine, text
from megatron_rocm.platform.process import PARENT, make_importable
from megatron_rocm.platform.route import Way, way_to
from megatron_rocm.resolve import Resolution, resolve

MASKS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
PROBE_SECONDS = 120  # an import of torch from a cold network disk is slow; a health check waits for two of these
UNLIMITED = resource.RLIM_INFINITY

Probe = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Patient:
    """One node and the process that looks at it. Sizes in bytes; `limits` are soft ones, UNLIMITED or a number."""

    request: RunRequest
    machine: Machine  # as a run would have it
    whole: Machine  # without visible-devices masks
    environment: Mapping[str, str]
    resolution: Resolution | None  # None: `refused` says why
    refused: str
    shared_memory: int | None
    limits: Mapping[str, int]
    groups: frozenset[int]
    user: int
    probe: Probe  # what a process of its own says about libraries that may crash
    root: Path = Path("/")
    opens: Callable[[Path], bool] = field(default=lambda path: os.access(path, os.R_OK | os.W_OK))
    installed: Callable[[str], str] = field(default=lambda name: installed(name))
    route: Callable[[str], Way] = field(default=way_to)

    @property
    def run(self) -> RunConfig | None:
        """The run that was asked for; None where it is refused."""
        return self.resolution.config if self.resolution else None

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return int(self.request.text("NNODES", "1"))

    @property
    def wants_cpu(self) -> bool:
        """TARGET=cpu: GPUs that may be here are left alone."""
        return self.machine.hides_gpus

    @property
    def container(self) -> bool:
        """Whether this is a container: the mark of Docker or podman, or what podman, systemd and Kubernetes say."""
        marks = (self.root / ".dockerenv", self.root / "run/.containerenv")
        told = ("container", "KUBERNETES_SERVICE_HOST")
        return any(mark.exists() for mark in marks) or any(name in self.environment for name in told)

    def text(self, path: str) -> str:
        """A file's stripped content, "" where it can't be read."""
        return text(self.root / path)


def here(request: RunRequest, environment: Mapping[str, str]) -> Patient:
    """This machine, for the run that `request` asks for. Raises UsageError for a TARGET that is another machine."""
    target = request.text("TARGET")
    if target not in ("", "cpu"):
        raise UsageError(f"TARGET={target}: doctor looks at the machine it runs on; TARGET takes cpu here, or nothing")
    said = {**environment, **request.exports}
    return examine(
        request, said, Path("/"), _shared_memory(), _limits(), frozenset({*os.getgroups(), os.getegid()}), os.geteuid(),
        lambda what: probe(what, said),
    )  # fmt: skip


def examine(
    request: RunRequest,
    environment: Mapping[str, str],
    root: Path,
    shared_memory: int | None,
    limits: Mapping[str, int],
    groups: frozenset[int],
    user: int,
    probe: Probe,
) -> Patient:
    """The patient whose machine is under `root`."""
    found = machine.find(request.text("TARGET"), environment, root)
    unmasked = {name: value for name, value in environment.items() if name not in MASKS}
    resolution, refused = None, ""
    try:
        resolution = resolve(request, found, dict(environment), dry_run=True)
    except UsageError as error:
        refused = str(error)
    except OSError as error:  # a folder above what was named is closed to this user
        refused = f"{error.filename}: {error.strerror}"
    return Patient(
        request, found, machine.detect(unmasked, root), environment, resolution, refused, shared_memory, limits, groups,
        user, probe, root,
    )  # fmt: skip


def installed(distribution: str) -> str:
    """The version of an installed distribution, "" where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def probe(what: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What `python -m megatron_rocm.doctor.probe <what>` says; {"error": …} where it crashes or hangs."""
    values = {**environment, PARENT: str(os.getpid())}
    make_importable(values)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rocm.doctor.probe", what],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            env=values,
        )  # fmt: skip
    except OSError as error:
        return {"error": f"{sys.executable}: {error.strerror}"}
    try:
        out, err = process.communicate(timeout=PROBE_SECONDS)
    except BaseException as error:
        process.kill()  # and not waited for: a driver that hangs holds even a killed process
        if isinstance(error, subprocess.TimeoutExpired):
            return {"error": f"no answer within {PROBE_SECONDS} seconds"}
        raise
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer
    except (ValueError, IndexError):
        said, status = err.strip().splitlines(), process.returncode
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"error": f"the process ended with {ended}" + (f": {said[-1]}" if said else "")}


def _shared_memory() -> int | None:
    try:
        of = os.statvfs("/dev/shm")
    except OSError:
        return None
    return of.f_frsize * of.f_blocks


def _limits() -> dict[str, int]:
    return {
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
