#!/usr/bin/env python3
"""Run a command in the image for this machine, with the devices and limits that training needs. [COMMAND …]

    bash examples/llama/docker_run.sh                                       # a shell
    bash examples/llama/docker_run.sh train_llama3.sh MODEL_SIZE=8 TP=1     # the scripts are on the image's PATH
    DRY_RUN=1 bash examples/llama/docker_run.sh megatron-rocm doctor        # print the command, start nothing
    DRY_RUN=1 TARGET=mi300x bash examples/llama/docker_run.sh               # as it would be on another machine

The current folder is there under the same path, and you are the same user. Every variable of the training scripts that
is set goes in by its name, and so do those of the libraries (NCCL_…, HSA_…), masks of GPUs and tokens: no value is in
the command. A library's variable that names a path of the host's stays out. From the environment:

    IMAGE              megatron-rocm:rocm, on NVIDIA megatron-rocm:cuda
    HOST_MOUNT         another folder than the current one, that holds it; CONTAINER_MOUNT: another path inside
    CONTAINER_ENGINE   docker or podman: without it the first on PATH
    CONTAINER_FLAGS    further flags, such as '--volume /data:/data --name llama'; they come last and win

Exit status: 2 for a mistake or something missing, else the command's own.
"""

# Nothing but Python's own library: a host may have a GPU's driver and Docker, and no more.
from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_rocm.cli import guarded  # noqa: E402
from megatron_rocm.errors import UsageError  # noqa: E402
from megatron_rocm.platform import machine  # noqa: E402
from megatron_rocm.platform.machine import Machine  # noqa: E402

# Both images run on a CPU as well.
KINDS = {"amd": "rocm", "nvidia": "cuda", "cpu": "rocm"}

# What goes in beside the variables of docs/variables.md: libraries' own, tokens, proxies.
PREFIXES = (
    "AITER_", "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "CK_TILE_", "CUBLAS_", "CUDA_", "FI_", "GLOO_", "GPU_MAX_HW_QUEUES", "HF_", "HIPBLASLT_",
    "HIP_", "HSA_", "MKL_", "MSCCLPP_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "RCCL_", "ROCBLAS_", "ROCR_",
    "TE_HIPBLASLT_", "TORCHELASTIC_", "TORCH_", "UCX_", "WANDB_", "http_proxy", "https_proxy", "no_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
UNLIMITED = resource.RLIM_INFINITY
SYS_RESOURCE = 24  # the right to raise limits: CAP_SYS_RESOURCE in Linux include/uapi/linux/capability.h
OURS = {"DRY_RUN", "TARGET"}  # asked of this script, not of the run


@dataclass(frozen=True)
class Engine:
    """What starts containers: its program, whether it is podman by whatever name, and whether it runs without root."""

    program: str
    podman: bool = False
    rootless: bool = False


@dataclass(frozen=True)
class Host:
    """Where the container is to start: the machine, the files under `root`, the user."""

    machine: Machine
    user: int
    group: int
    memlock: int = UNLIMITED  # the most memory, in bytes, that this process may let others pin
    root: Path = Path("/")
    owner: Callable[[Path], int] = lambda path: path.stat().st_gid


def command(host: Host, engine: Engine, said: Mapping[str, str], folder: Path, words: Sequence[str]) -> list[str]:
    """The engine's command line that runs `words` in `folder`. Raises UsageError for a mount that can't be."""
    mount = _mount(said, folder)
    inside = Path(said.get("CONTAINER_MOUNT") or mount)
    if not mount.is_dir() or not folder.is_relative_to(mount):
        raise UsageError(f"HOST_MOUNT={mount}: it is a folder that holds the current one, {folder}")
    if not inside.is_absolute() or ":" in f"{mount}{inside}":
        raise UsageError(f"{mount} can't be mounted as {inside}: paths are absolute and without a colon")
    return [
        engine.program, "run", "--rm",
        *_gpus(host, engine),
        *_network(host),
        # Processes of a node exchange data through shared memory, of which a container has 64 MiB by itself.
        "--ipc", "host",
        # RDMA pins memory. Docker's daemon may lift the limit; podman may do what this process may.
        "--ulimit", f"memlock={host.memlock if engine.podman else UNLIMITED}",
        *_user(host, engine),
        "--volume", f"{mount}:{inside}",
        "--workdir", str(inside / folder.relative_to(mount)),
        *(part for variable in forwarded(said, mount) for part in ("--env", variable)),
        *_words(said, "CONTAINER_FLAGS"),
        image(host.machine, said), *(words or ("bash",)),
    ]  # fmt: skip


def _mount(said: Mapping[str, str], folder: Path) -> Path:
    return Path(said["HOST_MOUNT"]).resolve() if said.get("HOST_MOUNT") else folder


def most_memlock(root: Path = Path("/")) -> int:
    """Bytes that this process may let a container pin: its hard limit, or none where it may raise that."""
    rights = re.search(r"^CapEff:\s+(\w+)", machine.text(root / "proc/self/status"), re.MULTILINE)
    may_raise = rights and int(rights[1], 16) >> SYS_RESOURCE & 1
    return UNLIMITED if may_raise else resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]


def image(there: Machine, said: Mapping[str, str]) -> str:
    """IMAGE, or the name that the Dockerfile for this vendor gives."""
    return said.get("IMAGE") or f"megatron-rocm:{KINDS[there.vendor]}"


def _gpus(host: Host, engine: Engine) -> list[str]:
    """Source: rocm.docs.amd.com/projects/install-on-linux how-to/docker; NVIDIA Container Toolkit's CDI support page.

    AMD's guide adds SYS_PTRACE, which gives nothing to a user other than root.
    """
    if host.machine.vendor == "nvidia":
        return ["--device", "nvidia.com/gpu=all"] if engine.podman else ["--gpus", "all"]
    if host.machine.vendor == "cpu":
        return []
    flags = ["--device", "/dev/kfd", "--device", "/dev/dri"]
    for name in _groups(host, engine):
        flags += ["--group-add", name]
    # The default filter of system calls keeps ROCm from placing host memory near its GPU (mbind).
    return [*flags, "--security-opt", "seccomp=unconfined"]


def _groups(host: Host, engine: Engine) -> list[str]:
    """Groups that may open AMD's devices, by number: a name has another number inside, or none."""
    if engine.rootless:
        return ["keep-groups"]
    if not host.machine.is_here:
        return ["video", "render"]
    devices = [host.root / "dev/kfd", *sorted(host.root.glob("dev/dri/renderD*"))]
    numbers = {host.owner(device) for device in devices if device.exists()}
    return [str(number) for number in sorted(numbers - {0})]


def _network(host: Host) -> list[str]:
    """The host's own interfaces, so that nodes reach each other; its RDMA cards where it has some."""
    has_rdma = host.machine.is_here and (host.root / "dev/infiniband").is_dir()
    return ["--network", "host", *(("--device", "/dev/infiniband") if has_rdma else ())]


def _user(host: Host, engine: Engine) -> list[str]:
    """You, so that what is written is yours; under SELinux podman would not let you see your own files."""
    flags = ["--userns", "keep-id"] if engine.rootless else []
    return [
        *flags,
        "--user",
        f"{host.user}:{host.group}",
        *(("--security-opt", "label=disable") if engine.podman else ()),
    ]


def forwarded(said: Mapping[str, str], mount: Path) -> list[str]:
    """Names of the set variables that a run inside reads, less libraries' own that name a path of the host's."""
    libraries = {name for name in said if name.startswith(PREFIXES)}
    return sorted(_variables(said) | {name for name in libraries if not _outside(said[name], mount)})


def _variables(said: Mapping[str, str]) -> set[str]:
    """The variables of the training scripts that are set."""
    page = (ROOT / "docs" / "variables.md").read_text(encoding="utf-8")
    return {*re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)} & said.keys() - OURS


def _outside(value: str, mount: Path) -> bool:
    return value.startswith("/") and not Path(value).is_relative_to(mount)


def find_engine(said: Mapping[str, str], user: int, dry_run: bool) -> Engine:
    """CONTAINER_ENGINE, else docker, else podman. Raises UsageError where there is none to start anything with."""
    asked = said.get("CONTAINER_ENGINE")
    names = (asked,) if asked else ("docker", "podman")
    found = next((path for name in names if (path := shutil.which(name, path=said.get("PATH")))), None)
    if found is None and not dry_run:
        raise UsageError(
            f"CONTAINER_ENGINE={asked}: no such program" if asked
            else "neither docker nor podman is on PATH: install one, or name its program in CONTAINER_ENGINE"
        )  # fmt: skip
    if found is None:
        return Engine(names[0], podman="podman" in names[0])
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    podman = "podman" in version  # podman-docker is podman by Docker's name
    return Engine(asked or Path(found).name, podman, podman and user != 0)


def _words(said: Mapping[str, str], name: str) -> list[str]:
    try:
        return shlex.split(said.get(name, ""))
    except ValueError as error:
        raise UsageError(f"{name}={said[name]}: {error}") from None


def notes(host: Host, said: Mapping[str, str], folder: Path) -> list[str]:
    """What would surprise inside: paths that are not there, GPUs that are not used."""
    mount = _mount(said, folder)
    outside = {name: f"{name}={said[name]} is outside {mount}" for name in sorted(said) if _outside(said[name], mount)}
    known = _variables(said)
    found = [
        f"{text}: not passed on" for name, text in outside.items() if name.startswith(PREFIXES) and name not in known
    ]
    if "CONTAINER_FLAGS" not in said:
        way_out = "not there inside; set HOST_MOUNT, or CONTAINER_FLAGS='--volume …'"
        found += [f"{text}: {way_out}" for name, text in outside.items() if name in known]
    if host.machine.vendor == "cpu" and not host.machine.hides_gpus:
        found += [
            f"{count} devices of {vendor} on the bus can't be used (driver, or a mask): this is for the CPU"
            for vendor, count in machine.accelerators(host.root).items()
        ]
    return found


def _look_for(name: str, engine: Engine, kind: str) -> None:
    """Without this an engine would ask a registry, which can't have our own image."""
    done = subprocess.run([engine.program, "image", "inspect", name], capture_output=True, text=True, check=False)
    if done.returncode and re.search(r"no such (image|object)|image not known", done.stderr, re.IGNORECASE):
        build = shlex.join([engine.program, "build", "-f", str(ROOT / f"Dockerfile.{kind}"), "-t", name, str(ROOT)])
        raise UsageError(f"there is no image {name}: {build}")


def main(words: Sequence[str]) -> int:
    """Print the command with DRY_RUN=1, else become it."""
    if words and words[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    said = dict(os.environ)
    dry_run = said.get("DRY_RUN", "0") not in ("", "0")
    there = machine.find(said.get("TARGET", ""), said)
    if not there.is_here and not dry_run:
        raise UsageError(f"TARGET={said['TARGET']}: this is another machine; DRY_RUN=1 shows what would run there")
    host = Host(there, os.getuid(), os.getgid(), most_memlock())
    engine = find_engine(said, host.user, dry_run)
    line = command(host, engine, said, Path.cwd(), words)
    for note in notes(host, said, Path.cwd()):
        print(f"megatron-rocm: {note}", file=sys.stderr)
    if dry_run:
        print(shlex.join(line))
        return 0
    if not said.get("IMAGE"):
        _look_for(image(there, said), engine, KINDS[there.vendor])
    if sys.stdin.isatty() and sys.stdout.isatty():
        line[2:2] = ["--interactive", "--tty"]
    os.execvp(line[0], line)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
