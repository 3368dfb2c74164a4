"""A SentencePiece model, read from its protobuf without the library: its few facts, or the same as a tokenizer.json.

Fields by number: google/sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rocm.errors import UsageError

PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, WHITESPACE_AS_SUFFIX, BYTE_FALLBACK, BOS_ID, EOS_ID = 3, 24, 35, 41, 42
CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
FIXED = {1: 8, 5: 4}  # wire type: bytes


@dataclass(frozen=True)
class SentencePieceModel:
    vocab_size: int
    bos: int | None
    eos: int


def read_model(raw: bytes, model: str) -> SentencePieceModel:
    """Parse a tokenizer.model. Raises UsageError, naming TOKENIZER_MODEL=`model`, where it is none."""
    pieces, ids = 0, {BOS_ID: 1, EOS_ID: 2}  # SentencePiece's own defaults
    try:
        for number, value in _fields(raw):
            if number == PIECES:
                pieces += 1
            elif number == TRAINER_SPEC and isinstance(value, bytes):
                ids.update({key: id for key, id in _fields(value) if key in ids and isinstance(id, int)})
    except (IndexError, ValueError):
        pieces = 0
    bos, eos = (id - (1 << 64) if id >> 63 else id for id in (ids[BOS_ID], ids[EOS_ID]))
    if not pieces:
        raise UsageError(f"TOKENIZER_MODEL={model}: this is no SentencePiece model; get the file again")
    if not 0 <= eos < pieces:
        raise UsageError(f"TOKENIZER_MODEL={model}: its model has no end-of-sentence piece, name another")
    return SentencePieceModel(pieces, bos if bos >= 0 else None, eos)


def as_tokenizer_json(raw: bytes) -> dict[str, Any]:
    """The model as Hugging Face's tokenizer.json spells it: BPE over characters, merges in the order of the scores.

    SentencePiece merges over a whole document; words are cut off here first, before every run of spaces, which no
    piece may cross. Raises ValueError for a model that this form can't hold.
    """
    pieces, trainer, normalizer = _all(raw)
    checks = (
        (trainer.get(MODEL_TYPE) == BPE, "is not of the type BPE"),
        (not trainer.get(WHITESPACE_AS_SUFFIX), "puts spaces behind words"),
        (not normalizer.get(CHARSMAP), "normalizes characters"),
        (not normalizer.get(REMOVE_SPACES, 1), "removes spaces"),
        (normalizer.get(ESCAPE_SPACES, 1), "does not escape spaces"),
        (not any(kind in (USER_DEFINED, UNUSED) for _, _, kind in pieces), "has pieces of the user's or unused ones"),
        (sum(kind == UNKNOWN for _, _, kind in pieces) == 1, "has no unknown piece"),
        (not any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece, _, _ in pieces), "has pieces across words"),
    )
    for good, why in checks:
        if not good:
            raise ValueError(why)
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    merges = [
        (-score, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=lambda merge: merge[0])
    prefix = [{"type": "Prepend", "prepend": SPACE}] if normalizer.get(DUMMY_PREFIX, 1) else []
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece for piece, _, kind in pieces if kind == UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(trainer.get(BYTE_FALLBACK)),
            "ignore_merges": False,
            "vocab": {piece: id for id, (piece, _, _) in enumerate(pieces)},
            "merges": [[left, right] for _, left, right in merges],
        },
    }


Spec = dict[int, "int | bytes"]


def _all(raw: bytes) -> tuple[list[tuple[str, float, int]], Spec, Spec]:
    """The pieces (text, score, type), the trainer's and the normalizer's settings."""
    pieces: list[tuple[str, float, int]] = []
    specs: dict[int, Spec] = {TRAINER_SPEC: {}, NORMALIZER_SPEC: {}}
    for number, value in _fields(raw):
        if number == PIECES and isinstance(value, bytes):
            facts: dict[int, Any] = {SCORE: b"\0\0\0\0", TYPE: NORMAL, **dict(_fields(value))}
            pieces.append((facts[PIECE].decode(), struct.unpack("<f", facts[SCORE])[0], facts[TYPE]))
        elif number in specs and isinstance(value, bytes):
            specs[number].update(_fields(value))
    return pieces, specs[TRAINER_SPEC], specs[NORMALIZER_SPEC]


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in FIXED:
            size = FIXED[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(raw):
            raise ValueError("truncated")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")
