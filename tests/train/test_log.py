"""What a run tells, in the format that tools for Megatron-LM read."""

from __future__ import annotations

import json
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
from support import tiny_run

from megatron_rocm.errors import UsageError
from megatron_rocm.train import log
from megatron_rocm.train.batches import Indices
from megatron_rocm.train.curve import draw
from megatron_rocm.train.faults import Fault
from megatron_rocm.train.step import Result
from megatron_rocm.train.summary import summary


def line(ms: float, tflops: float = 1.0, memory: float = 0.5) -> str:
    return (
        f" [2026-11-22 04:00:00] iteration        5/      30 | elapsed time per iteration (ms): {ms} | "
        f"throughput per GPU (TFLOP/s/GPU): {tflops} | global batch size:     8 | mem usages: {memory} |"
    )


def speaking(monkeypatch: pytest.MonkeyPatch, folder: Path, start: int = 0, **fields: Any) -> log.Log:
    monkeypatch.setattr(log.dist, "get_rank", lambda: 0)
    return log.Log(tiny_run(folder, **fields), start)


def at(iteration: int) -> Any:
    return types.SimpleNamespace(iteration=iteration, consumed_samples=4 * iteration)


def test_megatron_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = speaking(monkeypatch, tmp_path, train_iters=30)
    speaker.step(at(5), Result(6.312345678, 1.23456, 1e-4, False, 4), 0.8123)
    text = capsys.readouterr().out
    expected = (
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration        5/      30 \| consumed samples:           20 \|"
        r" elapsed time per iteration \(ms\): 812.3 \| throughput per GPU \(TFLOP/s/GPU\): [0-9.]+ \|"
        r" learning rate: 1.000000E-04 \| global batch size:     4 \| lm loss: 6.312346E\+00 \| loss scale: 1.0 \|"
        r" grad norm: 1.235 \| number of skipped iterations:   0 \| number of nan iterations:   0 \|"
        r" mem usages: 0.\d{4} \| time left: 0:00:20 \|\n"
    )
    assert re.fullmatch(expected, text), text


def test_a_line_is_the_mean_of_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = speaking(monkeypatch, tmp_path, train_iters=3, log_interval=2)
    for iteration, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
        speaker.step(at(iteration), Result(loss, 1.0, 1e-3, False, 4), 0.1 * iteration)
    speaker.close()
    lines = [text for text in capsys.readouterr().out.splitlines() if "lm loss" in text]
    assert len(lines) == 2
    assert "lm loss: 3.000000E+00" in lines[0] and "(ms): 150.0" in lines[0]
    assert "lm loss: 1.000000E+00" in lines[1]
    rows = [json.loads(row) for row in (tmp_path / log.METRICS).read_text().splitlines()]
    assert [row["lm_loss"] for row in rows] == [4.0, 2.0, 1.0]


def test_skipped_and_nan_steps_are_counted_from_line_to_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = speaking(monkeypatch, tmp_path, train_iters=4, log_interval=2)
    nan = Fault("nan", "skip", "")
    for iteration, result in enumerate(
        (
            Result(3.0, math.nan, 1e-3, False, 4, loss_scale=512.0, updated=False),
            Result(math.nan, math.nan, 1e-3, False, 4, loss_scale=512.0, updated=False, fault=nan),
            Result(math.nan, math.nan, 1e-3, False, 4, loss_scale=512.0, updated=False, fault=nan),
            Result(2.0, 1.5, 1e-3, False, 4, loss_scale=512.0),
        ),
        start=1,
    ):
        speaker.step(at(iteration), result, 0.1)
    first, second = (text for text in capsys.readouterr().out.splitlines() if "lm loss" in text)
    assert "loss scale: 512.0 | number of skipped iterations:   2 | number of nan iterations:   1 |" in first
    assert (
        "lm loss: 2.000000E+00 | loss scale: 512.0 | grad norm: 1.500 | number of skipped iterations:   1 |" in second
    )


def test_a_growing_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Time left and throughput go by samples: 10 more of 0.1 seconds each, 2 in the last step but one."""
    speaker = speaking(monkeypatch, tmp_path, train_iters=5, rampup=(2, 2, 6))
    for iteration, consumed in ((1, 2), (2, 4)):
        state = types.SimpleNamespace(iteration=iteration, consumed_samples=consumed)
        speaker.step(state, Result(1.0, 1.0, 1e-3, False, 2), 0.2)
    text = capsys.readouterr().out.splitlines()[-1]
    assert "global batch size:     2 |" in text and "time left: 0:00:01 |" in text
    assert speaker.sinks and json.loads((tmp_path / log.METRICS).read_text().splitlines()[0])[
        "tokens_per_gpu_per_s"
    ] == pytest.approx(2 * 32 / 0.2)


def test_steps_that_are_trained_anew_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = speaking(monkeypatch, tmp_path, train_iters=9)
    for iteration in (1, 2, 3, 4):
        speaker.step(at(iteration), Result(float(iteration), 1.0, 1e-3, False, 4), 0.1)
    speaker.rewind(at(2))
    speaker.step(at(3), Result(30.0, 1.0, 1e-3, False, 4), 0.1)
    rows = [json.loads(row) for row in (tmp_path / log.METRICS).read_text().splitlines()]
    assert [(row["iteration"], row["lm_loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_validation_loss_that_is_no_number_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaking(monkeypatch, tmp_path).evaluation(at(2), math.nan)
    text = capsys.readouterr().out
    assert "lm loss PPL: NAN" in text and "warning: the validation loss is not finite" in text


def test_other_ranks_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log.dist, "get_rank", lambda: 1)
    speaker = log.Log(tiny_run(tmp_path), 0)
    speaker.step(at(1), Result(1.0, 1.0, 1e-3, False, 4), 0.1)
    speaker.evaluation(at(1), 2.0)
    speaker.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_metrics_keep_every_digit_and_each_iteration_once(tmp_path: Path) -> None:
    path = tmp_path / log.METRICS
    first = log.JsonLines(path, 0)
    for iteration in (1, 2, 3):
        first.write({"lm_loss": 0.1 + 0.2 * iteration}, iteration)
    first.close()
    with open(path, "a") as file:
        file.write('{"iteration": 4, "lm_l')  # killed while writing
    second = log.JsonLines(path, 2)
    second.write({"lm_loss": 0.7}, 3)
    second.close()
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert rows == [{"iteration": i, "lm_loss": x} for i, x in ((1, 0.1 + 0.2), (2, 0.1 + 0.4), (3, 0.7))]


def test_a_fresh_start_forgets_an_older_run(tmp_path: Path) -> None:
    path = tmp_path / log.METRICS
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n')
    log.JsonLines(path, 0).close()
    assert path.read_text() == ""


def test_weights_and_biases_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"WANDB_API_KEY is set.*pip install 'megatron-rocm\[wandb\]'"):
        log.require_sinks(tiny_run(wandb=True))
    log.require_sinks(tiny_run())


def test_summary_leaves_out_the_first_two_and_the_last() -> None:
    lines = [line(9999), line(9999), line(100, 3.0, 0.25), "noise", line(300, 5.0, 0.75), line(9999)]
    assert summary(lines, seq_length=1000, world_size=2) == [
        "throughput per GPU: 4.00",
        "elapsed time per iteration: 200.00",
        "tokens/GPU/s: 20000.0",
        "mem usages: 0.5000",
    ]


def test_summary_of_short_runs() -> None:
    assert summary([], 1, 1) == summary(["no iteration"], 1, 1) == []
    assert summary([line(100)], 1000, 1)[1] == "elapsed time per iteration: 100.00"
    assert summary([line(9999), line(100)], 1000, 1)[1] == "elapsed time per iteration: 100.00"


def test_a_curve_of_one_point(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\n')
    draw(tmp_path / "m.jsonl", tmp_path / "loss.png", "one")
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_a_step_takes_the_same_samples_in_every_layout(ranks: int, size: int) -> None:
    batch, start = 8, 24
    taken: list[int] = []
    for rank in range(ranks):
        batches = iter(Indices(start, size, rank, ranks))
        for _ in range(batch // (ranks * size)):
            taken += next(batches)
    assert sorted(taken) == list(range(start, start + batch))
