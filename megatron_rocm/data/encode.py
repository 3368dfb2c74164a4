"""Text to ids as fast as an existing library can, proven on the data itself, else the ordinary way.

The ordinary encoders (data/tokenizer.py) are the reference. A fast one is used only where it gave the same ids for the
first documents and for strings made of the tokenizer's own special tokens; `choose` asks at every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_rocm.data.hub import TokenizerFiles, find_files
from megatron_rocm.data.spm import as_tokenizer_json
from megatron_rocm.data.tokenizer import Encoder, TokenizerInfo, framed, load

SAMPLE_BYTES, LONGEST_SAMPLE = 256 << 10, 32 << 10
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
# Where libraries differ: spaces, line ends, digits, apostrophes, scripts, joiners, rare and private characters.
HARD = (
    "",
    " ",
    "  two  spaces\t\ttabs\r\nlines\n\n\n \n end ",
    "don't DON'T we'Ll I’m 1234567 3.14159 ١٢٣ ½ x²",
    "naïve Ångström ﬁne İstanbul ß ſ e\u0301 \u00a0\u3000\u200b\ufeff\u2028",
    "日本語のテキスト 한국어 ไทย العربية हिन्दी 👩‍👩‍👧‍👦🏽",
    "\u0000\u0001\x7f\ue000\U0010ffff ▁ Ġ <0x41>",
)


@dataclass(frozen=True)
class Choice:
    """What `choose` found, small enough to be handed to another process; `why` says on what grounds."""

    info: TokenizerInfo
    bos: bool
    fast: bool
    why: str


def choose(
    info: TokenizerInfo,
    documents: Sequence[str],
    bos: bool = True,
    fast: Encoder | None = None,
    definition: dict[str, Any] | None = None,
) -> tuple[Choice, Encoder]:
    """The fast encoder where it is proven on `documents` (the first SAMPLE_BYTES count), else the ordinary one.

    `fast`: the fast encoder, where it is open already. `definition`: the tokenizer.json, where it has been read; it is
    used up.
    """
    files = find_files(info.model, info.type)
    if not definition:
        definition = {} if files.sentencepiece else orjson.loads(files.main.read_bytes())
    sample = [*HARD, *_special(definition), *_first(documents)]
    ids, lengths = load(info, bos=bos).encode_batch(sample)
    _give_back_memory()
    try:
        fast = fast or _FastEncoder(info, bos, definition)
        try:
            other, other_lengths = fast.encode_batch(sample)
        except Exception as error:  # a Rust library: every refusal is a bare exception
            raise _Unfit(f"fastokens {_version()} can't encode: {error}") from None
        if not (np.array_equal(lengths, other_lengths) and np.array_equal(ids, other)):
            raise _Unfit(f"fastokens {_version()} gives other ids")
    except _Unfit as error:
        return Choice(info, bos, False, str(error)), load(info, bos=bos)
    return Choice(info, bos, True, f"fastokens {_version()} gave the same ids for {len(sample)} texts"), fast


class Chooser:
    """`choose` for several outputs of one call, each on its own documents; the fast encoder is opened once."""

    def __init__(self, info: TokenizerInfo, definition: dict[str, Any] | None = None, *, bos: bool) -> None:
        self.info, self.bos, self._definition = info, bos, definition
        self._fast: Encoder | None = None

    def choose(self, documents: Sequence[str]) -> tuple[Choice, Encoder]:
        definition, self._definition = self._definition, None
        choice, encoder = choose(self.info, documents, self.bos, self._fast, definition)
        if choice.fast:
            self._fast = encoder
        return choice, encoder


def open_encoder(choice: Choice) -> Encoder:
    """The chosen encoder, in another process than the one that chose."""
    return _FastEncoder(choice.info, choice.bos) if choice.fast else load(choice.info, bos=choice.bos)


class _Unfit(Exception):
    """The fast library can't be used for this tokenizer."""


class _FastEncoder:
    """`parsed`: the tokenizer.json, where it has been read; it is used up."""

    def __init__(self, info: TokenizerInfo, bos: bool, parsed: dict[str, Any] | None = None) -> None:
        self.info = info
        files = find_files(info.model, info.type)
        try:
            import fastokens
        except ImportError:
            raise _Unfit("fastokens is not installed: pip install fastokens") from None
        definition = _definition(files, parsed)
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(definition)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            whole, bare = (list(self._tokenizer.encode("x", special).ids) for special in (True, False))
        except Exception as error:  # a Rust library: every refusal is a bare exception
            raise _Unfit(f"fastokens {_version()} can't read it: {error}") from None
        if files.sentencepiece:
            whole = [*([] if info.bos is None else [info.bos]), *bare]
        added = len(whole) - len(bare)
        if whole[added:] != bare:
            raise _Unfit("it adds ids after a text, not only before")
        self._head = whole[:added] if bos else []

    def encode_batch(self, texts: Sequence[str], eod: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        # A literal special token is text, as in data/tokenizer.py.
        ids, offsets = self._tokenizer.encode_batch_flat(texts, False, True)
        return framed(
            np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.int64)), head=self._head, eod=eod
        )


def _definition(files: TokenizerFiles, parsed: dict[str, Any] | None) -> str:
    """A tokenizer.json in the form that is loaded fastest: half of the time that a small input takes goes there."""
    if files.sentencepiece:
        try:
            definition = as_tokenizer_json(files.main.read_bytes())
        except ValueError as error:
            raise _Unfit(f"its SentencePiece model {error}") from None
    else:
        definition = parsed or orjson.loads(files.main.read_bytes())
        # A literal special token is text, as in data/tokenizer.py, so none needs to be found.
        definition["added_tokens"] = [one for one in definition.get("added_tokens") or () if not one.get("special")]
    model = definition["model"]
    merges = model.get("merges") or ()
    if merges and isinstance(merges[0], list) and not any(" " in piece for piece in model["vocab"]):
        model["merges"] = list(map(" ".join, merges))
    return orjson.dumps(definition).decode()


def _first(documents: Sequence[str]) -> list[str]:
    sample, size = [], 0
    for document in documents:
        sample.append(document[:LONGEST_SAMPLE])
        size += len(sample[-1])
        if size >= SAMPLE_BYTES:
            break
    return sample


def _special(definition: dict[str, Any]) -> list[str]:
    """Texts in which the special tokens of a tokenizer.json stand, alone and among words."""
    added = definition.get("added_tokens") or []
    names = ["<s>", "</s>", "<unk>", "<pad>", *(token["content"] for token in [*added[:50], *added[-50:]])]
    return [text for name in dict.fromkeys(names) for text in (name, f"a {name} b{name}c\n{name}")]


def _version() -> str:
    from importlib import metadata

    return metadata.version("fastokens")


def _give_back_memory() -> None:
    """The reference is some hundred MB of small blocks, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def set_up_process() -> None:
    """Before the libraries are loaded: no thread pools of their own, which spin, and little memory in glibc's heaps.

    There would be eight heaps a CPU. The blocks of a chunk stay in them, as new memory costs a tenth of the time; those
    of a document that is as long as several chunks go back to the kernel.
    """
    os.environ.update(RAYON_NUM_THREADS="1", FASTOKENS_BPE_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_ARENA_MAX, 2)
        set_option(M_MMAP_THRESHOLD, 16 << 20)
        set_option(M_TRIM_THRESHOLD, 64 << 20)
