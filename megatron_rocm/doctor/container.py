"""What a container's flags or a user's groups give to the process: devices, shared memory, limits, system calls."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_rocm.doctor.finding import Finding, fine, problem, warning
from megatron_rocm.doctor.patient import UNLIMITED, Patient
from megatron_rocm.platform import machine
from megatron_rocm.platform.machine import GIB

# NCCL and RCCL keep buffers there for each pair of processes of a node; 64 MiB is what containers get by default.
LEAST_SHARED = GIB
LEAST_FILES = 4096


def checks(patient: Patient) -> Iterator[Finding]:
    """Whether processes here may use what the machine has."""
    yield fine("container", "yes" if patient.container else "no")
    if patient.whole.vendor == "amd" and not patient.wants_cpu:
        yield from _amd_devices(patient)
    if patient.whole.vendor == "nvidia" and not patient.wants_cpu:
        yield from _nvidia_devices(patient)
    yield from _shared_memory(patient)
    yield from _limits(patient)
    yield from _seccomp(patient)


def _amd_devices(patient: Patient) -> Iterator[Finding]:
    """/dev/kfd and a /dev/dri/renderD… per GPU: there, and open to this user."""
    wanted = [("/dev/kfd", "--device /dev/kfd"), *_render(patient)]
    yield from _devices(patient, "GPU devices", wanted, "HIP finds no GPU")


def _render(patient: Patient) -> list[tuple[str, str]]:
    return [(f"/dev/dri/{name}", "--device /dev/dri") for name in machine.render_devices(patient.root)]


def _nvidia_devices(patient: Patient) -> Iterator[Finding]:
    names = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    flag = "--gpus all (Docker) or --device nvidia.com/gpu=all (podman)"
    for finding in _devices(patient, "GPU devices", [(name, flag) for name in names], "CUDA finds no GPU"):
        late = finding.found.startswith("missing") and not patient.container  # a host makes them at CUDA's first call
        mend = "sudo nvidia-modprobe -u -c=0"
        yield finding.model_copy(update={"status": "warning", "mend": mend}) if late else finding


def _devices(patient: Patient, check: str, wanted: list[tuple[str, str]], why: str) -> Iterator[Finding]:
    there = [(name, flag) for name, flag in wanted if (patient.root / name[1:]).exists()]
    absent = [pair for pair in wanted if pair not in there]
    closed = [name for name, _ in there if not patient.opens(patient.root / name[1:])]
    if absent:
        flags = " ".join(dict.fromkeys(flag for _, flag in absent))
        mend = f"start the container with {flags}" if patient.container else "is the driver loaded? see `sudo dmesg`"
        yield problem(check, f"missing: {' '.join(name for name, _ in absent)}", why, mend)
    elif closed:
        yield problem(check, f"not open to user {patient.user}: {' '.join(closed)}", why, _let_in(patient, closed))
    else:
        yield fine(
            check, f"{' '.join(name for name, _ in there[:3])}{' …' * (len(there) > 3)} can be opened ({len(there)})"
        )


def _let_in(patient: Patient, closed: list[str]) -> str:
    """How this user gets into the groups that the devices belong to. In a container a group's number is what counts."""
    groups = sorted({(patient.root / name[1:]).stat().st_gid for name in closed} - patient.groups)
    if not groups:
        return f"sudo chmod g+rw {' '.join(closed)}"
    if patient.container:
        return "start the container with " + " ".join(f"--group-add {group}" for group in groups)
    return f"sudo usermod -aG {','.join(map(_group_name, groups))} $USER, then log in again"


def _group_name(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _shared_memory(patient: Patient) -> Iterator[Finding]:
    size = patient.shared_memory
    several = (patient.run.parallel.gpus_per_node if patient.run else len(patient.machine.gpus)) > 1
    mend = (
        "start the container with --ipc host, or --shm-size 64G"
        if patient.container
        else "sudo mount -o remount,size=50% /dev/shm"
    )
    if size is None:
        yield warning("shared memory", "no /dev/shm", "processes of a node exchange data through it", mend)
    elif size < LEAST_SHARED and several:
        yield warning(
            "shared memory", f"/dev/shm holds {size / 2**20:.0f} MiB",
            "NCCL, RCCL and data loaders exchange data through it: with too little they fail or hang", mend,
        )  # fmt: skip
    else:
        yield fine("shared memory", f"/dev/shm holds {size / GIB:.1f} GiB")


def _limits(patient: Patient) -> Iterator[Finding]:
    memlock, files = patient.limits["memlock"], patient.limits["nofile"]
    rdma = any((patient.root / "sys/class/infiniband").glob("*"))
    if memlock != UNLIMITED and rdma:
        mend = (
            "start the container with --ulimit memlock=-1"
            if patient.container
            else "`* - memlock unlimited` in /etc/security/limits.conf; Slurm: PropagateResourceLimitsExcept=MEMLOCK"
        )
        yield warning(
            "memlock", f"{memlock / 2**20:g} MiB", "RDMA pins its buffers: registering them fails with more", mend
        )
    else:
        yield fine("memlock", "unlimited" if memlock == UNLIMITED else f"{memlock / 2**20:g} MiB; no RDMA here")
    if files != UNLIMITED and files < LEAST_FILES:
        mend = f"start the container with --ulimit nofile={2**20}" if patient.container else f"ulimit -n {2**16}"
        yield warning(
            "open files", str(files), "processes, data files and a socket per peer: large runs need more", mend
        )
    else:
        yield fine("open files", "unlimited" if files == UNLIMITED else str(files))
    if rdma:
        verbs = [f"/dev/infiniband/{path.name}" for path in sorted(patient.root.glob("dev/infiniband/uverbs*"))]
        if not verbs:
            yield warning(
                "RDMA devices", "/dev/infiniband is missing, though this machine has RDMA ports",
                "data between nodes goes through TCP sockets",
                "start the container with --device /dev/infiniband" if patient.container
                else "sudo modprobe ib_uverbs",
            )  # fmt: skip
        elif closed := [name for name in verbs if not patient.opens(patient.root / name[1:])]:
            yield warning(
                "RDMA devices", f"not open to user {patient.user}: {' '.join(closed)}",
                "data between nodes goes through TCP sockets", _let_in(patient, closed),
            )  # fmt: skip
        else:
            yield fine("RDMA devices", f"{len(verbs)} under /dev/infiniband can be opened")


def _seccomp(patient: Patient) -> Iterator[Finding]:
    """A filter on system calls keeps ROCm from placing memory on its own node (mbind, in Docker's default profile)."""
    mode = re.search(r"^Seccomp:\s+(\d)", patient.text("proc/self/status"), re.MULTILINE)
    if patient.container and patient.machine.vendor == "amd" and mode and mode[1] == "2":
        yield warning(
            "system calls", "filtered (seccomp)", "ROCm can't bind host memory to the node of its GPU",
            "start the container with --security-opt seccomp=unconfined",
        )  # fmt: skip
