"""Right results pass the judge, whatever the order of their sums; results that are wrong in one way each do not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rocm.tune import products
from megatron_rocm.tune.judge import INPUTS, Verdict, half_unit, judge
from megatron_rocm.tune.shapes import Dtype, Gemm, Layout

CPU = torch.device("cpu")
LONG = 8192  # terms of a sum: as long as a large model's


def gemm(
    dtype: Dtype = "bf16", out: Dtype | None = None, k: int = LONG, m: int = 96, n: int = 80, layout: Layout = "TN",
    accumulates: bool = False,
) -> Gemm:  # fmt: skip
    return Gemm("fc1", "forward", m, n, k, layout, dtype, out or dtype, accumulates, count=1)


BF16, INTO = gemm(), gemm(out="fp32", layout="NT", accumulates=True)


def once(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """Sums in FP32, one rounding."""
    left, right = products.factors(one, a, b)
    whole = left.float() @ right.float()
    return (whole if into is None else into.float() + whole).to(products.DTYPES[one.out])


def in_turn(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """The same, terms added one after the other in groups of 8, as matrix cores do."""
    left, right = (factor.float() for factor in products.factors(one, a, b))
    whole = torch.zeros(one.n, one.m) if into is None else into.float().clone()
    for first in range(0, one.k, 8):
        whole += left[:, first : first + 8] @ right[first : first + 8]
    return whole.to(products.DTYPES[one.out])


def cut_off(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """The same, with every partial sum cut to 24 bits toward zero instead of rounded, as some matrix cores do."""
    left, right = (factor.double() for factor in products.factors(one, a, b))
    whole = torch.zeros(one.n, one.m, dtype=torch.float64) if into is None else into.double().clone()
    for first in range(0, one.k, 8):
        whole += left[:, first : first + 8] @ right[first : first + 8]
        rounded = whole.float()
        over = rounded.double().abs() > whole.abs()
        whole = torch.where(over, rounded.nextafter(torch.zeros(())), rounded).double()
    return whole.to(products.DTYPES[one.out])


RIGHT = {
    "bf16": (BF16, once), "bf16, in turn": (BF16, in_turn), "bf16, cut off": (BF16, cut_off),
    "bf16, longest": (gemm(k=131072, m=24, n=24), in_turn), "bf16 into fp32": (INTO, in_turn),
    "bf16 into bf16": (gemm(layout="NT", accumulates=True), once), "bf16, dgrad": (gemm(layout="NN"), once),
    "fp16": (gemm("fp16"), in_turn), "fp32": (gemm("fp32"), in_turn), "one term": (gemm(k=1), once),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_results_pass(name: str) -> None:
    one, multiply = RIGHT[name]
    verdict = judge(one, CPU, multiply)
    assert verdict.right, verdict


def test_torchs_own_products_pass() -> None:
    for one in (BF16, gemm(layout="NN"), gemm(layout="NT"), gemm("fp32")):
        assert judge(one, CPU, products.multiply).right


def spoiled(change: Callable[[Tensor, Tensor], object]) -> Callable[..., Tensor]:
    """A right product with something done to it; `change` gets the result and a column of A."""

    def multiply(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
        result = once(one, a, b, into)
        change(result, a)
        return result

    return multiply


def halves(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """A sum over k in two parts, each of them kept in 16 bits: one rounding too many."""
    left, right = (factor.float() for factor in products.factors(one, a, b))
    middle = one.k // 2
    parts = left[:, :middle] @ right[:middle], left[:, middle:] @ right[middle:]
    return sum(part.bfloat16().float() for part in parts).to(products.DTYPES[one.out])  # type: ignore[union-attr]


def rounded_before_added(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    left, right = products.factors(one, a, b)
    assert into is not None
    return into + (left.float() @ right.float()).bfloat16().float()


def forgets_what_was_there(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    return once(one, a, b, None)


def toward_zero(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    left, right = products.factors(one, a, b)
    whole = (left.float() @ right.float()).view(torch.int32)
    return (whole >> 16 << 16).view(torch.float32).bfloat16()


def short_accumulator(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    left, right = products.factors(one, a, b)
    whole = torch.zeros(one.n, one.m, dtype=torch.bfloat16)
    for first in range(0, one.k, 1024):
        whole += (left[:, first : first + 1024].float() @ right[first : first + 1024].float()).bfloat16()
    return whole


def fewer_bits(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """FP32 operands cut to the 10 bits of TF32."""
    left, right = (factor.view(torch.int32) >> 13 << 13 for factor in (a, b))
    return once(one, left.view(torch.float32), right.view(torch.float32), into)


def only(kind: Callable[..., Tensor], values: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`kind` on inputs of one sort alone: those whose first element is the sort's first."""
    number = INPUTS.index(values)  # type: ignore[arg-type]
    calls = iter(range(99))

    def multiply(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
        return (kind if next(calls) == number else once)(one, a, b, into)

    return multiply


def fill(value: float) -> Callable[[Tensor, Tensor], object]:
    return lambda result, _: result[-1, -1].fill_(value)


def next_number(result: Tensor, _: Tensor) -> None:
    """Two steps away from the right number: one would be as right where the sum lies in the middle."""
    result[7, 5] = result[7, 5] * (1 + 2.0**-6)


NAN = spoiled(fill(float("nan")))
WRONG = {
    "NaN in one element": (BF16, NAN, "1 NaN and 0 Inf"),
    "NaN on the last inputs": (BF16, only(NAN, INPUTS[2]), "1 NaN and 0 Inf in the result .scaled inputs"),
    "Inf in one element": (INTO, spoiled(fill(float("inf"))), "0 NaN and 1 Inf"),
    "one element off": (BF16, spoiled(next_number), "1 of 7680 elements"),
    "a tile of zeros": (BF16, spoiled(lambda result, _: result[:16, :16].zero_()), "elements are wrong"),
    "two roundings": (BF16, halves, "elements are wrong"),
    "two roundings, few elements": (gemm(m=4, n=4), only(halves, INPUTS[0]), "elements are wrong|more than once"),
    "rounded before it is added": (INTO, rounded_before_added, "elements are wrong"),
    "adds to nothing": (INTO, forgets_what_was_there, "elements are wrong"),
    "toward zero": (BF16, toward_zero, "elements are wrong|more than once"),
    "short accumulator": (BF16, short_accumulator, "elements are wrong"),
    "TF32 for FP32": (gemm("fp32"), fewer_bits, "elements are wrong"),
    "FP32 for BF16": (BF16, lambda *of: once(*of).float(), "the result is .80, 96. torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_do_not(name: str) -> None:
    one, multiply, why = WRONG[name]
    verdict = judge(one, CPU, multiply)
    assert not verdict.right and re.search(why, verdict.why), verdict


def test_what_fails_is_wrong() -> None:
    def none(one: Gemm, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
        raise RuntimeError("HIPBLAS_STATUS_NOT_SUPPORTED\nmore")

    assert judge(BF16, CPU, none).why == "it fails: HIPBLAS_STATUS_NOT_SUPPORTED"


@pytest.mark.parametrize(
    ("dtype", "kind"), (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
)
def test_half_units_are_torchs(dtype: Dtype, kind: torch.dtype) -> None:
    info = torch.finfo(kind)
    values = torch.tensor([1.0, 1.5, 2.0, 1000.0, info.tiny, info.tiny * 3, info.smallest_normal / 2, 0.0]).to(kind)
    up = values.nextafter(torch.full_like(values, torch.inf)) if kind != torch.float16 else None
    if up is None:  # torch has no nextafter for FP16
        up = (values.view(torch.int16) + 1).view(kind)
    expected = (up.double() - values.double()) / 2
    assert torch.equal(half_unit(values.double(), dtype), expected)


def test_a_whole_verdict_has_its_figures() -> None:
    verdict = judge(BF16, CPU, once)
    assert verdict == Verdict(True, "", verdict.worst, verdict.spread)
    assert 0.9 < verdict.worst <= 1 and 0.5 < verdict.spread < 0.6
