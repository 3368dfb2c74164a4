"""The few facts of a SentencePiece model, read from its protobuf without the library.

Fields by number (google/sentencepiece, src/sentencepiece_model.proto): ModelProto.pieces = 1,
ModelProto.trainer_spec = 2; TrainerSpec.bos_id = 41, eos_id = 42.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rocm.errors import UsageError

PIECES, TRAINER_SPEC, BOS_ID, EOS_ID = 1, 2, 41, 42
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
