"""`megatron-rocm parity`: what it prints and leaves, and that it catches faults planted in a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, parity

from megatron_rocm.cli import main
from megatron_rocm.parity import compare

SMALL = ["SEQ_LENGTH=32", "BS=4", "--layers", "2", "--steps", "3"]
PLANTED = {
    "dp2": "gradients not reduced over data parallel ranks",
    "dp2-sharded": "gradients divided by the data parallel size once more",
    "tp2-sp": "gradients of norms not reduced over tensor parallel ranks",
    "pp2": "another rotary base",
    "dp2-overlap": "no update",
}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has the layouts in a dictionary measured with its faults."""

    def with_faults(faults: dict[str, str]) -> None:
        monkeypatch.setattr(compare, "WORKER", "parity.faults")
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
        monkeypatch.setenv("PLANTED", json.dumps(faults))

    return with_faults


@pytest.mark.timeout(500)
def test_planted_faults_are_caught(tmp_path: Path, plant: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plant({**PLANTED, "tp2": "a crash"})
    status, rows = parity(tmp_path, *SMALL, "--layouts", ",".join([*PLANTED, "tp2", "cp2"]))
    assert status == 1
    assert rows["tp2"]["verdict"] == "CRASHED"
    assert "RuntimeError: planted" in rows["tp2"]["note"]
    assert {name for name, row in rows.items() if row["verdict"] == "MISMATCH"} == set(PLANTED)
    assert rows["one-process"]["verdict"] == rows["cp2"]["verdict"] == "ok"
    apart = {name: row["differences"] for name, row in rows.items()}
    # Half the gradient in every parameter: Adam and clipping make the same update of it, so that the loss is right.
    assert apart["dp2-sharded"]["gradient"] == pytest.approx(0.5, abs=1e-4)
    assert apart["dp2-sharded"]["norm"] == pytest.approx(0.5, abs=1e-4)
    assert apart["dp2-sharded"]["loss"] < 1e-3
    assert "layernorm" in apart["tp2-sp"]["parameter"]
    assert max(rows["dp2-overlap"]["gradients"].values()) < 1e-5  # they are right, what is made of them is not
    printed = capsys.readouterr().out
    assert f"failed: {', '.join(name for name in rows if name in (*PLANTED, 'tp2'))}" in printed
    assert not (tmp_path / "gradients").exists()


@pytest.mark.timeout(300)
def test_a_fault_in_all_layouts_is_caught_by_transformers(tmp_path: Path, plant: Any) -> None:
    plant({"one-process": "another rotary base"})
    status, rows = parity(tmp_path, *SMALL, "--layouts", "one-process")
    assert status == 1
    assert rows["one-process"]["verdict"] == "MISMATCH"
    assert rows["one-process"]["differences"]["gradient"] > 1e-2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layouts", "tp3"], "no such layout; there are one-process, recompute"),
        (["--steps", "0"], "argument --steps: invalid whole number above 0 value: '0'"),
        (["--step", "3"], "unrecognized arguments: --step"),
        (["MODEL_SIZE=70", "TARGET=cpu"], "fewer layers"),
        (["--layers", "5"], "--layers 5: Llama 3 tiny has 4 layers"),
        (["--layouts", "as-asked"], "--layouts as-asked: no layout was asked for"),
    ],
)
def test_mistakes_end_with_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_names_what_runs_and_why_the_rest_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    assert main(["parity", "TARGET=cpu", "LAYERS=3", "TP=4", "CP=2"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "TP=2 SEQ_PARALLEL=1" in lines["tp2-sp"]
    assert "skipped" not in lines["cp2"]
    assert "skipped: PP=2 with VPP=2 leaves a stage without layers" in lines["vpp2"]
    assert "skipped: more than 2 processes" in lines["tp2-pp2"]
    assert lines["as-asked"].split()[1:3] == ["8", "TP=4"]


@pytest.mark.parametrize("processes", [3, 5, 7])
def test_an_odd_number_of_processes_leaves_no_layout_out(
    processes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    assert main(["parity", "TARGET=cpu", "--processes", str(processes)]) == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert skipped and all("more than" in line for line in skipped)


def test_help_is_instant_and_lists_the_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--help"]) == 0
    assert "megatron-fsdp2" in capsys.readouterr().out
