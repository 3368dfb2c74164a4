#!/usr/bin/env python3
"""Make the checkout's virtual environment, or reuse it.

    python3 tools/make_venv.py                        # .venv with the package and its `dev` extra
    python3 tools/make_venv.py --constraints          # print constraints.txt less what this Python already has
    python3 tools/make_venv.py --requirements WHEEL   # print what a wheel of the package requires (both: Dockerfiles)

Run by the Python that the environment is to be made of, with nothing but its standard library. Where that Python has
a torch that sees a GPU (a ROCm or NVIDIA container) the environment lies on top of it and torch is left alone;
elsewhere the torch that constraints.txt pins is installed. From the environment:

    PYTHON            asked for by name: this one or an error; otherwise a supported one is looked for
    TORCH_INDEX_URL   a package index that has the torch for this machine (ROCm, CPU), beside pip's own
    VENV              another folder than .venv

Exit status: 0 the environment is ready, 1 something on the way failed, 2 this machine lacks what is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("setup.py", "pyproject.toml", "constraints.txt", "megatron_rocm/data/csrc/native.cpp")
OLDEST, NEWEST = (3, 10), (3, 13)
STATE = ".megatron-rocm.json"  # in the environment: whose it is, what it was made from, whether it was finished

# The container built these against each other: an upgrade of one breaks the rest.
HELD = re.compile(r"(torch|torchvision|torchaudio|triton|pytorch-triton.*|transformer-engine.*|flash-attn|apex)")

SEES_GPU = "import sys, torch; sys.exit(not (torch.cuda.is_available() and torch.cuda.device_count() > 0))"

# Each of these would send pip's files, or Python's imports, out of the environment.
STRAY = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__")


class Missing(Exception):
    """This machine lacks something: one message that says what, and how to get it."""


def say(text: str) -> None:
    print(f"make venv: {text}", flush=True)


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_text(version: tuple) -> str:
    return ".".join(map(str, version))


# --- which Python


def supported(version: tuple) -> bool:
    return OLDEST <= tuple(version[:2]) <= NEWEST


def other_python(path: str | None = None) -> str | None:
    """The newest supported python3.N on PATH that really starts (pyenv's shims are there even where they do not)."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}", path=path)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def choose_python(version: tuple, asked: str | None, other: str | None) -> str | None:
    """None to stay with the Python that runs this, or the path of the one to go on with.

    `asked` is what the user named in PYTHON; `other` is a supported Python found on PATH. Raises Missing.
    """
    if supported(version):
        return None
    span = f"{version_text(OLDEST)} to {version_text(NEWEST)}"
    if asked:
        raise Missing(f"PYTHON={asked} is Python {version_text(version[:2])}; this needs {span}")
    if other is None:
        raise Missing(f"python3 is {version_text(version[:2])}; this needs {span}: install one and name it in PYTHON")
    return other


# --- what this Python brings


def installed() -> dict[str, str]:
    """Canonical name → version of every distribution this Python can import."""
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        if dist.metadata["Name"]:  # the first on the path is the one that is imported
            found.setdefault(canonical(dist.metadata["Name"]), dist.version)
    return found


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in STRAY}


def sees_gpu(python: str) -> bool:
    """Whether this Python's torch finds a GPU. In a process of its own: a broken driver may take it down."""
    command = [python, "-c", SEES_GPU]
    try:
        return subprocess.run(command, env=clean_environment(), capture_output=True, timeout=300).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def pinned(constraints: str, name: str) -> str:
    """The requirement that constraints.txt has for `name`, which has one line there."""
    return next(line for line in constraints.splitlines() if requirement_name(line) == name)


def requirement_name(line: str) -> str | None:
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return canonical(match.group(1)) if match else None


def constraints_on_top(constraints: str, have: dict[str, str], also_pinned: set[str]) -> str:
    """constraints.txt for an environment on top of a container's Python.

    What the container has is no longer pinned, so that it stays as long as it satisfies the package's lower bounds;
    torch and what was built against it is pinned to what is there. `also_pinned`: names that the container's own
    PIP_CONSTRAINT files settle.
    """
    settled = have.keys() | also_pinned
    kept = [line for line in constraints.splitlines() if requirement_name(line) not in settled]
    held = [f"{name}=={have[name]}" for name in sorted(have) if HELD.fullmatch(name)]
    return "\n".join([*kept, *held, ""])


def requirements(wheel: str) -> list[str]:
    """What the wheel requires, without its extras."""
    (package,) = importlib.metadata.distributions(path=[wheel])
    return [line for line in package.requires or [] if not re.search(r"\bextra\b", line)]


def pip_constraint_names(environ: dict[str, str]) -> set[str]:
    """Names in the files of PIP_CONSTRAINT, with which NVIDIA's images pin what they ship."""
    names: set[str] = set()
    for path in environ.get("PIP_CONSTRAINT", "").split():
        if os.path.isfile(path):
            names.update(name for name in map(requirement_name, Path(path).read_text().splitlines()) if name)
    return names


# --- reuse, update or make


def fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def decide(state: dict, want: dict, asked: str | None, gpu) -> tuple[str, str]:
    """("reuse" | "update" | "make", reason) from the state on disk and what this call would write there.

    `gpu()` is asked only where this Python's torch is not the one the environment was decided upon.
    """
    if not state.get("ready"):
        return "make", "the last one was not finished" if state else ""
    if state["venv"] != want["venv"] or not os.access(os.path.join(want["venv"], "bin", "python"), os.X_OK):
        return "make", "it was moved, or its Python is gone"
    if asked and state["version"][:2] != want["version"][:2]:
        return "make", f"PYTHON is {version_text(want['version'])}, it has {version_text(state['version'])}"
    if want["torch_index"] and state["torch_index"] != want["torch_index"]:
        return "make", "TORCH_INDEX_URL is another one"
    if state["on_top"] and state["torch"] != want["torch"]:
        return "make", f"the torch {state['torch']} it lies on is no longer there"
    if not state["on_top"] and want["torch"] not in (None, state["torch"]) and gpu():
        return "make", "this Python has a torch that sees a GPU"
    if state["inputs"] != want["inputs"]:
        return "update", "what it is made from has changed"
    return "reuse", ""


def read_state(venv: Path) -> dict:
    """What the last call wrote, {} where there is no environment. Raises Missing for a folder that is not ours."""
    if not venv.exists() or not any(venv.iterdir()):
        return {}
    try:
        return json.loads((venv / STATE).read_text())
    except FileNotFoundError:
        raise Missing(f"{venv} was not made by make venv: move it away, or name another folder with VENV=") from None
    except ValueError:
        return {"ready": False}


def write_state(venv: Path, state: dict) -> None:
    venv.mkdir(parents=True, exist_ok=True)
    partial = venv / f"{STATE}.partial"
    partial.write_text(json.dumps(state, indent=1))
    os.replace(partial, venv / STATE)


# --- making it


def venv_command(python: str, venv: Path, on_top: bool, has_ensurepip: bool, has_pip: bool) -> list[str]:
    """Raises Missing where this Python can put no pip into a new environment."""
    if not (has_ensurepip or has_pip):
        raise Missing(
            "this Python can make no environment (neither ensurepip nor pip): on Debian and Ubuntu, "
            f"apt-get install python{version_text(sys.version_info[:2])}-venv"
        )
    options = ["--system-site-packages"] * on_top + ["--without-pip"] * (not has_ensurepip)
    return [python, "-m", "venv", *options, str(venv)]


def install_commands(
    venv: Path, root: Path, constraints: Path, torch: str | None, index: str | None
) -> list[list[str]]:
    """pip's calls: torch by itself first where `torch` is its requirement, then the package."""
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-c", str(constraints)]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    extra = ["--extra-index-url", index] if index else []
    return [[*pip, *extra, torch]] * bool(torch) + [[*pip, *extra, "-e", f"{root}[dev]"]]


def run(command: list[str]) -> None:
    status = subprocess.run(command, env=clean_environment(), stdin=subprocess.DEVNULL).returncode
    if status:
        raise SystemExit(f"make venv: `{' '.join(command)}` failed (status {status}): see above, then call make again")


def lay_on_top_of(venv: Path) -> None:
    """Let the environment see this Python's packages where this Python is itself a virtual environment.

    --system-site-packages reaches the Python below both, not the one between (ROCm's images keep torch in such one).
    """
    folders = [path for path in sys.path if path.endswith("-packages") and path.startswith(sys.prefix)]
    version = version_text(sys.version_info[:2])
    target = venv / "lib" / f"python{version}" / "site-packages" / "_container.pth"
    target.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))


def make(venv: Path, want: dict) -> None:
    say(f"{venv} with Python {version_text(want['version'])}")
    if venv.exists():
        shutil.rmtree(venv)
    write_state(venv, {**want, "ready": False})
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    has_pip = importlib.util.find_spec("pip") is not None
    try:
        command = venv_command(sys.executable, venv, want["on_top"], has_ensurepip, has_pip)
    except Missing:
        shutil.rmtree(venv)
        raise
    run(command)
    if not has_ensurepip:
        run([sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet", "pip"])
    if want["on_top"] and sys.prefix != sys.base_prefix:
        lay_on_top_of(venv)


def install(venv: Path, want: dict, root: Path) -> None:
    constraints = root / "constraints.txt"
    torch = None
    if want["on_top"]:
        say(f"on top of this machine's torch {want['torch']}, which is left alone")
        text = constraints_on_top(constraints.read_text(), installed(), pip_constraint_names(dict(os.environ)))
        constraints = venv / "constraints.txt"
        constraints.write_text(text)
    else:
        torch = pinned(constraints.read_text(), "torch")
        say(f"installing {torch}" + (f" from {want['torch_index']}" if want["torch_index"] else ""))
        if os.path.exists("/dev/kfd") and not want["torch_index"]:
            say("an AMD GPU is here: name the index of torch's ROCm builds in TORCH_INDEX_URL to use it")
    for command in install_commands(venv, root, constraints, torch, want["torch_index"]):
        run(command)
    if want["on_top"]:
        check = f"import importlib.metadata as m, sys; sys.exit(m.version('torch') != {want['torch']!r})"
        run([str(venv / "bin" / "python"), "-c", check])


def ensure(venv: Path, root: Path, environ: dict[str, str]) -> None:
    """Leave a ready environment at `venv`, doing as little as that takes."""
    torch = installed_version("torch")
    want = {
        "ready": True,
        "venv": str(venv),
        "python": sys.executable,
        "version": list(sys.version_info[:3]),
        "inputs": fingerprint(root),
        "torch": torch,
        "torch_index": environ.get("TORCH_INDEX_URL"),
    }
    state = read_state(venv)
    action, reason = decide(state, want, environ.get("PYTHON"), lambda: sees_gpu(sys.executable))
    if action == "reuse":
        return
    if reason:
        say(f"{'updating' if action == 'update' else 'making'} {venv}: {reason}")
    if action == "make":
        want["on_top"] = torch is not None and sees_gpu(sys.executable)
        make(venv, want)
    else:
        want = {**state, "inputs": want["inputs"]}
        write_state(venv, {**want, "ready": False})
    install(venv, want, root)
    write_state(venv, want)
    say("ready")


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def leave(venv: Path, arguments: list[str]) -> None:
    """Go on with the Python that made the environment where this one is the environment's own (it is activated)."""
    if os.path.realpath(sys.prefix) != str(venv):
        return
    below = read_state(venv).get("python", "")
    if not os.access(below, os.X_OK):
        below = getattr(sys, "_base_executable", sys.executable)
    os.execv(below, [below, __file__, *arguments])


def main(arguments: list[str]) -> int:
    venv = Path(os.path.realpath(os.environ.get("VENV") or ROOT / ".venv"))
    try:
        other = None if supported(sys.version_info) else other_python()
        python = choose_python(sys.version_info, os.environ.get("PYTHON"), other)
        if python:
            os.execv(python, [python, __file__, *arguments])
        if arguments == ["--constraints"]:
            text = (ROOT / "constraints.txt").read_text()
            print(constraints_on_top(text, installed(), pip_constraint_names(dict(os.environ))))
            return 0
        if arguments[:1] == ["--requirements"]:
            print("\n".join(requirements(arguments[1])))
            return 0
        leave(venv, arguments)
        lock = os.open(ROOT, os.O_RDONLY)  # a second make waits; the kernel lets go however this one ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        ensure(venv, ROOT, dict(os.environ))
    except Missing as missing:
        print(f"make venv: {missing}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
