"""tools/make_venv.py: which Python, on top of whose torch, and when nothing, an update or a new environment is due."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "make_venv.py"
spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
make_venv = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_venv)

CONSTRAINTS = "# pins\nnumpy==2.2.6 ; python_full_version < '3.11'\nnumpy==2.4.6\nPyYAML==6.0.3\ntorch==2.13.0\n"


@pytest.mark.parametrize(
    ("version", "asked", "other", "chosen"),
    [
        ((3, 10, 0), None, None, None),
        ((3, 13, 5), "python3.13", "/x/python3.12", None),
        ((3, 14, 0), None, "/x/python3.13", "/x/python3.13"),
        ((3, 9, 2), None, "/x/python3.11", "/x/python3.11"),
    ],
)
def test_a_supported_python_is_chosen(version, asked, other, chosen):
    assert make_venv.choose_python(version, asked, other) == chosen


@pytest.mark.parametrize(
    ("version", "asked", "other", "message"),
    [
        ((3, 14, 0), "python3.14", "/x/python3.13", "PYTHON=python3.14 is Python 3.14; this needs 3.10 to 3.13"),
        ((3, 9, 2), None, None, "python3 is 3.9; this needs 3.10 to 3.13"),
    ],
)
def test_an_unsupported_python_is_refused(version, asked, other, message):
    with pytest.raises(make_venv.Missing, match=message):
        make_venv.choose_python(version, asked, other)


def fake_python(folder: Path, name: str, status: int) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return path


def test_the_newest_python_that_starts_is_found(tmp_path):
    fake_python(tmp_path, "python3.14", 0)
    fake_python(tmp_path, "python3.13", 127)  # a pyenv shim without its version
    wanted = fake_python(tmp_path, "python3.12", 0)
    fake_python(tmp_path, "python3.11", 0)
    assert make_venv.other_python(str(tmp_path)) == str(wanted)
    assert make_venv.other_python(str(tmp_path / "none")) is None


@pytest.mark.parametrize(("status", "sees"), [(0, True), (1, False), (139, False)])
def test_only_a_clean_answer_counts_as_a_gpu(tmp_path, status, sees):
    assert make_venv.sees_gpu(str(fake_python(tmp_path, "python3", status))) is sees


def test_a_containers_torch_is_pinned_and_the_rest_of_it_left_alone():
    have = {"torch": "2.9.0a0+git1.nv25.9", "transformer-engine": "2.11.0+rocm", "numpy": "1.26.4", "pip": "25.0"}
    text = make_venv.constraints_on_top(CONSTRAINTS, have, {"pyyaml"})
    assert text.splitlines() == ["# pins", "torch==2.9.0a0+git1.nv25.9", "transformer-engine==2.11.0+rocm"]


def test_without_a_container_every_pin_stays():
    assert make_venv.constraints_on_top(CONSTRAINTS, {}, set()) == CONSTRAINTS


def test_what_a_wheel_requires_without_its_extras(tmp_path):
    wheel = tmp_path / "megatron_rocm-1.0-py3-none-any.whl"
    lines = ["torch>=2.6", "tomli>=2.0; python_version < '3.11'", "s3fs>=2024.6; extra == 's3'"]
    metadata = "Metadata-Version: 2.1\nName: megatron-rocm\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "megatron_rocm-1.0.dist-info/METADATA", metadata + "".join(f"Requires-Dist: {line}\n" for line in lines)
        )
    said = subprocess.run([sys.executable, str(SCRIPT), "--requirements", str(wheel)], **CAPTURE)
    assert said.stdout.splitlines() == lines[:2]


def test_names_of_pip_constraint_files(tmp_path):
    (tmp_path / "a.txt").write_text("Jinja2==3.1.6\n# no\n\nscikit_learn==1.7 # why\n")
    assert make_venv.pip_constraint_names({"PIP_CONSTRAINT": f"{tmp_path / 'a.txt'} /nowhere"}) == {
        "jinja2",
        "scikit-learn",
    }


def test_torch_comes_first_and_from_the_named_index():
    first, second = make_venv.install_commands(Path("/v"), Path("/r"), Path("/r/c.txt"), "torch==2.13.0", "https://x/")
    assert first[0] == "/v/bin/python" and first[-3:] == ["--extra-index-url", "https://x/", "torch==2.13.0"]
    assert second[-2:] == ["-e", "/r[dev]"] and second[second.index("-c") + 1] == "/r/c.txt"


def test_a_containers_torch_is_not_installed():
    (only,) = make_venv.install_commands(Path("/v"), Path("/r"), Path("/v/c.txt"), None, None)
    assert only[-2:] == ["-e", "/r[dev]"] and "--extra-index-url" not in only


def test_the_pin_of_torch_is_taken_from_constraints():
    assert make_venv.pinned(CONSTRAINTS, "torch") == "torch==2.13.0"


def test_a_python_that_can_make_no_environment_says_what_to_install():
    with pytest.raises(make_venv.Missing, match=r"apt-get install python3\.\d+-venv"):
        make_venv.venv_command("python3", Path("/v"), False, has_ensurepip=False, has_pip=False)
    assert "--without-pip" in make_venv.venv_command("python3", Path("/v"), False, has_ensurepip=False, has_pip=True)


READY = {
    "ready": True,
    "venv": str(Path(sys.prefix)),  # has bin/python
    "version": [3, 11, 7],
    "inputs": "a",
    "torch": None,
    "torch_index": None,
    "on_top": False,
}
ON_TOP = {"on_top": True, "torch": "2.9+rocm"}

DECISIONS = {
    #                       on disk                    this call                    PYTHON       sees a GPU, what is due
    "nothing there": ({"ready": None}, {}, None, False, "make"),
    "interrupted": ({"ready": False}, {}, None, False, "make"),
    "the same": ({}, {}, None, False, "reuse"),
    "moved": ({"venv": "/elsewhere"}, {}, None, False, "make"),
    "its Python gone": ({"venv": "/none"}, {"venv": "/none"}, None, False, "make"),
    "inputs changed": ({}, {"inputs": "b"}, None, False, "update"),
    "another Python, not asked for": ({}, {"version": [3, 12, 1]}, None, False, "reuse"),
    "another Python, asked for": ({}, {"version": [3, 12, 1]}, "python3.12", False, "make"),
    "another patch release": ({}, {"version": [3, 11, 9]}, "python3.11", False, "reuse"),
    "another index": ({"torch_index": "https://a/"}, {"torch_index": "https://b/"}, None, False, "make"),
    "index no longer named": ({"torch_index": "https://a/"}, {}, None, False, "reuse"),
    "entered a container": ({}, {"torch": "2.9+rocm"}, None, True, "make"),
    "a torch without a GPU": ({}, {"torch": "2.9+rocm"}, None, False, "reuse"),
    "the container's torch is there": (ON_TOP, {"torch": "2.9+rocm"}, None, True, "reuse"),
    "left the container": (ON_TOP, {}, None, False, "make"),
    "another container": (ON_TOP, {"torch": "2.10+rocm"}, None, True, "make"),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_what_is_due(case):
    on_disk, this_call, asked, gpu, due = DECISIONS[case]
    state = {} if on_disk == {"ready": None} else {**READY, **on_disk}
    assert make_venv.decide(state, {**READY, **this_call}, asked, lambda: gpu)[0] == due


class Checkout:
    """A checkout whose environments are made for real, without pip, while pip's calls are only noted."""

    def __init__(self, folder: Path, monkeypatch):
        self.root, self.venv, self.calls, self.fail = folder, folder / ".venv", [], False
        for name in make_venv.INPUTS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(CONSTRAINTS if name == "constraints.txt" else "")
        monkeypatch.setattr(make_venv, "run", self.run)

    def run(self, command: list[str]) -> None:
        if "venv" in command:
            options = [] if "--without-pip" in command else ["--without-pip"]
            subprocess.run([*command[:3], *options, *command[3:]], check=True)
        self.calls.append("venv" if "venv" in command else command[-1])
        if self.fail and "venv" not in command:
            raise SystemExit("pip failed")

    def ensure(self) -> list[str]:
        """The calls that this `make venv` made: "venv" or what pip was to install."""
        self.calls.clear()
        make_venv.ensure(self.venv, self.root, {})
        return self.calls


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(make_venv, "installed_version", lambda name: None)
    return Checkout(tmp_path, monkeypatch)


def test_made_once_reused_and_updated(checkout):
    package = f"{checkout.root}[dev]"
    assert checkout.ensure() == ["venv", "torch==2.13.0", package]
    assert checkout.ensure() == []
    os.utime(checkout.root / "constraints.txt", (0, 0))  # a fresh checkout of the same text
    assert checkout.ensure() == []
    (checkout.root / "pyproject.toml").write_text("changed")
    assert checkout.ensure() == ["torch==2.13.0", package]
    assert checkout.ensure() == []


def test_an_interrupted_one_is_made_again(checkout):
    checkout.fail = True
    with pytest.raises(SystemExit):
        checkout.ensure()
    leftover = checkout.venv / "half a package"
    leftover.touch()
    checkout.fail = False
    assert checkout.ensure()[0] == "venv"
    assert not leftover.exists()


def test_an_interrupted_update_is_made_again(checkout):
    checkout.ensure()
    (checkout.root / "setup.py").write_text("changed")
    checkout.fail = True
    with pytest.raises(SystemExit):
        checkout.ensure()
    checkout.fail = False
    assert checkout.ensure()[0] == "venv"


def test_a_folder_of_the_users_own_is_not_touched(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "pyvenv.cfg").touch()
    with pytest.raises(make_venv.Missing, match="was not made by make venv"):
        checkout.ensure()
    assert checkout.calls == [] and (checkout.venv / "pyvenv.cfg").exists()


IN_A_CONTAINER = """
import sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import make_venv
sys.path.pop(0)
real = make_venv.run
make_venv.run = lambda command: real(command) if "venv" in command or "-c" in command[:2] else None
make_venv.venv_command, plain = lambda *a: plain(*a)[:3] + ["--without-pip"] + plain(*a)[3:], make_venv.venv_command
make_venv.ensure(Path({venv!r}), Path({root!r}), {{}})
"""


@pytest.mark.parametrize("gpu", [True, False])
def test_on_top_of_a_container_whose_python_is_a_virtual_environment(tmp_path, gpu):
    """ROCm's images keep torch in a virtual environment, below which --system-site-packages would not look."""
    container, venv = tmp_path / "container", tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(container)], check=True)
    packages = next(container.glob("lib/python*/site-packages"))
    info = packages / "torch-2.9.0+rocm7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0+rocm7\n")
    (packages / "torch.py").write_text(
        f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n    device_count = staticmethod(lambda: 8)\n"
    )
    for name in make_venv.INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CONSTRAINTS)
    code = IN_A_CONTAINER.format(tools=str(SCRIPT.parent), venv=str(venv), root=str(tmp_path))
    subprocess.run([str(container / "bin" / "python"), "-c", code], check=True, timeout=120)

    state = json.loads((venv / make_venv.STATE).read_text())
    assert (state["ready"], state["on_top"]) == (True, gpu)
    seen = subprocess.run([str(venv / "bin" / "python"), "-c", "import torch; print(torch.__file__)"], **CAPTURE)
    assert seen.stdout.strip() == (str(packages / "torch.py") if gpu else "")
    if gpu:
        assert "torch==2.9.0+rocm7" in (venv / "constraints.txt").read_text().splitlines()


CAPTURE = {"capture_output": True, "text": True, "timeout": 60}
