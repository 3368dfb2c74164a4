"""What a run must know of its data before it starts: the blend, the tokenizer, the tokens. Cheap: no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.indexed import Index, open_index, read_sidecar
from megatron_rocm.data.tokenizer import TokenizerInfo, check_type, inspect
from megatron_rocm.errors import UsageError

Blend = Sequence[tuple["float | None", str]]

SPLITS = ("train", "valid", "test")
SMALLEST_SHARE = 1e-5  # of a blend's weights; less than that is a slip of the pen, and would hardly ever be drawn
SAMPLE_BYTES, SAMPLE_CHUNKS = 64 << 20, 64


@dataclass(frozen=True)
class DataFacts:
    """`tokens` counts every prefix of the blend once; 0 without data."""

    vocab_size: int
    eod: int
    tokenizer_model: str
    fingerprint: str
    tokens: int


def parse_blend(text: str) -> tuple[tuple[float | None, str], ...]:
    """DATA_PATH as Megatron reads it: one prefix, or `weight prefix weight prefix …`.

    A prefix may carry its .bin or .idx. One prefix has weight None; weights are as typed, not normalised.
    """
    words = text.split()
    if not words:
        raise UsageError("DATA_PATH is empty: give the prefix of a .bin/.idx pair, or leave it unset for mock data")
    if len(words) == 1:
        return ((None, _strip(words[0])),)
    way_out = "give one prefix, or a weight before each: DATA_PATH='0.7 first/prefix 0.3 second/prefix'"
    if len(words) % 2:
        raise UsageError(f"DATA_PATH={text}: {len(words)} words can't be pairs of weight and prefix; {way_out}")
    blend: list[tuple[float, str]] = []
    for word, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            weight = float(word)
        except ValueError:
            raise UsageError(f"DATA_PATH={text}: {word!r} stands where a weight must; {way_out}") from None
        if not math.isfinite(weight) or weight < 0:
            raise UsageError(f"DATA_PATH={text}: the weight {word} of {prefix} must be a number from 0 up; {way_out}")
        blend.append((weight, _strip(prefix)))
    total = sum(weight for weight, _ in blend)
    if total <= 0:
        raise UsageError(f"DATA_PATH={text}: the weights add up to 0; {way_out}")
    for weight, prefix in blend:
        if weight / total < SMALLEST_SHARE:
            raise UsageError(
                f"DATA_PATH={text}: the weight of {prefix} is under {SMALLEST_SHARE:g} of the sum; leave it out"
            )
    return tuple(blend)


def _strip(prefix: str) -> str:
    return re.sub(r"\.(bin|idx)$", "", prefix)


def parse_split(text: str) -> tuple[float, float, float]:
    """SPLIT, e.g. `99,1,0` or `0.9,0.1`: shares of training, validation and test, normalised to the sum 1."""
    rule = "up to three numbers from 0 up, e.g. SPLIT=99,1,0"
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"SPLIT={text}: must be {rule}") from None
    if len(shares) > 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or shares[0] <= 0:
        raise UsageError(f"SPLIT={text}: must be {rule}, the first one above 0")
    if not math.isfinite(sum(shares)):
        raise UsageError(f"SPLIT={text}: the sum is too large a number; must be {rule}")
    shares += [0.0] * (3 - len(shares))
    train, valid, test = (share / sum(shares) for share in shares)
    return train, valid, test


def split_ranges(split: str, sequences: int) -> tuple[range, range, range]:
    """The documents of each split. megatron-core's rounding (BlendedMegatronDatasetBuilder), so that splits agree."""
    bounds, so_far = [0], 0.0
    for share in parse_split(split):
        so_far += share
        bounds.append(round(so_far * sequences))
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])


def check_size(paths: Blend, split: str, seq_length: int, names: Sequence[str] = ("train",)) -> None:
    """Raise UsageError where a split of one of the prefixes does not fill a single sequence."""
    for _, prefix in paths:
        index = open_index(prefix)
        ranges = dict(zip(SPLITS, split_ranges(split, len(index.lengths)), strict=True))
        for name in names:
            require_sample(index, name, ranges[name], split, seq_length)


def require_sample(index: Index, name: str, documents: range, split: str, seq_length: int) -> None:
    """Raise UsageError where these documents of `index` hold less than one sequence and its last label."""
    tokens = int(index.lengths[documents.start : documents.stop].sum(dtype=np.int64))
    if tokens > seq_length:
        return
    more = "a smaller SEQ_LENGTH" if name == "train" else "a larger share, or set EVAL_ITERS=0"
    raise UsageError(
        f"DATA_PATH={index.prefix}: its {name} split (SPLIT={split}) has {tokens:,} of the {index.tokens:,} tokens, in "
        f"{len(documents)} of {len(index.lengths)} documents, and SEQ_LENGTH={seq_length} needs {seq_length + 1:,}. "
        f"Give more text, or {more}"
    )


def describe(paths: Blend, tokenizer_type: str, tokenizer_model: str | None, *, offline: bool = False) -> DataFacts:
    """Check the data and its tokenizer, and say what the model must know of them.

    Where `prepare` made the data, its sidecar names the tokenizer; one given besides must be the same. Data of
    Megatron's own tools names none: then one must be given, and a bounded sample of the ids must lie below its size.
    `paths` may be empty (mock data): then the tokenizer alone is described.
    Raises UsageError for every fault of the files, of the tokenizer, and where the two don't belong together.
    """
    check_type(tokenizer_type)
    indexes = [open_index(prefix) for _, prefix in paths]
    sidecars = {index.prefix: _sidecar(index) for index in indexes}
    known = {prefix: _recorded(sidecar["tokenizer"]) for prefix, sidecar in sidecars.items() if sidecar}
    prints = {info.fingerprint for info in known.values()}
    if len(prints) > 1:
        lines = "; ".join(f"{prefix}: {info.model}" for prefix, info in known.items())
        raise UsageError(f"DATA_PATH: a blend must share one tokenizer, but here are {lines}. Prepare all with one")

    made_with = next(iter(known.values()), None)
    if tokenizer_model is None and made_with is None:
        where = f" with DATA_PATH={indexes[0].prefix}" if indexes else ""
        raise UsageError(
            f"TOKENIZER_MODEL is needed{where}: nothing beside the data names its tokenizer. "
            "Give the folder or hub name of the tokenizer that made it"
        )
    info = _tokenizer(made_with, tokenizer_type, tokenizer_model, offline)
    for index in indexes:
        said = known.get(index.prefix)
        if said is not None and said.fingerprint != info.fingerprint:
            raise UsageError(
                f"TOKENIZER_MODEL={tokenizer_model}: DATA_PATH={index.prefix} was made with another tokenizer, "
                f"{said.model} ({said.vocab_size:,} ids; this one has {info.vocab_size:,}). "
                "Unset TOKENIZER_MODEL to use the data's own, or prepare the data with this one"
            )
        if said is None:
            _check_ids(index, info)
    model = info.model
    if made_with is not None and tokenizer_model is None:
        model = resolve_model(model, next(iter(known)))
    return DataFacts(info.vocab_size, info.eod, model, info.fingerprint, sum(index.tokens for index in indexes))


def resolve_model(model: str, prefix: str) -> str:
    """A sidecar's tokenizer: `./name` lies beside the data, so that a data folder can be moved."""
    return str(Path(prefix).parent / model) if model.startswith("./") else model


def _tokenizer(made_with: TokenizerInfo | None, type: str, model: str | None, offline: bool) -> TokenizerInfo:
    """The tokenizer asked for, else the data's. The data's own facts are enough: no look at the hub for them."""
    if made_with is not None and (model is None or (model == made_with.model and is_hub_name(model))):
        return made_with
    assert model is not None
    return inspect(model, type, offline)


def _recorded(tokenizer: dict[str, Any]) -> TokenizerInfo:
    return TokenizerInfo(
        type=tokenizer["type"],
        model=tokenizer["model"],
        vocab_size=tokenizer["vocab_size"],
        eod=tokenizer["eod"],
        bos=tokenizer.get("bos"),
        fingerprint=tokenizer["fingerprint"],
    )


def _sidecar(index: Index) -> dict[str, Any] | None:
    sidecar = read_sidecar(index.prefix)
    if sidecar is not None and sidecar.get("tokens") != index.tokens:
        raise UsageError(
            f"DATA_PATH={index.prefix}: {index.prefix}.json speaks of {sidecar.get('tokens')} tokens and the .idx of "
            f"{index.tokens}. Copy .bin, .idx and .json together, or prepare them anew"
        )
    return sidecar


def _check_ids(index: Index, info: TokenizerInfo) -> None:
    tokens = np.memmap(f"{index.prefix}.bin", index.dtype, "r")
    size = SAMPLE_BYTES // SAMPLE_CHUNKS // index.dtype.itemsize
    if len(tokens) <= size * SAMPLE_CHUNKS:
        starts = np.array([0])
        size = len(tokens)
    else:
        starts = np.linspace(0, len(tokens) - size, SAMPLE_CHUNKS).astype(np.int64)
    highest = max(int(tokens[start : start + size].max()) for start in starts)
    if highest >= info.vocab_size:
        raise UsageError(
            f"TOKENIZER_MODEL={info.model}: DATA_PATH={index.prefix} holds the id {highest:,}, and this tokenizer has "
            f"{info.vocab_size:,} ids only: it is not the one that made the data. Give that one"
        )
