"""What a run must know of its data before it starts: the blend, the tokenizer, the tokens. Cheap: no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.config.blend import OWN_PATHS, SPLITS, Blend, Paths
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.indexed import Index, open_index, read_sidecar
from megatron_rocm.data.tokenizer import TokenizerInfo, check_type, inspect
from megatron_rocm.errors import UsageError

SAMPLE_BYTES, SAMPLE_CHUNKS = 64 << 20, 64


@dataclass(frozen=True)
class DataFacts:
    """`tokens` counts every prefix of the blend once; 0 without data."""

    vocab_size: int
    eod: int
    tokenizer_model: str
    fingerprint: str
    tokens: int


def parse_split(text: str) -> tuple[float, float, float]:
    """SPLIT, e.g. `99,1,0`, `969/30/1` or `0.9,0.1`: shares of train, valid and test, normalised to the sum 1."""
    rule = "up to three numbers from 0 up, e.g. SPLIT=99,1,0"
    try:
        shares = [float(word) for word in text.replace("/", ",").split(",")]
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


def blends_of(paths: Paths, split: str, names: Sequence[str]) -> dict[str, Blend]:
    """The blend of each split in `names` that has data: a share of `paths` by SPLIT, or paths of its own."""
    if isinstance(paths, Mapping):
        return {name: paths[name] for name in names if name in paths}
    shares = dict(zip(SPLITS, split_ranges(split, 10**9), strict=True))
    return {name: paths for name in names if shares[name]}


def documents_of(paths: Paths, split: str, name: str, documents: int) -> range:
    """Which of a source's documents belong to a split: its share of them, or all where the paths are its own."""
    return range(documents) if isinstance(paths, Mapping) else split_ranges(split, documents)[SPLITS.index(name)]


def check_size(paths: Paths, split: str, seq_length: int, names: Sequence[str] = ("train",)) -> None:
    """Raise UsageError where a split of one of the prefixes does not fill a single sequence."""
    for name, blend in blends_of(paths, split, names).items():
        for _, prefix in blend:
            index = open_index(prefix)
            documents = documents_of(paths, split, name, len(index.lengths))
            require_sample(index, name, documents, None if isinstance(paths, Mapping) else split, seq_length)


def require_sample(index: Index, name: str, documents: range, split: str | None, seq_length: int) -> None:
    """Raise UsageError where these documents of `index` hold less than one sequence and its last label.

    `split` is None where they are all of a path that is the split's own.
    """
    tokens = int(index.lengths[documents.start : documents.stop].sum(dtype=np.int64))
    if tokens > seq_length:
        return
    if split is None:
        more = "a smaller SEQ_LENGTH" if name == "train" else "set EVAL_ITERS=0"
        raise UsageError(
            f"{OWN_PATHS[name]}={index.prefix}: has {tokens:,} tokens, and SEQ_LENGTH={seq_length} needs "
            f"{seq_length + 1:,}. Give more text, or {more}"
        )
    more = "a smaller SEQ_LENGTH" if name == "train" else "a larger share, or set EVAL_ITERS=0"
    raise UsageError(
        f"DATA_PATH={index.prefix}: its {name} split (SPLIT={split}) has {tokens:,} of the {index.tokens:,} tokens, in "
        f"{len(documents)} of {len(index.lengths)} documents, and SEQ_LENGTH={seq_length} needs {seq_length + 1:,}. "
        f"Give more text, or {more}"
    )


def describe(paths: Paths, tokenizer_type: str, tokenizer_model: str | None, *, offline: bool = False) -> DataFacts:
    """Check the data and its tokenizer, and say what the model must know of them.

    Where `prepare` made the data, its sidecar names the tokenizer; one given besides must be the same. Data of
    Megatron's own tools names none: then one must be given, and a bounded sample of the ids must lie below its size.
    `paths` may be empty (mock data): then the tokenizer alone is described.
    Raises UsageError for every fault of the files, of the tokenizer, and where the two don't belong together.
    """
    check_type(tokenizer_type)
    keys = _variables(paths)
    indexes = [open_index(prefix, key) for prefix, key in keys.items()]
    sidecars = {index.prefix: _sidecar(index, keys[index.prefix]) for index in indexes}
    known = {prefix: recorded(sidecar["tokenizer"]) for prefix, sidecar in sidecars.items() if sidecar}
    prints = {info.fingerprint for info in known.values()}
    if len(prints) > 1:
        lines = "; ".join(f"{prefix}: {info.model}" for prefix, info in known.items())
        named = " and ".join(dict.fromkeys(keys.values()))
        raise UsageError(f"{named}: a blend must share one tokenizer, but here are {lines}. Prepare all with one")

    made_with = next(iter(known.values()), None)
    if tokenizer_model is None and made_with is None:
        where = f" with {keys[indexes[0].prefix]}={indexes[0].prefix}" if indexes else ""
        raise UsageError(
            f"TOKENIZER_MODEL is needed{where}: nothing beside the data names its tokenizer. "
            "Give the folder or hub name of the tokenizer that made it"
        )
    info = _tokenizer(made_with, tokenizer_type, tokenizer_model, offline)
    for index in indexes:
        said = known.get(index.prefix)
        if said is not None and said.fingerprint != info.fingerprint:
            raise UsageError(
                f"TOKENIZER_MODEL={tokenizer_model}: {keys[index.prefix]}={index.prefix} was made with another "
                f"tokenizer, {said.model} ({said.vocab_size:,} ids; this one has {info.vocab_size:,}). "
                "Unset TOKENIZER_MODEL to use the data's own, or prepare the data with this one"
            )
        if said is None:
            _check_ids(index, info, keys[index.prefix])
    model = info.model
    if made_with is not None and tokenizer_model is None:
        model = resolve_model(model, next(iter(known)))
    return DataFacts(info.vocab_size, info.eod, model, info.fingerprint, sum(index.tokens for index in indexes))


def _variables(paths: Paths) -> dict[str, str]:
    """Each prefix once, with the variable that names it."""
    if not isinstance(paths, Mapping):
        return {prefix: "DATA_PATH" for _, prefix in paths}
    keys: dict[str, str] = {}
    for name in SPLITS:
        for _, prefix in paths.get(name, ()):
            keys.setdefault(prefix, OWN_PATHS[name])
    return keys


def resolve_model(model: str, prefix: str) -> str:
    """A sidecar's tokenizer: `./name` lies beside the data, so that a data folder can be moved."""
    return str(Path(prefix).parent / model) if model.startswith("./") else model


def _tokenizer(made_with: TokenizerInfo | None, type: str, model: str | None, offline: bool) -> TokenizerInfo:
    """The tokenizer asked for, else the data's. The data's own facts are enough: no look at the hub for them."""
    if made_with is not None and (model is None or (model == made_with.model and is_hub_name(model))):
        return made_with
    assert model is not None
    return inspect(model, type, offline)


def recorded(tokenizer: dict[str, Any]) -> TokenizerInfo:
    """A sidecar's tokenizer."""
    return TokenizerInfo(
        type=tokenizer["type"],
        model=tokenizer["model"],
        vocab_size=tokenizer["vocab_size"],
        eod=tokenizer["eod"],
        bos=tokenizer.get("bos"),
        fingerprint=tokenizer["fingerprint"],
    )


def _sidecar(index: Index, key: str) -> dict[str, Any] | None:
    sidecar = read_sidecar(index.prefix)
    if sidecar is not None and sidecar.get("tokens") != index.tokens:
        raise UsageError(
            f"{key}={index.prefix}: {index.prefix}.json speaks of {sidecar.get('tokens')} tokens and the .idx of "
            f"{index.tokens}. Copy .bin, .idx and .json together, or prepare them anew"
        )
    if sidecar is not None and "supervised" in sidecar:
        raise UsageError(
            f"{key}={index.prefix}: is packed for fine-tuning, and pretraining knows no loss mask: it would learn the "
            "prompts too. Prepare plain text: tools/preprocess_data.py"
        )
    return sidecar


def _check_ids(index: Index, info: TokenizerInfo, key: str) -> None:
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
            f"TOKENIZER_MODEL={info.model}: {key}={index.prefix} holds the id {highest:,}, and this tokenizer has "
            f"{info.vocab_size:,} ids only: it is not the one that made the data. Give that one"
        )
