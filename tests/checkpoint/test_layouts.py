"""Saved in one layout and resumed in another, training goes on: the same samples in the same order, the same curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, execute, losses, tiny_run

from megatron_rocm.config.schema import RunConfig

TP2 = {"tp": 2, "sequence_parallel": True}
PP2 = {"pp": 2}
FSDP2 = {"dp": 2, "fsdp": True}
DP2 = {"dp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# From TP2 to each and back, a few steps in each: the layout and the last step. Neighbours of one size share processes.
WAY: list[tuple[dict[str, Any], int]] = [
    (TP2, 3), (PP2, 6), (TP2, 8), (FSDP2, 11), (TP2, 13), ({}, 16), (TP2, 18), (DP2, 20),
]  # fmt: skip
STEPS, BATCH = 20, 6
# Adam's first updates are the gradient's signs, in which rounding shows undamped: warmed up, as any run is.
COMMON: dict[str, Any] = {"global_batch_size": BATCH, "lr_warmup_iters": 10, "padded_vocab_size": 512}


def run_all(*runs: RunConfig) -> None:
    for run in runs:
        Path(run.launch.log_dir).mkdir(parents=True)
        run.save(Path(run.launch.log_dir) / "run.json")
    files = [str(Path(run.launch.log_dir) / "run.json") for run in runs]
    execute(runs[0], str(ROOT / "tests" / "checkpoint" / "sample_ids.py"), *files, timeout=300)


def ids(run: RunConfig) -> list[int]:
    """The samples of a run in the order of its micro batches, of which each rank takes one after the other."""
    found: dict[int, list[int]] = {}
    for file in Path(run.launch.log_dir).glob("ids.*.json"):
        told = json.loads(file.read_text())
        if told["ids"]:  # the first and the last stage of a pipeline read samples, and both the same
            assert found.setdefault(told["rank"], told["ids"]) == told["ids"]
    assert len(found) == run.parallel.dp
    return [number for together in zip(*(found[rank] for rank in sorted(found)), strict=True) for number in together]


@pytest.mark.timeout(600)
def test_there_and_back(tmp_path: Path) -> None:
    save = str(tmp_path / "saved")
    whole = tiny_run(tmp_path / "whole", train_iters=STEPS, **COMMON)
    runs = [tiny_run(tmp_path / f"to {last}", train_iters=last, save=save, **COMMON, **layout) for layout, last in WAY]
    run_all(*runs[:5])
    run_all(whole, runs[5])
    run_all(*runs[6:])
    assert ids(whole) == list(range(STEPS * BATCH))
    assert [number for run in runs for number in ids(run)] == ids(whole)
    found = [loss for run in runs for loss in losses(run)]
    assert len(found) == STEPS
    assert max(abs(a - b) for a, b in zip(found, losses(whole), strict=True)) < 5e-5
