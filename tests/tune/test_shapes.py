"""The products of a step: against the count of its floating point operations, and against what torch multiplies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from support import ROOT, execute, tiny_run

from megatron_rocm.config import read
from megatron_rocm.config.schema import RunConfig
from megatron_rocm.plan.flops import flops_per_token
from megatron_rocm.platform.machine import find
from megatron_rocm.resolve import resolve
from megatron_rocm.tune.shapes import Gemm, gemms


def planned(*words: str) -> RunConfig:
    request = read("llama3", words, {}, ())
    return resolve(request, find(request.text("TARGET")), {}, dry_run=True).config


def by_name(run: RunConfig) -> dict[tuple[str, str], Gemm]:
    return {(gemm.name, gemm.phase): gemm for gemm in gemms(run)}


def test_8b() -> None:
    run = planned("MODEL_SIZE=8", "TARGET=mi300x", "TP=1", "MBS=2", "BS=32", "SEQ_LENGTH=8192")
    found = by_name(run)
    # hidden 4096, 32 heads and 8 groups of 128, ffn 14336, vocabulary 128256; 2 · 8192 tokens; 2 micro batches
    bf16 = {"dtype": "bf16", "out": "bf16", "accumulates": False, "by": "te"}
    assert found["qkv", "forward"] == Gemm("qkv", "forward", 6144, 16384, 4096, "TN", **bf16, count=64)
    assert found["fc1", "dgrad"] == Gemm("fc1", "dgrad", 4096, 16384, 28672, "NN", **bf16, count=64)
    into = bf16 | {"out": "fp32", "accumulates": True}
    assert found["fc2", "wgrad"] == Gemm("fc2", "wgrad", 14336, 4096, 16384, "NT", **into, count=64)
    assert found["head", "forward"] == Gemm(
        "head", "forward", 128256, 16384, 4096, "TN", **bf16 | {"by": "torch"}, count=2
    )
    assert found["head", "wgrad"].by == "apex" and len(found) == 15


def test_405b_over_its_layout() -> None:
    run = planned("MODEL_SIZE=405", "TARGET=mi300x", "NNODES=16", "CP=2", "SEQ_LENGTH=8192", "BS=128", "MBS=1")
    found = by_name(run)
    assert (run.parallel.tp, run.parallel.pp, run.parallel.dp) == (8, 8, 1)
    sizes = {name: (gemm.m, gemm.n, gemm.k) for (name, phase), gemm in found.items() if phase == "forward"}
    assert sizes == {
        "qkv": (2304, 4096, 16384), "proj": (16384, 4096, 2048), "fc1": (13312, 4096, 16384),
        "fc2": (16384, 4096, 6656), "head": (16128, 4096, 16384),  # the vocabulary padded to 129,024
    }  # fmt: skip
    assert found["fc1", "forward"].count == 16 * 128  # the fullest of 8 stages: 126 layers and 2 places


@pytest.mark.parametrize("words", (("TP=1",), ("TP=8", "MBS=4", "SEQ_LENGTH=4096"), ("TP=2", "CP=2", "FSDP=0")))
def test_operations_are_those_of_a_step(words: tuple[str, ...]) -> None:
    run = planned("MODEL_SIZE=8", "TARGET=mi300x", *words)
    tokens = run.training.global_batch_size * run.training.seq_length
    attention = 6 * run.model.num_layers * run.model.hidden_size * run.training.seq_length
    expected = (flops_per_token(run) - attention) * tokens / run.parallel.world_size
    assert sum(gemm.flops * gemm.count for gemm in gemms(run)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "times"),
    (
        ({}, {"qkv": 4, "fc1": 4}),
        ({"recompute": True}, {"qkv": 8, "fc1": 8}),
        ({"recompute": True, "recompute_num_layers": 1}, {"qkv": 5, "fc1": 5}),
        ({"recompute": True, "recompute_num_layers": 1, "recompute_method": "uniform"}, {"qkv": 8, "fc1": 8}),
        (
            {"recompute": True, "recompute_granularity": "selective", "recompute_modules": ("mlp",)},
            {"qkv": 4, "fc1": 8},
        ),
        ({"recompute": True, "recompute_granularity": "selective"}, {"qkv": 4, "fc1": 4}),
    ),
)
def test_recomputation_repeats_forward_products(words: dict[str, object], times: dict[str, int]) -> None:
    found = by_name(tiny_run(**words, global_batch_size=1))
    assert {name: found[name, "forward"].count for name in times} == times
    assert found["fc1", "dgrad"].count == 4


def test_a_step_multiplies_just_these(tmp_path: Path) -> None:
    """Every aten::mm of one training step, recorded below autograd."""
    run = tiny_run(tmp_path, train_iters=1, global_batch_size=2, micro_batch_size=1, recompute=True)
    file = tmp_path / "products.json"
    execute(run, str(ROOT / "tests" / "tune" / "record_products.py"), str(tmp_path / "run.json"), str(file))
    done = Counter(tuple(shape) for shape in json.loads(file.read_text()))
    expected = Counter[tuple[int, ...]]()
    for gemm in gemms(run):
        expected[gemm.n, gemm.k, gemm.m] += gemm.count
    assert done == expected
