"""The demo: its bookkeeping, and one short run of all its stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

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


@pytest.mark.parametrize("text", [None, "", '{"iteration": 1, "lm_loss": 7.0}\n'])
def test_validation_losses_that_are_gone_are_said_so(
    folder: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.METRICS.unlink() if text is None else demo.METRICS.write_text(text)
    assert cli.main(["demo"]) == 0
    output = capsys.readouterr().out
    assert f"validation loss not in {demo.METRICS}" in output and "done before" in output


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


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"asked": {}}'])
def test_a_damaged_mark_is_no_mark(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.DONE.write_text(text)
    monkeypatch.setattr(demo, "_script", lambda *_: 7)
    assert cli.main(["demo"]) == 7


def test_it_keeps_to_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "LOG_DIR=elsewhere"]) == 2
    assert f"LOG_DIR=elsewhere: the demo keeps to {demo.FOLDER}" in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_all_stages(tmp_path: Path) -> None:
    """What was trained is what is exported, and writes something; a second call has nothing left to do."""
    keys = ["TOTAL_ITERS=4", "EVAL_INTERVAL=2", "EVAL_ITERS=1", "SAVE_INTERVAL=2", "LOG_INTERVAL=1", "MBS=2", "BS=2"]

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_rocm.cli", "demo", *keys], cwd=tmp_path, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    output = run()
    assert "the two sides agree" in output
    assert output.count("  > ") == 3
    folder = tmp_path / demo.FOLDER
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / demo.CHECKPOINTS / "latest_checkpointed_iteration.txt").read_text() == "4"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / demo.EXPORT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / demo.EXPORT)
    assert model.config.vocab_size == len(tokenizer) == 4096

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "done before" in run()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
