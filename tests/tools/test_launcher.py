"""tools/megatron-rocm: the scripts' way to the command, from any folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "megatron-rocm"
CLI = "import sys\ndef main():\n    print(sys.argv[1:], 'json' in sys.modules)\n    import json\n    return 5\n"


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose .venv is this Python with another megatron_rocm."""
    package = tmp_path / "site" / "megatron_rocm"
    python = tmp_path / ".venv" / "bin" / "python"
    for folder in (package, python.parent, tmp_path / "tools", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(CLI)
    # -S: without this Python's own packages, of which the real megatron_rocm may be one.
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "tools")
    return tmp_path


def launch(checkout: Path, *arguments: str, script: str = "tools/megatron-rocm") -> subprocess.CompletedProcess:
    command = [str(checkout / script), *arguments]
    return subprocess.run(command, cwd=checkout / "elsewhere", capture_output=True, text=True, timeout=60)


def test_arguments_and_status_pass_through(checkout):
    done = launch(checkout, "train", "EXP_NAME=a 'b' $(touch bad)", "")
    assert done.stdout == "['train', \"EXP_NAME=a 'b' $(touch bad)\", ''] False\n"
    assert (done.returncode, done.stderr) == (5, "")
    assert not (checkout / "elsewhere" / "bad").exists()


def test_nothing_is_imported_from_the_current_folder(checkout):
    (checkout / "elsewhere" / "json.py").write_text("raise SystemExit('wrong json')\n")
    assert launch(checkout).returncode == 5


def test_a_link_to_it_works(checkout):
    (checkout / "elsewhere" / "link").symlink_to(checkout / "tools" / "megatron-rocm")
    assert launch(checkout, script="elsewhere/link").returncode == 5


@pytest.mark.parametrize(
    ("missing", "name"), [("import torch_that_is_not_there\n", "torch_that_is_not_there"), (None, "megatron_rocm")]
)
def test_what_is_not_installed_is_told_in_one_line(checkout, missing, name):
    if missing:
        (checkout / "site" / "megatron_rocm" / "cli.py").write_text(missing)
    else:
        shutil.rmtree(checkout / "site")
    done = launch(checkout)
    assert done.returncode == 2 and done.stdout == ""
    assert f"has no {name}: run make venv in {checkout}, or pip install {checkout}\n" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_fault_of_the_package_itself_is_not_hidden(checkout):
    (checkout / "site" / "megatron_rocm" / "cli.py").write_text("import megatron_rocm.gone\n")
    done = launch(checkout)
    assert done.returncode == 1 and "No module named 'megatron_rocm.gone'" in done.stderr
