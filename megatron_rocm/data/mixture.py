"""What each source of a blend gives to a run: shares from weights, tokens and epochs from shares. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rocm.config.blend import Blend, Paths, require_shares
from megatron_rocm.data.facts import blends_of, documents_of
from megatron_rocm.data.indexed import open_index

MOST_ROWS = 40  # of a blend's table; the smallest sources are summed up


@dataclass(frozen=True)
class Contribution:
    """One source: its share of the samples, and what that comes to in so many samples of the run.

    `epochs` says how often the run reads the source's documents.
    """

    prefix: str
    weight: float | None
    share: float
    tokens: float
    epochs: float


def shares(blend: Blend, documents: Sequence[int], tokens: Sequence[int], by: str) -> list[float]:
    """The share of the samples, which are of one length, that each source gets; they add up to 1.

    By token the weights are shares of the samples themselves, as in Megatron-LM. By document they are relative numbers
    of documents, each as long as the source's mean. Without weights every token comes as often as any other.
    Raises UsageError for a source that would hardly ever be drawn.
    """
    weights = [float(size) if weight is None else weight for (weight, _), size in zip(blend, tokens, strict=True)]
    if by == "document" and all(weight is not None for weight, _ in blend):
        weights = [weight * size / count for weight, size, count in zip(weights, tokens, documents, strict=True)]
    if len(blend) > 1:
        where = f"BLEND_BY={by}" if blend[0][0] is not None else "a blend without weights goes by size"
        require_shares(weights, [prefix for _, prefix in blend], where)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def contributions(paths: Paths, split: str, name: str, by: str, seq_length: int, samples: int) -> list[Contribution]:
    """What each source of the split `name` gives to so many of its samples; nothing where the split has no data."""
    blend = blends_of(paths, split, [name]).get(name, ())
    documents, tokens = [], []
    for _, prefix in blend:
        lengths = open_index(prefix).lengths
        chosen = documents_of(paths, split, name, len(lengths))
        documents.append(len(chosen))
        tokens.append(int(lengths[chosen.start : chosen.stop].sum(dtype=np.int64)))
    found = []
    for (weight, prefix), share, size in zip(blend, shares(blend, documents, tokens, by), tokens, strict=True):
        in_an_epoch = (size - 1) // seq_length  # the last sample's last label is not the first token of another
        epochs = share * samples / in_an_epoch
        found.append(Contribution(prefix, weight, share, share * samples * seq_length, epochs))
    return found


def table(paths: Paths, split: str, by: str, seq_length: int, samples: dict[str, int], max_epochs: float) -> list[str]:
    """Lines on what each source gives to `samples` of each split, and warnings of what training repeats too often."""
    lines: list[str] = []
    warnings: list[str] = []
    for name, count in samples.items():
        found = contributions(paths, split, name, by, seq_length, count)
        if found:
            lines += [_head(name, count, seq_length, by if len(found) > 1 else ""), *_rows(found)]
        if name == "train":
            warnings = [_warning(one, max_epochs) for one in found if one.epochs > max_epochs]
    return lines + warnings


def _warning(one: Contribution, max_epochs: float) -> str:
    return (
        f"warning: the run reads {one.prefix} {one.epochs:,.3g} times, above BLEND_MAX_EPOCHS={max_epochs:g}: what is "
        "repeated often teaches less and less. Give it more data or a smaller weight"
    )


def _head(name: str, samples: int, seq_length: int, by: str) -> str:
    weights = f", weights by {by}" if by else ""
    return f"{name} data: {samples:,} samples of {seq_length:,} tokens{weights}"


def _rows(found: Sequence[Contribution]) -> Iterator[str]:
    shown = list(found)
    if len(found) > MOST_ROWS:
        shown = sorted(found, key=lambda one: -one.share)[: MOST_ROWS - 1]
    cells = [("source", "weight", "share", "tokens", "epochs")]
    for one in shown:
        weight = "" if one.weight is None else f"{one.weight:.6g}"
        cells.append((one.prefix, weight, f"{one.share:.3%}", _amount(one.tokens), f"{one.epochs:,.2f}"))
    if len(shown) < len(found):
        rest = [one for one in found if one not in shown]
        tokens, most = sum(one.tokens for one in rest), max(one.epochs for one in rest)
        cells.append(
            (f"{len(rest)} more", "", f"{sum(one.share for one in rest):.3%}", _amount(tokens), f"to {most:,.2f}")
        )
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    for prefix, *numbers in cells:
        columns = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        yield f"  {prefix:<{widths[0]}}  {columns}"


def _amount(tokens: float) -> str:
    for unit in ("", " k", " M", " G"):
        if tokens < 1000:
            return f"{tokens:.4g}{unit}"
        tokens /= 1000
    return f"{tokens:,.4g} T"
