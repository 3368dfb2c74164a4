"""The course of a run: batch size and learning rate by step, over a resume, and the same in every repetition."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support import losses, metrics, tiny_run, train_all

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.train import ramp

LR, MIN_LR, WARMUP, DECAY = 3e-3, 3e-4, 2, 10
RAMP = {"rampup": (2, 2, 20), "global_batch_size": 8, "train_iters": 8}
SIZES = [2, 2, 2, 2, 4, 4, 6, 8]  # 3 increments, one each 20/3 samples: after 7, 14 and 20
PAIRS: dict[str, dict[str, Any]] = {"dp": {"dp": 2}, "vpp": {"pp": 2, "vpp": 2}}


def stretched(share: float) -> float:
    return MIN_LR + share * (LR - MIN_LR)


# Style: fields, and the learning rate at a step from the end of the warmup on to that of the decay.
STYLES: dict[str, tuple[dict[str, Any], Any]] = {
    "cosine": ({}, lambda step: stretched((math.cos(math.pi * (step - WARMUP) / (DECAY - WARMUP)) + 1) / 2)),
    "linear": ({}, lambda step: stretched(1 - (step - WARMUP) / (DECAY - WARMUP))),
    "constant": ({}, lambda step: LR),
    "WSD": ({}, lambda step: stretched(min(1, 2 * 0.5 ** (step - 9) - 1))),
    "WSD, linear": ({"wsd_decay_iters": 4}, lambda step: stretched(min(1, 1 - (step - 6) / 4))),
    "WSD, cosine": (
        {"wsd_decay_iters": 4},
        lambda step: stretched((math.cos(math.pi * max(0, step - 6) / 4) + 1) / 2),
    ),
    "WSD, minus_sqrt": ({"wsd_decay_iters": 4}, lambda step: stretched(1 - math.sqrt(max(0, step - 6) / 4))),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """All runs, those of one process trained in one start, those of two in another."""
    folder = tmp_path_factory.mktemp("course")
    alone = {
        "ramp": tiny_run(folder / "ramp", **RAMP, save=str(folder / "ramped"), save_interval=5, eval_iters=1),
        "ramp, resumed": tiny_run(
            folder / "resumed", **RAMP, load=str(folder / "ramped" / "iter_0000005"), eval_iters=1
        ),
    }
    for name in ("first", "second"):
        alone[name] = tiny_run(folder / name, deterministic=True, train_iters=3)
    for name, (fields, _) in STYLES.items():
        style, _, decay = name.partition(", ")
        course = {
            "lr_decay_style": style, **({"wsd_decay_style": decay} if decay else {}), "lr_warmup_iters": WARMUP,
            "lr_decay_iters": DECAY, "train_iters": 12, "global_batch_size": 1, "num_layers": 1, "seq_length": 8,
            **fields,
        }  # fmt: skip
        saved = folder / "saved" / name
        alone[name] = tiny_run(folder / name, **course, save=str(saved), save_interval=7)
        alone[f"{name}, resumed"] = tiny_run(folder / f"{name}, resumed", **course, load=str(saved / "iter_0000007"))
    train_all(*alone.values())
    pairs = {name: tiny_run(folder / name, **RAMP, **fields) for name, fields in PAIRS.items()}
    train_all(*pairs.values())
    return alone | pairs


def values(run: RunConfig, field: str) -> list[Any]:
    return [row[field] for row in metrics(run) if field in row]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STYLES)
def test_learning_rate(runs: dict[str, RunConfig], name: str) -> None:
    """The update of step n, counted from 0, uses the rate at n; past the decay's end it stays."""
    course = STYLES[name][1]
    expected = [LR * step / WARMUP if step < WARMUP else course(min(step, DECAY)) for step in range(12)]
    assert values(runs[name], "learning_rate") == pytest.approx(expected, rel=1e-12)
    assert values(runs[f"{name}, resumed"], "learning_rate") == values(runs[name], "learning_rate")[7:]
    assert losses(runs[f"{name}, resumed"]) == losses(runs[name])[7:]


@pytest.mark.timeout(600)
def test_ramp_up(runs: dict[str, RunConfig]) -> None:
    """Batches grow over consecutive samples; a resume in the middle goes on exactly."""
    whole, resumed = runs["ramp"], runs["ramp, resumed"]
    assert values(whole, "global_batch_size") == SIZES
    assert values(whole, "consumed_samples") == [sum(SIZES[: step + 1]) for step in range(8)]
    assert losses(resumed) == losses(whole)[5:]
    assert values(resumed, "global_batch_size") == SIZES[5:]
    assert values(resumed, "validation_loss")[-1] == values(whole, "validation_loss")[-1]
    # By iterations, whatever their size.
    assert values(whole, "learning_rate")[3] == pytest.approx(3e-4 + 2.7e-3 * (math.cos(math.pi * 0.03) + 1) / 2)
    for row, size in zip((row for row in metrics(whole) if "lm_loss" in row), SIZES, strict=True):
        assert row["tokens_per_gpu_per_s"] == pytest.approx(size * 32 / (row["iteration_ms"] / 1000))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PAIRS)
def test_ramp_up_in_every_layout(runs: dict[str, RunConfig], name: str) -> None:
    assert values(runs[name], "global_batch_size") == SIZES
    assert losses(runs[name]) == pytest.approx(losses(runs["ramp"]), abs=2e-5)


@pytest.mark.timeout(600)
def test_deterministic_mode(runs: dict[str, RunConfig]) -> None:
    assert losses(runs["first"]) == losses(runs["second"])
    assert values(runs["first"], "grad_norm") == values(runs["second"], "grad_norm")


def test_deterministic_mode_reaches_megatron_core() -> None:
    from megatron_rocm.model.build import transformer_config

    gpu = {"vendor": "nvidia", "dtype": "bf16"}
    assert transformer_config(tiny_run(**gpu)).cross_entropy_loss_fusion
    config = transformer_config(tiny_run(**gpu, deterministic=True))
    assert config.deterministic_mode and not config.cross_entropy_loss_fusion


@pytest.mark.parametrize("rampup", [(2, 2, 20), (8, 8, 1000), (4, 4, 777), (16, 16, 5), (64, 8, 100)])
def test_ramp_up_as_megatron(rampup: tuple[int, int, int]) -> None:
    """The same batch sizes as megatron-core's calculator, which the run asks before each step."""
    training = tiny_run(rampup=rampup, global_batch_size=64).training
    if rampup[0] == 64:  # it divides by no increments
        assert ramp.batch_size(training, 0) == 64
        return
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    calculator = RampupBatchsizeNumMicroBatchesCalculator(64, 1, 1, False, 1, *rampup)
    consumed, steps = 0, 0
    while consumed <= rampup[2] + 200:
        calculator.update(consumed, False)
        assert ramp.batch_size(training, consumed) == calculator.get_current_global_batch_size()
        assert ramp.micro_batches(training, consumed) == calculator.get()
        assert ramp.samples_of(training, 0, steps) == consumed
        consumed, steps = consumed + ramp.batch_size(training, consumed), steps + 1


def test_no_ramp_up() -> None:
    training = tiny_run().training
    assert ramp.batch_size(training, 0) == 4 and ramp.samples_of(training, 12, 3) == 12
