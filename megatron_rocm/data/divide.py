"""A pair divided by documents into several, each in the order of the original."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rocm.data.combine import FRAMES, moved, refuse_existing, refuse_packed, writing
from megatron_rocm.data.indexed import SIDECAR_FORMAT, read_sidecar
from megatron_rocm.data.pairs import Pair, PairWriter, check_offsets, mapped, raw_blocks, read_entries, require_checksum
from megatron_rocm.errors import UsageError

REST = "rest"
MOST_PARTS = 255


@dataclass(frozen=True)
class Part:
    """One of the pairs that were made."""

    prefix: str
    documents: int
    tokens: int
    checksum: str


def shares_of(text: str, documents: int) -> list[int]:
    """Documents of each part for `--shares 99,1`: as Megatron rounds the splits of a run."""
    try:
        shares = [float(word) for word in text.replace("/", ",").split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise UsageError(f"--shares {text}: must be numbers above 0, such as 99,1")
    bounds, so_far = [0], 0.0
    for share in shares:
        so_far += share / sum(shares)
        bounds.append(round(so_far * documents))
    return [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]


def counts_of(text: str, documents: int) -> list[int]:
    """Documents of each part for `--documents rest,1000`."""
    words = text.split(",")
    if words.count(REST) > 1 or not all(word == REST or (word.isascii() and word.isdigit()) for word in words):
        raise UsageError(
            f"--documents {text}: must be numbers of documents, and `{REST}` once at most, such as rest,1000"
        )
    named = sum(int(word) for word in words if word != REST)
    left = documents - named
    if left < 0 or (left and REST not in words):
        more = f"write `{REST}` for the part that gets what is left" if left > 0 else "give smaller numbers"
        raise UsageError(f"--documents {text}: add up to {named:,}, and there are {documents:,}; {more}")
    return [left if word == REST else int(word) for word in words]


def split(
    pair: Pair, counts: Sequence[int], outs: Sequence[str], *, shuffle: int | None = None, overwrite: bool = False
) -> list[Part]:
    """Write the documents of `pair` to as many pairs as there are `counts`, so many to each.

    The first ones go to the first part, or, where `shuffle` is a seed, each part is a random choice; in both the order
    within a part is that of the original. What is made has its final name once all of it is on disk.
    Raises UsageError for a part without documents, an output that exists (unless `overwrite`) or can't be written, and
    for a `.bin` that has not the checksum its sidecar names.
    """
    if len(counts) > MOST_PARTS or 0 in counts or len(set(outs)) != len(counts):
        sizes = ", ".join(f"{count:,}" for count in counts)
        raise UsageError(
            f"PREFIX={pair.prefix}: {pair.documents:,} documents in parts of {sizes}: give "
            f"each part a document at least and a name of its own, in at most {MOST_PARTS} parts"
        )
    for out in outs:
        refuse_existing(out, [pair.prefix], overwrite)
    owner = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    if shuffle is not None:
        np.random.RandomState(shuffle).shuffle(owner)
    sidecar = read_sidecar(pair.prefix)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(outs[0]))
        writers = []
        for out in outs:
            with writing(out):
                writers.append(stack.enter_context(PairWriter(out, pair.head.dtype, "OUT")))
        checksum = _deal_ids(pair, owner, writers)
        require_checksum(pair, sidecar, checksum, "PREFIX")
        parts = []
        for number, (out, writer) in enumerate(zip(outs, writers, strict=True)):
            sequences = sum(len(lengths) for lengths in _lengths(pair, owner, number))
            writer.index(sequences, counts[number], _lengths(pair, owner, number), _ends(pair, owner, number))
            parts.append(Part(out, counts[number], writer.bytes // pair.head.dtype.itemsize, writer.checksum))
        for number, (part, writer) in enumerate(zip(parts, writers, strict=True)):
            made_of = {"number": number, "of": len(parts), "shuffle": shuffle, "checksum": checksum}
            writer.finish(_sidecar(pair, sidecar, part, made_of))
    return parts


def _deal_ids(pair: Pair, owner: np.ndarray, writers: Sequence[PairWriter]) -> str:
    """Write each id to the part that owns its document; the checksum of all."""
    digest = hashlib.sha256()
    head = pair.head
    offsets, boundaries = mapped(pair.prefix, head, "offsets"), mapped(pair.prefix, head, "boundaries")
    size = head.dtype.itemsize
    done = 0
    for ids in raw_blocks(pair.prefix, head):
        digest.update(ids.data)
        first = bisect.bisect_right(offsets, done * size) - 1
        last = bisect.bisect_left(offsets, (done + len(ids)) * size)
        begins = read_entries(pair.prefix, head, "offsets", first, last) // size
        ends = begins + read_entries(pair.prefix, head, "lengths", first, last)
        here = np.minimum(ends, done + len(ids)) - np.maximum(begins, done)
        low, high = bisect.bisect_right(boundaries, first) - 1, bisect.bisect_left(boundaries, last)
        bounds = np.clip(read_entries(pair.prefix, head, "boundaries", low, high + 1), first, last)
        of_sequence = np.repeat(owner[low:high], np.diff(bounds))
        if (of_sequence == of_sequence[0]).all():
            writers[of_sequence[0]].write(ids)
        else:
            of_id = np.repeat(of_sequence, here)
            for number in np.unique(of_sequence):
                writers[number].write(ids[of_id == number])
        done += len(ids)
    return f"sha256:{digest.hexdigest()}"


def _per_document(pair: Pair) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first document, sequences of each document), block by block."""
    document = sequence = 0
    for ends in pair.ends():
        yield document, np.diff(ends, prepend=sequence)
        document, sequence = document + len(ends), int(ends[-1])


def _lengths(pair: Pair, owner: np.ndarray, number: int) -> Iterator[np.ndarray]:
    sequence = 0
    for document, sequences in _per_document(pair):
        mine = np.repeat(owner[document : document + len(sequences)] == number, sequences)
        yield read_entries(pair.prefix, pair.head, "lengths", sequence, sequence + len(mine))[mine]
        sequence += len(mine)


def _ends(pair: Pair, owner: np.ndarray, number: int) -> Iterator[np.ndarray]:
    before = 0
    for document, sequences in _per_document(pair):
        ends = before + np.cumsum(sequences[owner[document : document + len(sequences)] == number])
        yield ends
        before = int(ends[-1]) if len(ends) else before


def _sidecar(pair: Pair, sidecar: dict[str, Any] | None, part: Part, made_of: dict[str, Any]) -> dict[str, Any] | None:
    if sidecar is None:
        return None
    frames = {name: sidecar["source"][name] for name in FRAMES if name in sidecar["source"]}
    return {
        "format": SIDECAR_FORMAT,
        "tokenizer": moved(sidecar["tokenizer"], pair.prefix, part.prefix),
        "documents": part.documents,
        "tokens": part.tokens,
        "checksum": part.checksum,
        "source": {"input": pair.prefix, **frames, "part": made_of},
    }


def open_checked(prefix: str) -> Pair:
    """The pair to divide. Raises UsageError where it is damaged, packed for fine-tuning, or holds no documents."""
    pair = check_offsets(prefix, "PREFIX")
    refuse_packed(prefix, "PREFIX")
    if not pair.documents:
        raise UsageError(f"PREFIX={prefix}: holds no documents, so there is nothing to divide")
    return pair
