"""Pairs put one after the other: the bytes of the `.bin` files as they are, one index over all, everything checked.

The result has the bytes that megatron-core's IndexedDatasetBuilder.add_index makes of the same pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.indexed import SIDECAR_FORMAT, partial, read_sidecar
from megatron_rocm.data.pairs import Pair, PairWriter, check_offsets, raw_blocks, require_checksum, require_counts
from megatron_rocm.errors import UsageError

# What must be the same in all parts, of a sidecar's `source`.
FRAMES = {"append_eod": "an EOD after each document", "bos": "a BOS before each document"}
SUMMED = ("bytes", "skipped", "seconds")  # what a sidecar may count besides documents and tokens
SHOWN = 20  # of the parts' faults, and of what they say of their encoders


@dataclass(frozen=True)
class Combined:
    """What was made; `checksum` is sha256 over the bytes of the `.bin` file."""

    prefix: str
    parts: int
    documents: int
    tokens: int
    checksum: str


def concat(
    prefixes: Sequence[str],
    out: str,
    *,
    key: str = "PREFIX",
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Combined:
    """Write OUT.bin, OUT.idx and, where the parts have one, OUT.json: all documents of the parts, in their order.

    Parts without documents are let pass. `source`: what OUT.json is to say of where the text comes from. Nothing has
    its final name until all of it is on disk and checked. Raises UsageError, naming `key`, for parts that are damaged,
    named twice, packed for fine-tuning, of different data types or tokenizers, or without the checksum their sidecar
    names; and for an OUT that exists (unless `overwrite`) or can't be written.
    """
    files = [os.path.realpath(f"{prefix}.bin") for prefix in prefixes]  # `a`, `./a` and a link to it are one
    twice = sorted({prefix for prefix, file in zip(prefixes, files, strict=True) if files.count(file) > 1})
    if not prefixes or twice:
        named = f"{key}={twice[0]} is named twice" if twice else f"{key}: there is nothing to put together"
        raise UsageError(f"{named}; name each pair once (the weights of a blend repeat data)")
    refuse_existing(out, prefixes, overwrite)
    pairs = [check_offsets(prefix, key) for prefix in prefixes]
    first = pairs[0]
    for pair in pairs:
        refuse_packed(pair.prefix, key)
        if pair.head.dtype != first.head.dtype:
            raise UsageError(
                f"{key}={pair.prefix}: holds {pair.head.dtype} ids and {first.prefix} {first.head.dtype}: different "
                "tokenizers made them. Prepare all with one"
            )
    sidecars = _agreeing_sidecars(pairs, key)

    with writing(out), PairWriter(out, first.head.dtype, "OUT") as writer:
        parts = []
        for pair, sidecar in zip(pairs, sidecars, strict=True):
            checksum = _copy(pair, writer)
            require_checksum(pair, sidecar, checksum, key)
            parts.append(
                {"prefix": pair.prefix, "documents": pair.documents, "tokens": pair.tokens, "checksum": checksum}
            )
        sequences, documents = sum(pair.head.sequences for pair in pairs), sum(pair.documents for pair in pairs)
        writer.index(sequences, documents, (block for pair in pairs for block in pair.lengths()), _ends(pairs))
        tokens = sum(pair.tokens for pair in pairs)
        result = Combined(out, len(pairs), documents, tokens, writer.checksum)
        writer.finish(_sidecar(result, pairs, sidecars, {**(source or {}), "parts": parts}))
    return result


def refuse_packed(prefix: str, key: str) -> None:
    """Raise UsageError for packed sequences, whose loss mask would be left behind."""
    if "supervised" in (read_sidecar(prefix) or {}):
        raise UsageError(
            f"{key}={prefix}: is packed for fine-tuning, and its loss mask can't come along. Put the prompts and "
            "answers together, or divide them, and pack those: `megatron-rocm data pack`"
        )


def refuse_existing(out: str, prefixes: Sequence[str], overwrite: bool) -> None:
    """Raise UsageError where OUT is one of the pairs that are read, or there already."""
    if Path(out).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise UsageError(f"OUT={out}: is one of the pairs that are read; name another")
    there = [f"{out}.{kind}" for kind in ("idx", "bin", "json") if Path(f"{out}.{kind}").exists()]
    killed = not Path(f"{out}.idx").exists() and Path(partial(out, "idx")).exists()  # while it gave files their names
    if there and not overwrite and not killed:
        raise UsageError(f"OUT={out}: {there[0]} is there already; name another, or replace it with --overwrite")


@contextlib.contextmanager
def writing(out: str) -> Iterator[None]:
    """Make OUT's folder, and tell what the disk refuses as a UsageError."""
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(
            f"OUT={out}: can't be written: {error.strerror or error}. Nothing is left of it; check the space and the "
            "permissions there"
        ) from None


def moved(tokenizer: dict[str, Any], prefix: str, out: str) -> dict[str, Any]:
    """A sidecar's tokenizer for data in another folder: `./name` lies beside PREFIX and not beside OUT."""
    model = str(tokenizer["model"])
    if is_hub_name(model) or not model.startswith("./") or Path(prefix).parent.resolve() == Path(out).parent.resolve():
        return tokenizer
    return {**tokenizer, "model": str((Path(prefix).parent / model).resolve())}


def _copy(pair: Pair, writer: PairWriter) -> str:
    """Append a pair's ids; their checksum."""
    digest = hashlib.sha256()
    for ids in raw_blocks(pair.prefix, pair.head):
        writer.write(ids)
        digest.update(ids.data)
    return f"sha256:{digest.hexdigest()}"


def _ends(pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
    before = 0
    for pair in pairs:
        for ends in pair.ends():
            yield ends + before
        before += pair.head.sequences


def _agreeing_sidecars(pairs: Sequence[Pair], key: str) -> list[dict[str, Any] | None]:
    """The parts' sidecars. Raises UsageError where they name different tokenizers, or some name none."""
    sidecars = [read_sidecar(pair.prefix) for pair in pairs]
    known = [(pair, sidecar) for pair, sidecar in zip(pairs, sidecars, strict=True) if sidecar]
    if not known:
        return sidecars
    for pair, sidecar in zip(pairs, sidecars, strict=True):
        if sidecar is None:
            raise UsageError(
                f"{key}={pair.prefix}: nothing beside it names its tokenizer, and {known[0][0].prefix}.json names "
                f"{known[0][1]['tokenizer']['model']}. Prepare it with that one"
            )
    first, reference = known[0]
    for pair, sidecar in known:
        require_counts(pair, sidecar, key)
        if sidecar["tokenizer"]["fingerprint"] != reference["tokenizer"]["fingerprint"]:
            raise UsageError(
                f"{key}={pair.prefix}: made with {sidecar['tokenizer']['model']}, and {first.prefix} with "
                f"{reference['tokenizer']['model']}. Prepare all with one tokenizer"
            )
        for name, what in FRAMES.items():
            if sidecar["source"].get(name) != reference["source"].get(name):
                raise UsageError(
                    f"{key}={pair.prefix}: of it and {first.prefix} only one has {what}. Prepare all with it, or all "
                    "without"
                )
    return sidecars


def _sidecar(
    result: Combined, pairs: Sequence[Pair], sidecars: Sequence[dict[str, Any] | None], source: Mapping[str, Any]
) -> dict[str, Any] | None:
    known = [sidecar for sidecar in sidecars if sidecar]
    if not known:
        return None
    frames = {name: known[0]["source"][name] for name in FRAMES if name in known[0]["source"]}
    return {
        "format": SIDECAR_FORMAT,
        "tokenizer": moved(known[0]["tokenizer"], pairs[0].prefix, result.prefix),
        "documents": result.documents,
        "tokens": result.tokens,
        **{name: sum(one[name] for one in known) for name in SUMMED if all(name in one for one in known)},
        "checksum": result.checksum,
        "faults": [fault for one in known for fault in one.get("faults") or ()][:SHOWN],
        "encoder": "; ".join([*dict.fromkeys(one["encoder"] for one in known if one.get("encoder"))][:SHOWN]),
        "source": {"input": f"{len(pairs)} pairs", **frames, **source},
    }
