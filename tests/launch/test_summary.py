"""NO_TRAINING=1 over the log of a run that is over."""

from pathlib import Path

import pytest

from megatron_rocm import cli
from megatron_rocm.config.request import read
from megatron_rocm.platform import machine
from megatron_rocm.resolve import resolve

LINE = (
    " [2026-11-22 04:12:20] iteration {n:8d}/       6 | consumed samples:          160 |"
    " elapsed time per iteration (ms): {ms:.1f} | throughput per GPU (TFLOP/s/GPU): {tflops} |"
    " learning rate: 1.000000E-04 | global batch size:    16 | lm loss: 7.908938E+00 | mem usages: 0.5000 |\n"
)


def test_the_first_two_steps_and_the_last_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = resolve(read("llama3", [f"LOG_DIR={tmp_path}", "MODEL_SIZE=tiny"], {}), machine.find("cpu")).config
    run.save(tmp_path / "run.json")
    steps = [(9000, 1), (9000, 1), (100, 10), (300, 20), (9000, 1)]
    lines = [LINE.format(n=n, ms=ms, tflops=tflops) for n, (ms, tflops) in enumerate(steps, 1)]
    (tmp_path / "output_perf.log").write_text("noise\n" + "".join(lines))
    assert cli.main(["train", "--family", "llama3", "NO_TRAINING=1", f"LOG_DIR={tmp_path}"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "throughput per GPU: 15.00"
    assert output[1] == "elapsed time per iteration: 200.00"
    assert output[2] == f"tokens/GPU/s: {16 * 256 * 1000 / 200:.1f}"
    assert output[3].startswith("mem usages: 0.5")


@pytest.mark.parametrize("words", [[], ["LOG_DIR=/nowhere"]])
def test_without_a_run_it_says_what_is_missing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--family", "llama3", "NO_TRAINING=1", *words]) == 2
    assert "LOG_DIR" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", "3", "{", '{"hash": "x"}', '{"hash": "x", "model": {}}'])
def test_a_run_json_that_no_run_wrote_is_one_message(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(text)
    assert cli.main(["train", "--family", "llama3", "NO_TRAINING=1", f"LOG_DIR={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and f"LOG_DIR={tmp_path}: run.json can't be used: " in told
