"""Build both images over a stand-in for the vendors' and use them: `make images`, as root.

It takes four to six minutes on two cores, more than half of it for the stand-in, which is kept.

    python tests/images/build.py [rocm|cuda …]

The stand-in, pip's downloads and the images lie below ~/.cache/megatron-rocm (XDG_CACHE_HOME); the images are removed
at the end. Exit status: 0 both are as they should be and have trained, 1 one is not, 2 this machine can't build.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stand_in
from stand_in import ROOT, Pip, Storage

import megatron_rocm

KINDS = ("rocm", "cuda")
PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
SOMEBODY = 12345  # a user that no image knows
MIB = 2**20
CONSTRAINTS = "/etc/pip/constraint.txt"
LARGEST = {"dependencies": 1536 * MIB, "package": 16 * MIB}


class Wrong(Exception):
    """An image is not as it should be."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


@dataclass(frozen=True)
class Build:
    """One image: built by `make`, with `marker` in the secret that the build may read."""

    storage: Storage
    kind: str
    base: str  # the vendor's name for the base
    marker: str
    revision: str

    @property
    def name(self) -> str:
        return f"localhost/megatron-rocm:{self.kind}"

    def make(self, pip: Pip, pip_conf: Path) -> None:
        """Raises Wrong with the end of what the builder said."""
        done = subprocess.run(
            [
                "buildah", "bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--layers",
                "--secret", f"id=pip,src={pip_conf}", *pip.volumes, "--build-arg", f"REVISION={self.revision}",
                "--file", str(ROOT / f"Dockerfile.{self.kind}"), "--tag", self.name, str(ROOT),
            ],
            env=self.storage.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        require(done.returncode == 0, f"the build ended with {done.returncode}:\n{done.stdout[-4000:]}")

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.storage.run("podman", "image", "inspect", name))
        return found

    def layers(self) -> list[Path]:
        """The folders of the layers over the base, the lowest first."""
        ours, below = (_folders(self.inspect(name)) for name in (self.name, self.base))
        return [folder for folder in ours if folder not in below]

    def check(self) -> str:
        """Look at the image without running it. A line about its size; raises Wrong."""
        found = self.inspect(self.name)
        config = found["Config"]
        labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
        wanted = {"version": megatron_rocm.__version__, "revision": self.revision, "base.name": self.base}
        require(labels.items() >= wanted.items() and labels.keys() >= {"title", "description"}, f"labels: {labels}")
        require(config["User"] == "10001", f"it runs as {config['User'] or 'root'}")
        health = (found.get("Healthcheck") or {}).get("Test")
        require(health == ["CMD", "megatron-rocm", "doctor"], f"its health check is {health}")
        added = {*config["Env"]} - {*self.inspect(self.base)["Config"]["Env"]}
        require(not [line for line in added if line.startswith("PIP_")], f"environment: {added}")
        require(self.marker not in json.dumps(found), "a secret of the build is in the image's configuration")
        layers = self.layers()
        for layer in layers:
            self._check_layer(layer)
        sizes = sorted((_size(layer) for layer in layers), reverse=True)
        require(sizes[0] < LARGEST["dependencies"], f"its largest layer has {sizes[0] / MIB:.0f} MiB")
        require(sizes[1] < LARGEST["package"], f"its second layer has {sizes[1] / MIB:.0f} MiB")
        return f"{len(layers)} layers over the base: {', '.join(f'{size / MIB:.1f}' for size in sizes if size)} MiB"

    def _check_layer(self, layer: Path) -> None:
        """Nothing of the base's torch replaced, no secret, nothing of the build left behind."""
        for path in _files(layer):
            name = f"/{path.relative_to(layer)}"
            require(not re.search(r"-packages/(torch|torch-[^/]*)/", name), f"the base's torch is changed: {name}")
            require(not re.match(r"/(src|wheel|tmp|root/\.cache)/", name), f"left from the build: {name}")
            require(self.marker.encode() not in path.read_bytes(), f"a secret of the build is in {name}")

    def use(self, folder: Path) -> None:
        """Health check as its own user, then doctor and a step of training as somebody else. Raises Wrong."""
        container = self._podman(
            "run", "--detach", "--network", "host", *stand_in.limits(), self.name, "sleep", "600"
        )  # fmt: skip
        try:
            require(self._podman("exec", container, "id", "-u") == "10001", "its own user is another one")
            self._podman("healthcheck", "run", container)
        finally:
            self._podman("rm", "--force", "--time", "0", container)
        said = self._inside(folder, "megatron-rocm", "doctor")
        require("torch" in said, f"doctor says nothing of torch:\n{said}")
        port = f"MASTER_PORT={free_port()}"  # both images use the network of this machine
        said = self._inside(folder, "train_llama3.sh", "TOTAL_ITERS=1", "LOG_DIR=run", port, MODEL_SIZE="tiny")
        require(re.search(r"iteration +1/ +1 .* lm loss: \d", said), f"it did not train:\n{said[-4000:]}")
        written = folder / "run" / "metrics.jsonl"
        require(written.is_file() and written.stat().st_uid == SOMEBODY, f"{written} is not there, or another user's")

    def _inside(self, folder: Path, *words: str, **said: str) -> str:
        """What examples/llama/docker_run.sh says that runs `words` in the image, as somebody."""
        environment = {
            **self.storage.environment, **said, "CONTAINER_ENGINE": "podman", "IMAGE": self.name, "TARGET": "cpu",
            "CONTAINER_FLAGS": shlex.join(["--user", f"{SOMEBODY}:{SOMEBODY}", *stand_in.limits()]),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(ROOT / "examples" / "llama" / "docker_run.sh"), *words],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        require(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout

    def _podman(self, *words: str) -> str:
        done = subprocess.run(
            ["podman", *words], env=self.storage.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        said = f"{done.stdout}{done.stderr}"
        require(done.returncode == 0, f"podman {' '.join(words)} ended with {done.returncode}:\n{said}")
        return done.stdout.strip()


def _folders(image: dict[str, Any]) -> list[Path]:
    """An image's layers as overlay keeps them, the lowest first."""
    data = image["GraphDriver"]["Data"]
    return [Path(folder) for folder in reversed([data["UpperDir"], *filter(None, data.get("LowerDir", "").split(":"))])]


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path


def _size(layer: Path) -> int:
    return sum(path.stat().st_size for path in _files(layer))


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listening:
        return int(listening.getsockname()[1])


def vendors_image(kind: str) -> str:
    """The base that the Dockerfile takes by itself."""
    said = re.search(r"^ARG \w+_IMAGE=(\S+)$", (ROOT / f"Dockerfile.{kind}").read_text(), re.MULTILINE)
    assert said
    return said[1]


def revision() -> str:
    """The commit, or "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def tag_bases(storage: Storage, base: str, kinds: list[str]) -> None:
    """The stand-in by the vendors' names, each an image of its own: no build finds the other's layers."""
    for kind in kinds:
        container = storage.run("buildah", "from", "--pull-never", base)
        storage.run("buildah", "config", "--label", f"stands-in-for={kind}", container)
        if kind == "cuda":  # NVIDIA's images hold what they ship by a file of constraints
            freeze = f"mkdir /etc/pip && python3 -m pip freeze --all >{CONSTRAINTS}"
            storage.run("buildah", "run", "--isolation", "chroot", container, "--", "sh", "-c", freeze)
            storage.run("buildah", "config", "--env", f"PIP_CONSTRAINT={CONSTRAINTS}", container)
        storage.run("buildah", "commit", "--quiet", "--rm", container, vendors_image(kind))


def clean(storage: Storage, names: list[str]) -> None:
    """Remove these images, with the layers that builds have left, and what ran over them."""
    storage.run("podman", "rm", "--all", "--force", "--time", "0")
    storage.run("buildah", "rm", "--all")
    there = storage.run("buildah", "images", "--format", "{{.Name}}:{{.Tag}}").splitlines()
    storage.run("buildah", "rmi", "--force", *(name for name in names if name in there))
    storage.run("buildah", "rmi", "--prune", "--force")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"make images: {what}: {time.monotonic() - start:.0f} s", flush=True)


def one(build: Build, pip: Pip, pip_conf: Path) -> str:
    """Make, look at and use an image; what is wrong with it, or ""."""
    try:
        with timed(f"{build.kind}: built"):
            build.make(pip, pip_conf)
        print(f"make images: {build.kind}: {build.check()}", flush=True)
        with tempfile.TemporaryDirectory() as name, timed(f"{build.kind}: health check, doctor, one step of training"):
            folder = Path(name)
            folder.chmod(0o777)
            build.use(folder)
    except Wrong as wrong:
        return str(wrong)
    return ""


def build_all(storage: Storage, kinds: list[str]) -> int:
    pip, marker = stand_in.here(), secrets.token_hex(16)
    pip_conf = storage.folder / "tmp" / "pip.conf"
    pip_conf.write_text(f"{pip.text}# {marker}\n")
    with timed("stand-in for the vendors' images"):
        base = stand_in.ensure(storage, pip, pip_conf)
    tag_bases(storage, base, kinds)
    builds = [Build(storage, kind, vendors_image(kind), marker, revision()) for kind in kinds]
    try:
        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(lambda build: one(build, pip, pip_conf), builds))
    finally:
        pip_conf.unlink()
        clean(storage, [name for build in builds for name in (build.name, build.base)])
    for build, fault in zip(builds, faults, strict=True):
        print(f"make images: {build.kind}: {'failed: ' + fault if fault else 'ok'}")
    return int(any(faults))


def main(words: list[str]) -> int:
    kinds = words or list(KINDS)
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent or os.geteuid() or not {*kinds} <= {*KINDS}:
        needs = f"install {' '.join(absent)}" if absent else f"it is run as root, for {' or '.join(KINDS)}"
        print(f"make images: {needs}", file=sys.stderr)
        return 2
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-rocm"
    storage = Storage(cache / "images")
    storage.make()
    lock = os.open(storage.folder, os.O_RDONLY)  # a second call waits
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        return build_all(storage, kinds)
    except subprocess.CalledProcessError as error:
        print(f"make images: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
