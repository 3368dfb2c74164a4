"""examples/mlperf_405b's scripts: on this machine, in a fake Slurm, in a fake container."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "mlperf_405b"

# Write down how they were called, one argument a line.
TOOL = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$LOG"\nexit 5\n'
LAUNCHER = '#!/usr/bin/env bash\nprintf "%s\\n" "${0##*/}" "$@" >"$LOG"\nexit 6\n'


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose megatron-rocm writes down what it gets, a PATH with fake srun and podman, and data folders."""
    for folder in ("check out/tools", "check out/examples/mlperf_405b", "bin", "data/tokenizer", "data/merged"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("consolidate_data.sh", "preprocess.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "check out" / "examples" / "mlperf_405b")
    for path, text in (("check out/tools/megatron-rocm", TOOL), ("bin/srun", LAUNCHER), ("bin/podman", LAUNCHER)):
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    for tool in ("bash", "dirname", "mkdir"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def call(checkout, script, *arguments, cwd=None, **environment):
    """The exit status, stderr, and what the last program was called with."""
    log = checkout / "log"
    log.unlink(missing_ok=True)
    environment = {"PATH": str(checkout / "bin"), "LOG": str(log), **environment}
    path = script if isinstance(script, Path) else checkout / "check out" / "examples" / "mlperf_405b" / script
    done = subprocess.run(
        [shutil.which("bash"), str(path), *arguments],
        env=environment,
        cwd=cwd or checkout,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("script", "action"), [("consolidate_data.sh", "consolidate"), ("preprocess.sh", "preprocess")]
)
def test_on_this_machine(checkout, script, action):
    assert call(checkout, script, "C4_PATH=a b", "--shard", "0/9") == (
        5, "", ["data", "c4", action, "C4_PATH=a b", "--shard", "0/9"],
    )  # fmt: skip


@pytest.mark.parametrize("script", ["consolidate_data.sh", "preprocess.sh"])
def test_from_slurms_spool(checkout, script):
    """sbatch runs a copy: the checkout is where the job was submitted, and if it is not, that is said."""
    (checkout / "spool" / "job7").mkdir(parents=True)
    spooled = Path(shutil.copy(SCRIPTS / script, checkout / "spool" / "job7" / "slurm_script"))
    for submitted in ("check out", "check out/examples/mlperf_405b"):
        status, _, said = call(checkout, spooled, SLURM_SUBMIT_DIR=str(checkout / submitted))
        assert status == 5 and said[:2] == ["data", "c4"]
    status, error, _ = call(checkout, spooled, SLURM_SUBMIT_DIR=str(checkout / "data"))
    assert (
        status == 2 and error == f"{script}: tools/megatron-rocm is not found: submit from the checkout's top folder\n"
    )


def test_preprocess_in_a_slurm_job(checkout):
    status, error, said = call(checkout, "preprocess.sh", "SHARDS=6,7", SLURM_JOB_ID="7")
    tool = str(checkout / "check out" / "tools" / "megatron-rocm")
    assert (status, error) == (6, "")
    assert said == ["srun", "--ntasks-per-node=1", "--cpu-bind=none", tool, "data", "c4", "preprocess", "SHARDS=6,7"]


def folders(checkout):
    return {
        "TOKENIZER_PATH": str(checkout / "data" / "tokenizer"),
        "MERGED_C4_PATH": str(checkout / "data" / "merged"),
        "PREPROCESSED_PATH": str(checkout / "data" / "new"),
        "CONT_IMAGE_URL": "registry/image:1",
    }


def test_preprocess_in_slurms_container(checkout):
    environment = folders(checkout)
    status, _, said = call(checkout, "preprocess.sh", SLURM_JOB_ID="7", WORKERS="3", **environment)
    del environment["CONT_IMAGE_URL"]
    root = checkout / "check out"
    mounts = ",".join(f"{path}:{path}" for path in (root, *environment.values()))
    assert status == 6 and said == [
        "srun", "--ntasks-per-node=1", "--cpu-bind=none", "--container-image=registry/image:1",
        f"--container-mounts={mounts}", "--no-container-entrypoint", f"{root}/tools/megatron-rocm",
        "data", "c4", "preprocess", *(f"{name}={path}" for name, path in environment.items()), "WORKERS=3",
    ]  # fmt: skip
    assert (checkout / "data" / "new").is_dir()


def test_preprocess_in_a_container_of_this_machine(checkout):
    environment = folders(checkout)
    # Said as an argument, a folder is mounted as well.
    del environment["TOKENIZER_PATH"]
    status, _, said = call(checkout, "preprocess.sh", "TOKENIZER_PATH=data/tokenizer", **environment)
    tokenizer = f"{checkout}/data/tokenizer"
    assert status == 6 and said[:4] == ["podman", "run", "--rm", "--entrypoint"]
    assert f"{tokenizer}:{tokenizer}" in said and said[said.index("registry/image:1") + 1].endswith(
        "tools/megatron-rocm"
    )
    # The relative one comes first: the last word wins, and inside there is only the absolute one.
    assert said.index("TOKENIZER_PATH=data/tokenizer") < said.index(f"TOKENIZER_PATH={tokenizer}")


def test_what_a_container_lacks_is_told(checkout):
    environment = {**folders(checkout), "MERGED_C4_PATH": "/no/such"}
    status, error, said = call(checkout, "preprocess.sh", **environment)
    assert (
        status == 2 and error.startswith("preprocess.sh: MERGED_C4_PATH=/no/such: there is no such folder") and not said
    )
    (checkout / "bin" / "podman").unlink()
    status, error, _ = call(checkout, "preprocess.sh", **folders(checkout))
    assert status == 2 and "neither docker nor podman is on PATH" in error


@pytest.mark.parametrize("script", ["consolidate_data.sh", "preprocess.sh"])
def test_real_help_and_refusal(script):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_PATH")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    shown = subprocess.run([str(SCRIPTS / script), "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "MERGED_C4_PATH" in shown.stdout, shown.stderr
    refused = subprocess.run([str(SCRIPTS / script)], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and " is needed" in refused.stderr
