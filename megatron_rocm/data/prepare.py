"""`megatron-rocm prepare`: text to PREFIX.bin, PREFIX.idx and PREFIX.json, which DATA_PATH=PREFIX then names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_rocm.config.request import ENVIRONMENT_ONLY, nearest
from megatron_rocm.data import corpus
from megatron_rocm.data.corpus import Corpus
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.indexed import SIDECAR_FORMAT, IndexedWriter, open_index, read_sidecar
from megatron_rocm.data.tokenizer import LARGEST, SMALLEST, TokenizerInfo, check_type, inspect, load, train_bpe
from megatron_rocm.errors import UsageError

# name: default, help
VARIABLES = {
    "DATASET": ("local", "`local`: the text of INPUT"),
    "INPUT": ("", "a folder, a UTF-8 text file, or JSON Lines with the key `text`; unset: the sources and docs of "
                  "this machine's Python"),
    "DATA_DIR": ("data", "folder that receives data_text_document.bin, .idx and .json, and a trained tokenizer"),
    "TOKENIZER_MODEL": ("", "needed: a tokenizer's folder or hub name, or `train:<size>`: a byte-level BPE of that "
                            "many ids trained on the text"),
    "TOKENIZER_TYPE": ("HuggingFaceTokenizer", "HuggingFaceTokenizer, or Llama2Tokenizer (a SentencePiece file)"),
    "APPEND_EOD": ("1", "1: end each document with the tokenizer's EOS (Megatron's own script leaves it out: 0)"),
    "MAX_MB": ("", f"stop after so many MB of text; unset: all of INPUT, {corpus.DEFAULT_MB} of the default text"),
    "WORKERS": ("", "CPU threads that tokenize; unset: all this process may use"),
    "OVERWRITE": ("0", "1: replace data made from something else"),
}  # fmt: skip
LATER_DATASETS = ("bookcorpus", "wiki", "fineweb")
HEADER = """Turn text into the tokens that megatron-core trains on.

  TOKENIZER_MODEL=train:4096 bash examples/llama/prepare_dataset.sh
  TOKENIZER_MODEL=NousResearch/Meta-Llama-3-8B INPUT=~/texts bash examples/llama/prepare_dataset.sh

Variables, from the environment or as KEY=VALUE arguments (the argument wins):
"""
BATCH_BYTES = 1 << 20  # text per call of the tokenizer: large enough for its threads, small enough for memory
TRAIN_BYTES = 32 << 20  # text a new BPE is trained on; more changes hardly a merge and takes minutes


@dataclass(frozen=True)
class PrepareRequest:
    """What was asked for, checked one by one. `train_size` is set for TOKENIZER_MODEL=train:<size>."""

    input: str | None
    data_dir: Path
    tokenizer_model: str
    tokenizer_type: str
    train_size: int | None
    append_eod: bool
    max_mb: float | None
    workers: int
    overwrite: bool

    @property
    def prefix(self) -> str:
        return str(self.data_dir / "data_text_document")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> PrepareRequest:
    """KEY=VALUE arguments over the environment. Raises UsageError naming key, value and rule."""
    said = {name: environment.get(name) or default for name, (default, _) in VARIABLES.items()}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ENVIRONMENT_ONLY:
            raise UsageError(f"{name}: a secret given as an argument shows in the process list; say `export {name}=…`")
        if not equals or name not in VARIABLES:
            raise UsageError(f"{argument}: unknown key; {nearest(name, VARIABLES)}")
        said[name] = value or VARIABLES[name][0]

    dataset = said["DATASET"]
    if dataset in LATER_DATASETS:
        raise UsageError(
            f"DATASET={dataset}: downloading {dataset} is not in this version. Get its text yourself and give "
            "DATASET=local INPUT=<folder or .jsonl file>"
        )
    if dataset != "local":
        raise UsageError(f"DATASET={dataset}: must be local, with INPUT=<folder, text or .jsonl file>")
    model = said["TOKENIZER_MODEL"]
    if not model:
        raise UsageError(
            "TOKENIZER_MODEL is needed: a tokenizer's folder, a hub name such as NousResearch/Meta-Llama-3-8B, or "
            "train:4096 to train one on the text"
        )
    check_type(said["TOKENIZER_TYPE"])
    train_size = _train_size(model) if model.startswith("train:") else None
    if train_size is not None and said["TOKENIZER_TYPE"] != "HuggingFaceTokenizer":
        raise UsageError(f"TOKENIZER_TYPE={said['TOKENIZER_TYPE']}: {model} makes a HuggingFaceTokenizer; leave it out")
    return PrepareRequest(
        input=said["INPUT"] or None,
        data_dir=Path(said["DATA_DIR"]).expanduser(),
        tokenizer_model=model,
        tokenizer_type=said["TOKENIZER_TYPE"],
        train_size=train_size,
        append_eod=_flag("APPEND_EOD", said["APPEND_EOD"]),
        max_mb=_number("MAX_MB", said["MAX_MB"], float) if said["MAX_MB"] else None,
        workers=int(_number("WORKERS", said["WORKERS"], int)) if said["WORKERS"] else _cores(),
        overwrite=_flag("OVERWRITE", said["OVERWRITE"]),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_size(model: str) -> int:
    text = model.removeprefix("train:")
    if not (text.isascii() and text.isdigit()) or not SMALLEST <= int(text[:9]) <= LARGEST:
        raise UsageError(
            f"TOKENIZER_MODEL={model}: the size after train: must be a whole number from {SMALLEST} to {LARGEST}, "
            "e.g. train:4096"
        )
    return int(text)


def _flag(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise UsageError(f"{name}={value}: must be 0 or 1")
    return value == "1"


def _number(name: str, value: str, kind: type[int] | type[float]) -> float:
    words = "a whole number" if kind is int else "a number"
    try:
        number = kind(value)
    except ValueError:
        raise UsageError(f"{name}={value}: must be {words} above 0") from None
    if not 0 < number < 1e9:
        raise UsageError(f"{name}={value}: must be {words} above 0")
    return number


def prepare(request: PrepareRequest) -> str:
    """Make the data and return its prefix; nothing has its final name until it is whole.

    The same request over its own finished output does nothing. Raises UsageError for everything a person can mend.
    """
    text = corpus.find(request.input, request.max_mb)
    info = None if request.train_size else inspect(request.tokenizer_model, request.tokenizer_type)
    stamp = _stamp(request, text, info)
    with _folder_to_ourselves(request.data_dir):
        if _done(request, stamp):
            print(f"{request.prefix}: already made from this text with this tokenizer")
        else:
            try:
                _make(request, text, info, stamp)
            except OSError as error:
                raise UsageError(
                    f"DATA_DIR={request.data_dir}: preparing failed: {error}. Check the space and permissions there"
                ) from None
    print(f"\nnext: DATA_PATH={shlex.quote(request.prefix)} bash examples/llama/train_llama3.sh")
    return request.prefix


def _stamp(request: PrepareRequest, text: Corpus, info: TokenizerInfo | None) -> str:
    """Equal for requests that give equal data."""
    tokenizer = info.fingerprint if info else request.tokenizer_model
    facts = [SIDECAR_FORMAT, text.stamp, tokenizer, request.tokenizer_type, request.append_eod]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _done(request: PrepareRequest, stamp: str) -> bool:
    """Whether the output is there and whole. Raises UsageError where somebody's other data would be replaced."""
    if not Path(f"{request.prefix}.idx").exists():
        return False
    sidecar = read_sidecar(request.prefix)
    if sidecar is not None and sidecar["source"].get("stamp") == stamp:
        try:
            open_index(request.prefix)
            made = sidecar["tokenizer"]
            return not request.train_size or inspect(str(_tokenizer_dir(request))).fingerprint == made["fingerprint"]
        except UsageError:
            return False
    if request.overwrite:
        return False
    of = "by another program"
    if sidecar is not None:
        of = f"from {sidecar['source'].get('input')} with {sidecar['tokenizer']['model']}"
    raise UsageError(
        f"DATA_DIR={request.data_dir}: {Path(request.prefix).name} is there already, made {of}. "
        "Give another DATA_DIR, or OVERWRITE=1 to replace it"
    )


def _make(request: PrepareRequest, text: Corpus, info: TokenizerInfo | None, stamp: str) -> None:
    began = time.monotonic()
    # Read when tokenizers first starts its threads.
    os.environ["RAYON_NUM_THREADS"] = str(request.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if info is None:
        info = _trained(request, text)
        named = replace(info, model=f"./{_tokenizer_dir(request).name}")
    else:
        named = info if is_hub_name(info.model) else replace(info, model=str(Path(info.model).expanduser().resolve()))
    encoder = load(info)
    read = 0
    with IndexedWriter(request.prefix, info.vocab_size) as writer, ThreadPoolExecutor(1) as thread:
        running: deque[tuple[int, Future[tuple[np.ndarray, np.ndarray]]]] = deque()

        def write_next() -> int:
            size, future = running.popleft()
            ids, lengths = future.result()
            writer.add(*(_with_eod(ids, lengths, info.eod) if request.append_eod else (ids, lengths)))
            return size

        heartbeat = began
        for batch in _batches(text.texts()):
            running.append((sum(len(one.encode()) for one in batch), thread.submit(encoder.encode_batch, batch)))
            # One batch is tokenized while the one before is written and the next is read.
            if len(running) > 2:
                read += write_next()
            if time.monotonic() - heartbeat > 10:
                heartbeat = time.monotonic()
                print(f"  {read / 1e6:,.0f} MB, {read / 1e6 / (heartbeat - began):.1f} MB/s", flush=True)
        while running:
            read += write_next()
        if not writer.tokens:
            raise UsageError(f"INPUT={text.name}: holds no text. Give UTF-8 text, or JSON Lines with the key `text`")
        writer.finalize(
            {
                "format": SIDECAR_FORMAT,
                "tokenizer": asdict(named),
                "documents": writer.documents,
                "tokens": writer.tokens,
                "bytes": read,
                "source": {"input": text.name, "stamp": stamp, "append_eod": request.append_eod},
            }
        )
    seconds = time.monotonic() - began
    if text.skipped:
        print(f"skipped {text.skipped} files that are not UTF-8 text")
    print(
        f"{request.prefix}: {writer.documents:,} documents, {writer.tokens:,} tokens, {read:,} bytes of text "
        f"({read / writer.tokens:.2f} a token), {info.vocab_size:,} ids, {seconds:.1f} s"
    )


def _trained(request: PrepareRequest, text: Corpus) -> TokenizerInfo:
    folder = _tokenizer_dir(request)
    if folder.exists() and not (folder / "trained.json").is_file():
        raise UsageError(
            f"DATA_DIR={request.data_dir}: {folder} is there already and was not trained here; move it, name it as "
            "TOKENIZER_MODEL, or give another DATA_DIR"
        )
    print(f"training a tokenizer of {request.train_size:,} ids on {text.name}", flush=True)
    # Data made with the tokenizer that goes now is data no more.
    Path(f"{request.prefix}.idx").unlink(missing_ok=True)
    assert request.train_size is not None
    return train_bpe(_first_bytes(text, TRAIN_BYTES), request.train_size, folder)


def _tokenizer_dir(request: PrepareRequest) -> Path:
    return request.data_dir / "tokenizer"


def _first_bytes(text: Corpus, limit: int) -> Iterator[str]:
    for document in text.texts():
        yield document
        limit -= len(document)
        if limit <= 0:
            return


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _with_eod(ids: np.ndarray, lengths: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """One EOD after each document; an empty one stays empty, as in Megatron-LM's preprocess_data.py."""
    full = lengths > 0
    ends = np.cumsum(lengths)[full]
    return np.insert(ids, ends, eod), lengths + full


@contextlib.contextmanager
def _folder_to_ourselves(folder: Path) -> Iterator[None]:
    """DATA_DIR, made, writable, and held against a second `prepare` until the block ends or the process dies."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".prepare.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"DATA_DIR={folder}: can't be written ({error.strerror}). Give a folder that this user may write to"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"DATA_DIR={folder}: another `prepare` is writing there. Wait for it, or give another DATA_DIR"
            ) from None
        except OSError:
            pass  # a file system without locks: each part still appears whole or not at all
        yield


def help_text() -> str:
    """What `--help` prints."""
    lines = [f"  {name:16} {help} [{default or 'unset'}]" for name, (default, help) in VARIABLES.items()]
    return HEADER + "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """`megatron-rocm prepare [KEY=VALUE …]`. Raises UsageError for what a person can mend."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text())
        return 0
    prepare(parse(arguments, os.environ))
    return 0
