"""For each product the fastest kernel whose result is right, among those that are faster than the library's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from megatron_rocm.errors import UsageError
from megatron_rocm.tune.shapes import Gemm
from megatron_rocm.tune.trial import Answer
from megatron_rocm.tune.tuned import By, Candidate, Product, Refused

# A kernel must be so much faster than the library's own choice: two measurements of one kernel differ by as much.
MARGIN = 0.02

Say = Callable[[str], object]
Judge = Callable[[Sequence[Gemm], Mapping[str, Candidate]], Answer]  # these products, with kernels for all of these


class Tuner(Protocol):
    """Who knows the kernels, and how to have one taken."""

    by: By

    def reaches(self, gemm: Gemm) -> str:
        """Why nothing can be chosen for this product; "" where something can."""

    def candidates(self, gemm: Gemm) -> list[Candidate]:
        """Kernels for a product with their times."""

    def default(self, gemm: Gemm, candidates: Sequence[Candidate], answer: Answer) -> Candidate | None:
        """The one that the library takes by itself, of a trial without a file; None where that is not known."""

    def applied(self, gemm: Gemm, candidate: Candidate, answer: Answer) -> str:
        """Why this kernel was not what ran in a trial with the file; "" where it was."""

    def write(self, folder: Path, chosen: Mapping[str, Candidate], gpus: int) -> list[str]:
        """Write what makes the library take these kernels (product → kernel); the names of the files."""


@dataclass
class _Open:
    """A product that is not decided yet."""

    gemm: Gemm
    product: Product
    left: list[Candidate] = field(default_factory=list)


def choose(tuner: Tuner, gemms: Sequence[Gemm], judge: Judge, most: int, say: Say) -> tuple[list[Product], Answer]:
    """What becomes of each distinct product, and the trial of the library's own choices.

    At most `most` kernels are tried for each. A round judges one kernel of each open product, all in one process, which
    reads a file with these kernels and those that were found right before.
    """
    products = distinct(gemms)
    shapes = {gemm.key: gemm for gemm in gemms}
    done = [replace(one, why=why) for one in products if (why := tuner.reaches(shapes[one.key]))]
    waiting = [_Open(shapes[one.key], one) for one in products if not tuner.reaches(shapes[one.key])]
    if not waiting:
        return _ordered(products, done), Answer()
    first = _all(judge, [one.gemm for one in waiting], say)
    for number, one in enumerate(waiting, 1):
        say(f"{number} of {len(waiting)}: {', '.join(one.product.names)}: {one.gemm.key}")
        _line_up(one, tuner, first, most, say)
    settled: dict[str, Candidate] = {}
    while waiting:
        done += [one.product for one in waiting if not one.left]
        waiting = [one for one in waiting if one.left]
        if not waiting:
            break
        trying = {one.gemm.key: one.left[0] for one in waiting}
        answer = judge([one.gemm for one in waiting], settled | trying)
        for one in [one for one in waiting if one.gemm.key in answer.rulings]:
            _decide(one, tuner, answer, say)
            if one.product.kernel:
                settled[one.gemm.key] = one.product.kernel
    return _ordered(products, done), first


def distinct(gemms: Sequence[Gemm]) -> list[Product]:
    """Products with the names of all that are alike, and how often a step does them."""
    found: dict[str, Product] = {}
    for gemm in gemms:
        one = found.get(gemm.key, Product(gemm.key, (), 0))
        found[gemm.key] = replace(one, names=(*one.names, f"{gemm.name} {gemm.phase}"), count=one.count + gemm.count)
    return list(found.values())


def _all(judge: Judge, gemms: Sequence[Gemm], say: Say) -> Answer:
    """The library's own choices judged, each; one that kills its process is followed by the others in the next."""
    answer = judge(gemms, {})
    while rest := [gemm for gemm in gemms if gemm.key not in answer.rulings]:
        more = judge(rest, {})
        answer = replace(more, rulings=answer.rulings | more.rulings, log=answer.log + more.log)
    for gemm in gemms:
        if not answer.rulings[gemm.key].right:
            say(f"the library's own kernel for {gemm.name} {gemm.phase} is wrong: {answer.rulings[gemm.key].why}")
    return answer


def _line_up(one: _Open, tuner: Tuner, first: Answer, most: int, say: Say) -> None:
    """The kernels worth trying, fastest first; all of them where the library's own is wrong."""
    try:
        found = tuner.candidates(one.gemm)
    except UsageError as error:
        say(f"  {error}")
        one.product = replace(one.product, why=f"not tuned: {error}")
        return
    default = tuner.default(one.gemm, found, first)
    one.product = replace(one.product, default_us=default.us if default else 0.0)
    limit = default.us * (1 - MARGIN) if default and first.rulings[one.gemm.key].right else float("inf")
    faster = sorted(
        (kernel for kernel in found if kernel != default and kernel.us <= limit), key=lambda kernel: kernel.us
    )
    one.left = faster[:most]
    if not one.left:
        one.product = replace(
            one.product, why="the library's own choice is the fastest" if found else "no other kernel"
        )


def _decide(one: _Open, tuner: Tuner, answer: Answer, say: Say) -> None:
    kernel = one.left.pop(0)
    ruling, elsewhere = answer.rulings[one.gemm.key], tuner.applied(one.gemm, kernel, answer)
    if elsewhere:  # another kernel would not be taken either
        one.left, one.product = [], replace(one.product, why=elsewhere)
    elif ruling.right:
        one.left, one.product = [], replace(one.product, kernel=kernel)
    else:
        say(f"refused: kernel {kernel.kernel} for {', '.join(one.product.names)}: {ruling.why}")
        refused = (*one.product.refused, Refused(kernel.kernel, kernel.us, ruling.why))
        one.product = replace(one.product, refused=refused, why="" if one.left else "no faster kernel is right")


def _ordered(products: Sequence[Product], done: Sequence[Product]) -> list[Product]:
    order = [product.key for product in products]
    return sorted(done, key=lambda product: order.index(product.key))
