"""Is a kernel's result right? Its product against one in float64, element by element, over several inputs.

The kernel is whatever the library takes for the product in this process, so that what is judged is what training would
run. A result may be off by what one rounding to its type and sums in FP32 explain, and by nothing more: a kernel that
rounds once more (partial sums kept in 16 bits, a product rounded before it is added to an FP32 gradient) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rocm.tune import products
from megatron_rocm.tune.shapes import Dtype, Gemm

Multiply = Callable[[Gemm, Tensor, Tensor, "Tensor | None"], Tensor]

# Bits of the significand, with the leading one, and the exponent of the smallest subnormal number.
PRECISION: dict[Dtype, tuple[int, int]] = {"bf16": (8, -133), "fp16": (11, -24), "fp32": (24, -149)}
UNIT = 2.0**-24  # the most that one rounding to FP32 is off, relative

# Sums of k products in FP32, in any order and in blocks of any size, are off by a random walk of roundings, a few UNIT
# of |a|·|b|; where matrix cores cut off instead of rounding, by more of that, or by a share of k UNIT of the result
# where all terms are positive. Measured up to k = 65,536: roundings below 3 UNIT·|a|·|b|; cut off at every eighth term
# below 46, and below 0.05·k UNIT of a sum of positive terms. One more rounding to BF16 is 2^-9 of the result.
WALK = 64.0
CUT = 0.25
# Root mean square of error / allowance: roundings to nearest are spread evenly, which makes 0.577 (1/√3) at most; one
# more rounding of that size makes 0.816.
SPREAD = 0.65
BLOCK = 2**25  # elements of float64 at once


@dataclass(frozen=True)
class Verdict:
    """`worst` and `spread` are the largest error and the root mean square of all, in units of what is allowed."""

    right: bool
    why: str
    worst: float
    spread: float


def gaussian(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Values around 0, as weights and activations have."""
    return torch.randn(rows, columns, generator=draw, device=draw.device)


def positive(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Values in [0, 1/2): sums grow with every product, so that an accumulator that is too short shows."""
    return torch.rand(rows, columns, generator=draw, device=draw.device).mul_(0.5)  # in FP16 k = 10^6 still fits


def scaled(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Values whose rows differ by powers of two, as gradients of rare and of frequent tokens do."""
    exponent = torch.randint(-8, 1, (rows, 1), generator=draw, device=draw.device)
    return torch.ldexp(gaussian(rows, columns, draw), exponent)


INPUTS = (gaussian, positive, scaled)


def judge(gemm: Gemm, device: torch.device, multiply: Multiply = products.multiply) -> Verdict:
    """The verdict over all INPUTS, at the first that is wrong. Where it raises RuntimeError, that is it."""
    worst = spread = 0.0
    for number, values in enumerate(INPUTS):
        a, b, into = operands(gemm, values, device, seed=number)
        start = None if into is None else into.clone()
        try:
            found = compare(gemm, a, b, start, multiply(gemm, a, b, into))
        except RuntimeError as error:  # the library has no such kernel or no memory for it, or the kernel went astray
            return Verdict(False, f"it fails: {str(error).splitlines()[0]}", math.inf, math.inf)
        worst, spread = max(worst, found.worst), max(spread, found.spread)
        if not found.right:
            return Verdict(False, f"{found.why} ({values.__name__} inputs)", worst, spread)
    return Verdict(True, "", worst, spread)


def operands(
    gemm: Gemm, values: Callable[[int, int, torch.Generator], Tensor], device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A and B of the product's types and, where it accumulates, what D holds beforehand, of the product's size."""
    draw = torch.Generator(device).manual_seed(seed)
    a, b = (values(*size, draw).to(products.DTYPES[gemm.dtype]) for size in products.sizes(gemm))
    if not gemm.accumulates:
        return a, b, None
    into = gaussian(gemm.n, gemm.m, draw).mul_(math.sqrt(gemm.k)).to(products.DTYPES[gemm.out])
    return a, b, into


def compare(gemm: Gemm, a: Tensor, b: Tensor, start: Tensor | None, result: Tensor) -> Verdict:
    """The verdict on one result [n, m] of A·B (+ `start`)."""
    expected = (torch.Size((gemm.n, gemm.m)), products.DTYPES[gemm.out])
    if (result.shape, result.dtype) != expected:
        return Verdict(False, f"the result is {tuple(result.shape)} {result.dtype}", math.inf, math.inf)
    nan, infinite = int(result.isnan().sum()), int(result.isinf().sum())
    if nan or infinite:
        return Verdict(False, f"{nan} NaN and {infinite} Inf in the result", math.inf, math.inf)
    worst, squares, wrong = 0.0, 0.0, 0
    for rows, columns, exact, norm in _exact(gemm, a, b, start):
        size = exact.abs()
        slack = (size.mul(CUT * gemm.k).add_(norm, alpha=WALK)).mul_(UNIT)
        allowed = half_unit(size + slack, gemm.out).add_(slack)
        ratio = result[rows, columns].double().sub_(exact).abs_().div_(allowed)
        worst = max(worst, float(ratio.max()))
        wrong += int((ratio > 1).sum())
        squares += float(ratio.square_().sum())
    spread = math.sqrt(squares / (gemm.m * gemm.n))
    if wrong:
        why = f"{wrong} of {gemm.m * gemm.n} elements are wrong, by up to {worst:.3g} × what rounding explains"
        return Verdict(False, why, worst, spread)
    if spread > SPREAD:
        why = f"rounded more than once: errors spread to {spread:.2f} of what is allowed, one rounding to 0.58"
        return Verdict(False, why, worst, spread)
    return Verdict(True, "", worst, spread)


def half_unit(size: Tensor, dtype: Dtype) -> Tensor:
    """Half the distance from `size` (float64, not negative) to the next number of `dtype`: what a rounding may lose."""
    bits, least = PRECISION[dtype]
    exponent = torch.frexp(size).exponent.sub_(bits).clamp_(min=least).masked_fill_(size == 0, least)
    return exponent.double().sub_(1).exp2_()


def _exact(gemm: Gemm, a: Tensor, b: Tensor, start: Tensor | None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of the result in float64: rows, columns, the values, and the size |a|·|b| (+ |start|) of their sums."""
    left, right = products.factors(gemm, a, b)
    wide = max(1, BLOCK // gemm.k)
    for columns in _slices(gemm.m, wide):
        part = right[:, columns].double()
        lengths = part.norm(dim=0)
        for rows in _slices(gemm.n, min(wide, max(1, BLOCK // lengths.numel()))):
            some = left[rows].double()
            exact, norm = some @ part, torch.outer(some.norm(dim=1), lengths)
            if start is not None:
                before = start[rows, columns].double()
                exact, norm = exact + before, norm + before.abs()
            yield rows, columns, exact, norm


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))
