"""The demo's bookkeeping; `make demo` is the test of the rest."""

import json
from pathlib import Path

import pytest

from megatron_rocm import cli, demo


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    demo.FOLDER.mkdir(parents=True)
    rows = [
        {"iteration": 0, "validation_loss": 8.0},
        {"iteration": 1, "lm_loss": 7.0},
        {"iteration": 9, "validation_loss": 4.0},
    ]
    (demo.FOLDER / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    demo.DONE.write_text(json.dumps({"asked": demo.TRAIN, "lines": ["once upon a time"]}))
    return tmp_path


def test_a_second_call_says_that_it_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 0
    output = capsys.readouterr().out
    assert "8.000 → 4.000 (50% of the start)" in output and "'once upon a time'" in output and "done before" in output


def test_other_settings_train_anew_and_a_failed_stage_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        demo, "_script", lambda command, script, pairs: calls.append((command, pairs)) or len(calls) - 1
    )
    assert cli.main(["demo", "SEED=7"]) == 1
    assert [command for command, _ in calls] == ["prepare", "train"]
    assert calls[1][1]["SEED"] == "7" and calls[1][1]["MODEL_SIZE"] == "tiny"


def test_a_word_that_is_no_pair_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "faster"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
