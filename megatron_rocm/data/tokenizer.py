"""A tokenizer as far as data needs it: what it is (`inspect`), text to ids (`load`), a new one (`train_bpe`).

`inspect` reads plain files and imports no library. Megatron-LM's names for the types are kept.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from megatron_rocm.data.hub import MAIN_FILES, TokenizerFiles, find_files
from megatron_rocm.data.spm import read_model
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

TYPES = tuple(MAIN_FILES)
REFUSED_TYPES = {
    "NullTokenizer": "leave DATA_PATH unset for mock data",
    "SentencePieceTokenizer": "set TOKENIZER_TYPE=Llama2Tokenizer for a SentencePiece tokenizer.model",
    "GPTSentencePieceTokenizer": "set TOKENIZER_TYPE=Llama2Tokenizer for a SentencePiece tokenizer.model",
    "GPT2BPETokenizer": "set TOKENIZER_TYPE=HuggingFaceTokenizer TOKENIZER_MODEL=openai-community/gpt2",
    "TikTokenizer": "convert it to a tokenizer.json and set TOKENIZER_TYPE=HuggingFaceTokenizer",
    "BertWordPieceLowerCase": "it is not a language model's tokenizer",
    "BertWordPieceCase": "it is not a language model's tokenizer",
}

# Llama 3's split into words before BPE (meta-llama/llama3, llama/tokenizer.py).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SMALLEST, LARGEST = 300, 200_000  # 256 bytes and the special tokens; beyond, training takes hours and gains nothing


@dataclass(frozen=True)
class TokenizerInfo:
    """`vocab_size` is the highest id + 1, added tokens included. Equal fingerprints mean equal ids for equal pieces."""

    type: str
    model: str
    vocab_size: int
    eod: int
    bos: int | None
    fingerprint: str


class Encoder(Protocol):
    """Text to ids, special tokens (Llama: the leading BOS) added as the tokenizer itself adds them, or left out."""

    info: TokenizerInfo

    def encode_batch(self, texts: Sequence[str], eod: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after the other (uint32), and the number of ids of each text.

        `eod` ends each text; one without ids stays empty, as in Megatron-LM's preprocess_data.py.
        """
        ...


def framed(
    ids: np.ndarray, lengths: np.ndarray, head: Sequence[int] = (), eod: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts with `head` before those of each, and `eod` after each that then has any."""
    if not head and eod is None:
        return ids, lengths
    full = lengths + len(head)
    grown = full if eod is None else full + (full > 0)
    ends = np.cumsum(grown)
    starts = ends - grown
    added = [(starts + at, id) for at, id in enumerate(head)]
    if eod is not None:
        added.append((ends[grown > 0] - 1, eod))
    theirs = np.ones(int(ends[-1]) if len(ends) else 0, bool)
    out = np.empty(len(theirs), ids.dtype)
    for places, id in added:
        theirs[places] = False
        out[places] = id
    out[theirs] = ids
    return out, grown


def check_type(type: str) -> None:
    """Raise UsageError for a TOKENIZER_TYPE that is not one of ours."""
    if type in TYPES:
        return
    if type in REFUSED_TYPES:
        raise UsageError(f"TOKENIZER_TYPE={type} is not supported: {REFUSED_TYPES[type]}")
    near = difflib.get_close_matches(type, TYPES, 1, 0)[0]
    raise UsageError(f"TOKENIZER_TYPE={type}: there is {' and '.join(TYPES)}; did you mean {near}?")


def inspect(model: str, type: str = "HuggingFaceTokenizer", offline: bool = False) -> TokenizerInfo:
    """What a folder's, file's or hub repository's tokenizer is, from its files alone.

    A hub name is looked for in the local Hugging Face cache, then downloaded (HF_TOKEN, HF_ENDPOINT); `offline`
    stops before the network. Raises UsageError for everything that is missing, gated, unreachable or unreadable.
    """
    return inspect_parsed(model, type, offline)[0]


def inspect_parsed(
    model: str, type: str = "HuggingFaceTokenizer", offline: bool = False
) -> tuple[TokenizerInfo, dict[str, Any]]:
    """`inspect`, and the tokenizer.json that was read for it; {} for a SentencePiece model."""
    check_type(type)
    return _describe(find_files(model, type, offline), model, type)


def load(
    model: str | TokenizerInfo, type: str = "HuggingFaceTokenizer", offline: bool = False, bos: bool = True
) -> Encoder:
    """The encoder of a tokenizer; arguments and errors as for `inspect`. Without `bos` no special tokens are added."""
    if isinstance(model, TokenizerInfo):
        info, files = model, find_files(model.model, model.type, offline)
    else:
        check_type(type)
        files = find_files(model, type, offline)
        info, _ = _describe(files, model, type)
    return (_SentencePieceEncoder if files.sentencepiece else _FastEncoder)(info, files.main, bos)


def _describe(files: TokenizerFiles, model: str, kind: str) -> tuple[TokenizerInfo, dict[str, Any]]:
    if files.sentencepiece:
        raw = files.main.read_bytes()
        spm = read_model(raw, model)
        return TokenizerInfo(kind, model, spm.vocab_size, spm.eos, spm.bos, hashlib.sha256(raw).hexdigest()), {}
    tokenizer = _read_json(files.main, model)
    try:
        vocab = tokenizer["model"]["vocab"]
        # Unigram has a list of [piece, score], all others {token: id}.
        ids = dict(vocab) if isinstance(vocab, dict) else {piece[0]: id for id, piece in enumerate(vocab)}
        ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()})
        if {*map(type, ids.values())} != {int} or min(ids.values()) < 0:
            raise ValueError("ids are whole numbers from 0 up")
        size = max(ids.values()) + 1
        fingerprint = _fingerprint(tokenizer)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UsageError(
            f"TOKENIZER_MODEL={model}: {files.main} is not a Hugging Face tokenizer.json; save it again with "
            "save_pretrained, or name another tokenizer"
        ) from None
    eos, bos = _special(files, model, "eos_token"), _special(files, model, "bos_token")
    if eos not in ids:
        said = f"its eos_token {eos!r} is not in its vocabulary" if eos else "it names no eos_token"
        raise UsageError(
            f"TOKENIZER_MODEL={model}: {said}, and documents must end with one. "
            f"Set eos_token in {files.main.with_name('tokenizer_config.json')}"
        )
    return TokenizerInfo(kind, model, size, ids[eos], ids.get(bos), fingerprint), tokenizer


def _fingerprint(tokenizer: dict[str, Any]) -> str:
    """sha256 over vocabulary, merges and added tokens, whichever way the library that saved them spells them."""
    model = tokenizer["model"]
    vocab = model["vocab"]
    merges = model.get("merges") or []
    parts = {
        "vocab": sorted(vocab.items(), key=itemgetter(1)) if isinstance(vocab, dict) else vocab,
        "merges": merges if merges and isinstance(merges[0], str) else list(map(" ".join, merges)),
        "added": sorted((token["id"], token["content"]) for token in tokenizer.get("added_tokens") or ()),
    }
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def _special(files: TokenizerFiles, model: str, name: str) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = files.companion(file)
        value = _read_json(path, model).get(name) if path else None
        if isinstance(value, dict):
            value = value.get("content")
        if value and isinstance(value, str):
            return value
    return None


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"TOKENIZER_MODEL={model}: {path} can't be read ({error}); get or save the tokenizer again"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"TOKENIZER_MODEL={model}: {path} holds no JSON object; get or save the tokenizer again")
    return value


class _FastEncoder:
    def __init__(self, info: TokenizerInfo, path: Path, bos: bool) -> None:
        from tokenizers import Tokenizer

        self.info = info
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(
                f"TOKENIZER_MODEL={info.model}: the installed tokenizers can't read {path}: {error}; "
                "try `pip install -U tokenizers`"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A literal "<|end_of_text|>" inside a document is text, it must not end the document.
        self._tokenizer.encode_special_tokens = True
        self._bos = bos

    def encode_batch(self, texts: Sequence[str], eod: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=self._bos)
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(
                f"TOKENIZER_MODEL={self.info.model}: it can't encode this text: {error}; save it with an unknown token "
                "or byte fallback, or name another tokenizer"
            ) from None
        return framed(*_joined([one.ids for one in encoded]), eod=eod)


class _SentencePieceEncoder:
    def __init__(self, info: TokenizerInfo, path: Path, bos: bool) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UsageError(
                f"TOKENIZER_MODEL={info.model}: encoding with a SentencePiece model needs sentencepiece "
                "(pip install sentencepiece), or name a tokenizer that has a tokenizer.json"
            ) from None
        self.info = info
        self._processor = SentencePieceProcessor(model_file=str(path))
        self._bos = bos and info.bos is not None  # Megatron-LM's own Llama2Tokenizer begins every document with it

    def encode_batch(self, texts: Sequence[str], eod: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return framed(*_joined(self._processor.encode(list(texts), add_bos=self._bos, num_threads=1)), eod=eod)


def _joined(encoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.array(ids, np.uint32) for ids in encoded]
    return np.concatenate([np.empty(0, np.uint32), *arrays]), np.array([len(ids) for ids in arrays], np.int64)


def train_bpe(
    texts: Iterable[str], vocab_size: int, out_dir: str | Path, facts: dict[str, Any] | None = None
) -> TokenizerInfo:
    """Train a byte-level BPE in Llama 3's manner and write a folder that transformers' AutoTokenizer loads.

    The folder appears whole or not at all, replaces one of the same name, and holds `facts` as `trained.json`.
    The vocabulary is smaller than asked for where the text has no more pairs to merge. Raises UsageError for a size
    outside 300 to 200,000.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UsageError(
            f"TOKENIZER_MODEL=train:{vocab_size}: the size must be {SMALLEST} to {LARGEST} (256 bytes, the special "
            "tokens, and merges); train:4096 suits a trial"
        )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )

    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    out = Path(out_dir)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (partial / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
        (partial / "trained.json").write_text(json.dumps(facts or {}) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return inspect(str(out))
