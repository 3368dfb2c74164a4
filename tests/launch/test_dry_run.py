"""DRY_RUN=1 and --help through the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, environment

from megatron_rocm import cli
from megatron_rocm.config.others import OTHERS
from megatron_rocm.config.schema import variables

WITHOUT_TORCH = """
import sys
from megatron_rocm import cli
status = cli.main(sys.argv[1:])
loaded = [name for name in ("torch", "transformers", "megatron", "megatron.core") if name in sys.modules]
print("loaded", loaded)
sys.exit(status)
"""


def command(*words: str, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], cwd=cwd, env=environment(**more), capture_output=True, text=True
    )


def test_dry_run_tells_all_and_starts_nothing(tmp_path: Path) -> None:
    done = command("train", "--family", "llama3", "MODEL_SIZE=tiny", "LR=1e-3", "DRY_RUN=1", cwd=tmp_path, TP="1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["LR", "0.001", "argument"] in rows
    assert ["TP", "1", "environment"] in rows
    assert any(row[:1] == ["OMP_NUM_THREADS"] for row in rows)
    assert "-m megatron_rocm.launch.torchrun --nnodes 1 --node-rank 0" in done.stdout
    assert done.stdout.endswith("loaded []\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [(), ("TP=8", "PP=8", "VPP=8")])
def test_405_on_16_nodes_tells_each_node_what_to_type(layout: tuple[str, ...]) -> None:
    done = command("train", "--family", "llama3", "MODEL_SIZE=405", "NNODES=16", "TARGET=mi300x", "DRY_RUN=1", *layout)
    assert done.returncode == 0, done.stderr
    lines = done.stdout[done.stdout.index("on each node") :].splitlines()[1:17]
    for rank, line in enumerate(lines):
        assert f"NODE_RANK={rank} " in line and "train_llama3.sh" in line
    assert "--nnodes 16 --node-rank 0 --nproc-per-node 8" in done.stdout


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_help_lists_every_variable(family: str) -> None:
    done = command("train", "--family", family, "--help")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert done.stdout.endswith("loaded []\n")
    assert {variable.name for variable in variables()} | {other.name for other in OTHERS} <= listed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "no such command"),
        (["train", "--family", "llama4"], "--family llama4: choose"),
        (["train", "--family", "llama3", "MODLE_SIZE=8"], "did you mean MODEL_SIZE"),
        (["train", "--family", "llama3", "--bogus"], "--bogus"),
    ],
)
def test_mistakes_are_one_message_and_status_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    shell = f'"{sys.executable}" -m megatron_rocm.cli train --help | head -1'
    done = subprocess.run(["bash", "-c", shell], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(("nodes", "lines"), [(2, 2), (64, 64), (512, 4)])
def test_the_plan_of_many_nodes_stays_short(nodes: int, lines: int) -> None:
    done = command("train", "--family", "llama3", "MODEL_SIZE=8", f"NNODES={nodes}", "TARGET=mi300x", "DRY_RUN=1")
    shown = done.stdout[done.stdout.index("on each node") :].splitlines()[1:]
    assert len([line for line in shown if "NODE_RANK=" in line]) == lines


def test_an_empty_setting_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rocm.config import read
    from megatron_rocm.launch.run import environment
    from megatron_rocm.platform.machine import find
    from megatron_rocm.resolve import resolve

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for fsdp, left in (("1", None), ("0", "1")):
        request = read("llama3", ["MODEL_SIZE=8", f"FSDP={fsdp}"], {})
        resolution = resolve(request, find("mi300x"), dict(os.environ), dry_run=True)
        assert environment(resolution, Path("log")).get("CUDA_DEVICE_MAX_CONNECTIONS") == left
