"""FP16: a step whose gradient overflows changes nothing but the loss scale, in every layout and over a resume."""

from __future__ import annotations

from typing import Any

import pytest
from planting import left, planted, told
from support import losses, metrics, tiny_run

from megatron_rocm.config.schema import RunConfig

FP16 = {"dtype": "fp16", "train_iters": 12, "initial_loss_scale": 1024.0, "loss_scale_window": 2}
# In the third step far too large a scale: overflows follow until it has come down, and the window soon raises it again.
TOO_MUCH = {"sample": 9, "scale": 2.0**17}
PAIRS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2},
    "dp": {"dp": 2},
    "dp, sharded": {
        "dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("alone")
    saved = {"save": str(folder / "saved"), "save_interval": 4}
    settling = {"dtype": "fp16", "hysteresis": 1, "train_iters": 13, "initial_loss_scale": 2.0**20}
    fields: dict[str, dict[str, Any]] = {
        "fp32": {"train_iters": 2},
        "whole": {**FP16, **saved},
        "resumed": {**FP16, "load": str(folder / "saved" / "iter_0000004")},
        "settling": settling,
        "settled": settling,
        "static": {"dtype": "fp16", "loss_scale": 128.0, "train_iters": 2},
        "least": {"dtype": "fp16", "min_loss_scale": 2.0**30, "initial_loss_scale": 2.0**31, "hysteresis": 1},
    }
    runs = {name: tiny_run(folder / name, **of) for name, of in fields.items()}
    planted({"whole": TOO_MUCH, "settled": {"like": "settling"}}, *runs.values())
    return runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("pairs")
    runs = {name: tiny_run(folder / name, **FP16, **fields) for name, fields in PAIRS.items()}
    planted({name: TOO_MUCH for name in PAIRS}, *runs.values())
    return runs


def skips_rightly(run: RunConfig) -> None:
    """Every skipped step leaves weights, moments, step count and schedule alone; data and iterations go on."""
    steps = left(run, "steps.json")
    skipped = [number for number, step in enumerate(steps) if not step["updated"]]
    assert 3 <= len(skipped) <= 8 and skipped[:2] == [2, 3]
    for before, step in zip(steps, steps[1:], strict=False):
        assert (step["digest"] != before["digest"]) == step["updated"]
        assert (step["learning_rate"] != before["learning_rate"]) == before["updated"]
    assert [row["consumed_samples"] for row in metrics(run)] == [4 * number for number in range(1, 13)]
    lines = [line for line in told(run).splitlines() if " iteration " in line]
    for line, step in zip(lines, steps, strict=True):
        assert f"| loss scale: {step['loss_scale']:.1f} |" in line
        assert f"| number of skipped iterations:   {int(not step['updated'])} | number of nan iterations:   0 |" in line
        assert ("grad norm" in line) == step["updated"]


@pytest.mark.timeout(600)
def test_an_overflow_is_skipped(alone: dict[str, RunConfig]) -> None:
    skips_rightly(alone["whole"])
    scales = [step["loss_scale"] for step in left(alone["whole"], "steps.json")]
    # The first of the hysteresis' two overflows keeps the scale, each further one halves it.
    assert scales[1:5] == [2.0**11, 2.0**17, 2.0**16, 2.0**15]


@pytest.mark.timeout(600)
def test_resume_in_between_is_exact(alone: dict[str, RunConfig]) -> None:
    """In the midst of overflows: the scale and what it is raised and lowered by are the checkpoint's."""
    whole, resumed = (left(alone[name], "steps.json") for name in ("whole", "resumed"))
    assert not whole[3]["updated"] and any(step["updated"] for step in whole[4:])
    assert resumed == whole[4:]


@pytest.mark.timeout(600)
def test_after_overflows_as_if_begun_with_the_settled_scale(alone: dict[str, RunConfig]) -> None:
    settling, settled = (left(alone[name], "steps.json") for name in ("settling", "settled"))
    first = [step["updated"] for step in settling].index(True)
    assert 4 <= first <= 10
    rest = [{**step, "iteration": step["iteration"] - first} for step in settling[first:]]
    assert rest == settled[: len(rest)]


@pytest.mark.timeout(600)
def test_close_to_fp32_also_with_a_fixed_scale(alone: dict[str, RunConfig]) -> None:
    assert [step["loss_scale"] for step in left(alone["static"], "steps.json")] == [128.0, 128.0]
    for found, expected in zip(metrics(alone["static"]), metrics(alone["fp32"]), strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], abs=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-3)


@pytest.mark.timeout(600)
def test_an_overflow_at_the_least_scale_is_a_fault(alone: dict[str, RunConfig]) -> None:
    end = left(alone["least"], "end.json")
    assert end.startswith(
        "iteration 2: the gradient overflows at MIN_LOSS_SCALE=1.07374e+09, the least loss scale; first"
    )
    assert "NAN_POLICY=stop" in end


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PAIRS)
def test_ranks_agree(alone: dict[str, RunConfig], pairs: dict[str, RunConfig], name: str) -> None:
    skips_rightly(pairs[name])
    # Layouts round otherwise: FP16 numbers of the losses' size are 4e-3 apart.
    assert losses(pairs[name]) == pytest.approx(losses(alone["whole"]), abs=5e-3)
