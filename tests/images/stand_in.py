"""A Debian with Python and torch for a CPU, in the place of a vendor's image, which is some fifty gigabytes.

It is as the vendors' are in what the Dockerfiles meet: a compiler, a Python that the distribution calls its own, a
torch that must stay. Made once and kept in the storage of `Storage`, under a name that changes with its recipe.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ca-certificates", "g++", "python3", "python3-dev", "python3-pip")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# pip's settings that say where packages come from. Others may name places that only the host has.
PIP_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "default-timeout")


@dataclass(frozen=True)
class Storage:
    """Where images, caches of builds and containers lie: below one folder, apart from the machine's own."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes buildah and podman use it."""
        settings = {name: str(self.folder / f"{name}.conf") for name in ("storage", "containers")}
        return {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": settings["storage"],
            "CONTAINERS_CONF": settings["containers"],
            "TMPDIR": str(self.folder / "tmp"),
            "DISABLE_HC_SYSTEMD": "true",  # health checks are asked for here, not by a timer of systemd
        }

    def make(self) -> None:
        """Write the settings: runc, and no cgroups of systemd."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/images"\nrunroot = "{self.folder}/run"\n'
        )
        (self.folder / "containers.conf").write_text(
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'tmp_dir = "{self.folder}/run/libpod"\n'
        )

    def run(self, *command: str) -> str:
        """What the command prints to stdout; its stderr goes on. Raises CalledProcessError."""
        return subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()  # fmt: skip


def limits() -> list[str]:
    """Flags that keep podman from raising limits, which takes a right that root in a container or VM may lack."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]


@dataclass(frozen=True)
class Pip:
    """pip's settings on this machine, for builds: the text of a pip.conf, and the folders that it names."""

    text: str
    folders: tuple[str, ...]

    @property
    def volumes(self) -> list[str]:
        """Flags that show those folders to builds."""
        return [flag for folder in self.folders for flag in ("--volume", f"{folder}:{folder}:ro")]


def pip_settings(listing: str, extra_index: str = "") -> Pip:
    """From what `pip config list` prints: one `scope.key='value'` a line, the last of a key wins."""
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in PIP_KEYS:
            found[name] = str(ast.literal_eval(value)).split()
    if extra_index:
        found.setdefault("extra-index-url", []).append(extra_index)
    # An index is a folder of links that may go up one level.
    places = [place for name in ("index-url", "extra-index-url", "find-links") for place in found.get(name, [])]
    files = [Path(place.removeprefix("file://")).parent for place in places if place.startswith("file://")]
    folders = sorted({str(path) for path in [*files, *map(Path, places)] if path.is_absolute() and path.is_dir()})
    lines = [f"{name} = {' '.join(values)}" for name, values in found.items()]
    return Pip("\n".join(["[global]", f"cert = {CERTIFICATES}", *lines, ""]), tuple(folders))


def here() -> Pip:
    """pip's settings of the Python that runs this, and TORCH_INDEX_URL."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return pip_settings(listing, os.environ.get("TORCH_INDEX_URL", ""))


@dataclass(frozen=True)
class Mirror:
    """Where this machine's own distribution comes from."""

    site: str
    suite: str
    components: str


def mirror(targets: str, suite: str) -> Mirror:
    """From lines `site release component`, as apt-get indextargets prints them."""
    rows = [line.split() for line in targets.splitlines()]
    mine = [row for row in rows if len(row) == 3 and row[1] == suite]
    if not mine:
        raise SystemExit(f"make images: apt has no source for {suite}, of which the stand-in is made")
    site = mine[0][0]
    return Mirror(site, suite, ",".join(dict.fromkeys(row[2] for row in mine if row[0] == site)))


def apt_mirror() -> Mirror:
    """The mirror of the release that runs here."""
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    targets = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return mirror(targets, release["VERSION_CODENAME"].strip('"'))


def torch_pin() -> str:
    """The torch of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def name(suite: str, pip: Pip) -> str:
    """The image's name, which holds a digest of all it is made from."""
    recipe = [
        inspect.getsource(_make),
        inspect.getsource(_install_distribution),
        *PACKAGES,
        suite,
        torch_pin(),
        *pip.folders,
    ]
    return f"localhost/stand-in:{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:16]}"


def ensure(storage: Storage, pip: Pip, pip_conf: Path) -> str:
    """The stand-in's name, made if it is not there. Others, of older recipes, are removed."""
    source = apt_mirror()
    wanted = name(source.suite, pip)
    there = storage.run("buildah", "images", "--all", "--format", "{{.Name}}:{{.Tag}}").splitlines()
    if wanted in there:
        return wanted
    for old in (image for image in there if image.startswith("localhost/stand-in:")):
        storage.run("buildah", "rmi", "--force", old)
    _make(storage, wanted, source, pip, pip_conf)
    return wanted


def _make(storage: Storage, wanted: str, source: Mirror, pip: Pip, pip_conf: Path) -> None:
    container = storage.run("buildah", "from", "scratch")
    try:
        root = Path(storage.run("buildah", "mount", container))
        _install_distribution(source, root, pip)
        storage.run(
            "buildah", "run", "--isolation", "chroot", *pip.volumes, "--volume", f"{pip_conf}:/etc/pip.conf:ro",
            "--env", "PIP_BREAK_SYSTEM_PACKAGES=1", container, "--",
            "python3", "-m", "pip", "install", "-qq", "--no-cache-dir", "--root-user-action=ignore", torch_pin(),
        )  # fmt: skip
        storage.run("buildah", "config", "--env", f"PATH={PATH}", "--cmd", "bash", container)
        storage.run("buildah", "commit", "--quiet", container, wanted)
    finally:
        storage.run("buildah", "rm", container)


def _install_distribution(source: Mirror, root: Path, pip: Pip) -> None:
    log = root.parent / "debootstrap.txt"
    with log.open("w") as output:
        status = subprocess.run(
            [
                "debootstrap", "--variant=minbase", f"--components={source.components}",
                f"--include={','.join(PACKAGES)}", source.suite, str(root), source.site,
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PATH": PATH},
        ).returncode  # fmt: skip
    if status:
        raise SystemExit(f"make images: debootstrap ended with {status}:\n{log.read_text()[-2000:]}")
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    shutil.rmtree(root / "var/lib/apt/lists")
    if Path(CERTIFICATES).is_file():  # this machine's own authorities too
        shutil.copy(CERTIFICATES, root / CERTIFICATES[1:])
    for folder in pip.folders:  # where builds have them mounted: a layer would show a new folder
        (root / folder[1:]).mkdir(parents=True, exist_ok=True)
