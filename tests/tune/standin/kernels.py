"""The stand-in's kernels: index → microseconds, and what each computes."""

from __future__ import annotations

from typing import Any

REVISION = "c4b2dc9869"
DEFAULT, FAST_NAN, TWICE_ROUNDED, RIGHT, SLOWER, CRASHES = 100, 201, 202, 203, 204, 205
TIMES = {DEFAULT: 100.0, FAST_NAN: 50.0, TWICE_ROUNDED: 60.0, RIGHT: 70.5, SLOWER: 99.5}


def name_of(index: int) -> str:
    return f"Cijk_Alik_Bljk_BBS_MT256x{index}"


def product(index: int, call: int, left: Any, right: Any, into: Any, dtype: Any) -> Any:
    """What kernel `index` makes of left · right (+ into), in torch on a CPU; `call` counts its calls for a product."""
    whole = left.float() @ right.float()
    if index == TWICE_ROUNDED:  # halves of the sum over k kept in 16 bits, or the product before it is added
        half = left.shape[1] // 2
        parts = ((left[:, :half].float(), right[:half].float()), (left[:, half:].float(), right[half:].float()))
        whole = sum((a @ b).to(left.dtype).float() for a, b in parts)
    result = (whole if into is None else into.float() + whole).to(dtype)
    if index == FAST_NAN and call == 2:  # on inputs of the third kind alone, and in one element
        result[-1, -1] = float("nan")
    return result
