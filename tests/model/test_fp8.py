"""FP8 where Transformer Engine is there: what it can't do is told before a model is built; weights kept in FP8."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor
from support import tiny_run

from megatron_rocm.checkpoint import state
from megatron_rocm.errors import UsageError
from megatron_rocm.model import fp8


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[bool, str]]:
    """A Transformer Engine with all symbols; what it answers of the GPU is the test's."""
    answers = {question: (True, "") for question in fp8.QUESTIONS.values()}
    module: Any = ModuleType("transformer_engine.pytorch.fp8")
    module.FP8GlobalStateManager = SimpleNamespace(
        **{question: lambda question=question: answers[question] for question in answers}
    )
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fp8.transformer_engine, "missing", lambda uses: [])
    return answers


@pytest.mark.parametrize("recipe", fp8.QUESTIONS)
def test_a_gpu_that_the_library_refuses_is_told_in_its_words(engine: dict[str, tuple[bool, str]], recipe: str) -> None:
    run = tiny_run(enabled=True, recipe=recipe)
    fp8.require(run)
    engine[fp8.QUESTIONS[recipe]] = (False, "CUDA is too old")
    with pytest.raises(UsageError, match=rf"TE_FP8_RECIPE={recipe}: .*\(CUDA is too old\); set another"):
        fp8.require(run)


@pytest.mark.parametrize(
    ("fields", "uses"),
    [
        ({"recipe": "mxfp8"}, ["fp8", "fp8 mxfp8"]),
        (
            {"recipe": "delayed", "param_gather": True, "recompute": True},
            ["fp8", "fp8 delayed", "fp8 parameters", "recompute"],
        ),
    ],
)
def test_what_the_library_lacks_is_told(
    engine: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], uses: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fp8.transformer_engine, "missing", lambda uses: asked.extend(uses) or ["Format is missing"])
    with pytest.raises(UsageError, match="Format is missing"):
        fp8.require(tiny_run(enabled=True, **fields))
    assert asked == uses and set(uses) <= set(fp8.transformer_engine.USES)


class Quantized(torch.Tensor):
    """Stands for a weight that Transformer Engine keeps in FP8, with its initial value beside it (module/base.py)."""

    def __init__(self, *_: Any) -> None:
        self.initial = torch.zeros(2, 2, dtype=torch.bfloat16)

    def get_high_precision_init_val(self) -> torch.Tensor:
        return self.initial


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Quantized:
    monkeypatch.setattr(fp8, "is_float8tensor", lambda value: isinstance(value, Quantized))
    monkeypatch.setattr(fp8, "dequantize_fp8_tensor", lambda value: value.as_subclass(torch.Tensor) + 1)
    return Quantized(torch.zeros(2, 2))


def test_the_master_copy_begins_with_our_initial_value(quantized: Quantized) -> None:
    values = torch.full((2, 2), 1.5)
    fp8.set_weight(quantized, values)
    assert quantized.as_subclass(torch.Tensor).equal(values)
    assert quantized.initial.equal(values.bfloat16())


def test_a_checkpoint_holds_what_fp8_stands_for(quantized: Quantized) -> None:
    plain = torch.ones(2, 2)
    extra = ShardedObject("extra", b"state", (1,), (0,))
    entries = {
        "quantized": ShardedTensor.from_rank_offsets("quantized", quantized),
        "plain": ShardedTensor.from_rank_offsets("plain", plain),
        "extra": extra,
    }
    fp8.without_fp8(entries)
    assert type(entries["quantized"].data) is torch.Tensor and entries["quantized"].data.equal(plain)
    assert entries["plain"].data is plain and extra.data == b"state"


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"fp8": None, "fp8_recipe": "delayed"}, False),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, True),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, False),
    ],
)
def test_scales_are_loaded_where_there_are_any(config: dict[str, Any], scales: bool) -> None:
    """And nothing else of what Transformer Engine would unpickle."""
    assert fp8.scaled_with_delay(SimpleNamespace(**config)) == scales  # type: ignore[arg-type]
    extra = ShardedObject("extra", b"mine", (1,), (0,))
    there = state._as_stored({"extra": extra}, {extra.unique_key}, scales=scales)["extra"]
    assert there is extra if scales else isinstance(there, LocalNonpersistentObject) and there.unwrap() == b"mine"
    absent = state._as_stored({"extra": extra}, set(), scales=scales)["extra"]
    assert isinstance(absent, LocalNonpersistentObject)
