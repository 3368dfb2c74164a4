"""`megatron-rocm prepare`: text to PREFIX.bin, PREFIX.idx and PREFIX.json, which DATA_PATH=PREFIX then names."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rocm.config.request import ENVIRONMENT_ONLY, nearest
from megatron_rocm.data import corpus, engine, hub_datasets
from megatron_rocm.data.corpus import Corpus
from megatron_rocm.data.hub_datasets import Wanted
from megatron_rocm.data.indexed import discard
from megatron_rocm.data.source import file, stamp
from megatron_rocm.data.tokenizer import LARGEST, SMALLEST, TokenizerInfo, check_type, inspect, train_bpe
from megatron_rocm.errors import UsageError

# name: default, help
VARIABLES = {
    "DATASET": ("local", "`local`: the text of INPUT; bookcorpus, wiki, fineweb, c4: from the Hugging Face hub"),
    "INPUT": ("", "a folder, a UTF-8 text file, or JSON Lines with the key `text`; unset: the sources and docs of "
                  "this machine's Python"),
    "DATA_DIR": ("data", "folder that receives data_text_document.bin, .idx and .json, and a trained tokenizer"),
    "TOKENIZER_MODEL": ("", "needed: a tokenizer's folder or hub name, or `train:<size>`: a byte-level BPE of that "
                            "many ids trained on the text"),
    "TOKENIZER_TYPE": ("HuggingFaceTokenizer", "HuggingFaceTokenizer, or Llama2Tokenizer (a SentencePiece file)"),
    "APPEND_EOD": ("1", "1: end each document with the tokenizer's EOS (Megatron's own script leaves it out: 0)"),
    "MAX_MB": ("", f"stop after so many MB of text; unset: all of INPUT, {corpus.DEFAULT_MB} of the default text"),
    "MAX_DOCUMENTS": ("", "bookcorpus, wiki, fineweb: stop after so many documents; unset, as MAX_MB: all there are"),
    "CONFIG": ("", "of the hub's set; unset: 20231101.en of wiki, sample-10BT of fineweb"),
    "REVISION": ("", "of the hub's set: a branch or commit; the first call notes the commit, later ones keep to it"),
    "SHARDS": ("", "c4: which of its 1,024 training files, such as 0-7 or 768-1023,validation"),
    "VERIFY": ("0", "c4: 1 reads the files that are there already again, for their checksums"),
    "DOWNLOAD_ONLY": ("0", "1: fetch the text to DATA_DIR and make no tokens of it"),
    "WORKERS": ("", "CPU threads that tokenize; unset: all this process may use"),
    "OVERWRITE": ("0", "1: replace data made from something else"),
}  # fmt: skip
HEADER = """Turn text into the tokens that megatron-core trains on.

  TOKENIZER_MODEL=train:4096 bash examples/llama/prepare_dataset.sh
  TOKENIZER_MODEL=NousResearch/Meta-Llama-3-8B INPUT=~/texts bash examples/llama/prepare_dataset.sh
  TOKENIZER_MODEL=NousResearch/Meta-Llama-3-8B DATASET=fineweb MAX_MB=500 bash examples/llama/prepare_dataset.sh

Variables, from the environment or as KEY=VALUE arguments (the argument wins):
"""
UNTRAINED = TokenizerInfo("HuggingFaceTokenizer", "", 0, 0, None, "")
TRAIN_BYTES = 32 << 20  # text a new BPE is trained on; more changes hardly a merge and takes minutes


@dataclass(frozen=True)
class PrepareRequest:
    """What was asked for, checked one by one. `train_size` is set for TOKENIZER_MODEL=train:<size>.

    `hub` is what to fetch first, `download_only` to do no more than that.
    """

    input: str | None
    hub: Wanted | None
    download_only: bool
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

    max_mb = _number("MAX_MB", said["MAX_MB"], float) if said["MAX_MB"] else None
    hub = hub_datasets.parse(said, None if max_mb is None else int(max_mb * 1e6))
    download_only = _flag("DOWNLOAD_ONLY", said["DOWNLOAD_ONLY"])
    if download_only and hub is None:
        raise UsageError("DOWNLOAD_ONLY=1: DATASET=local has nothing to download; name a DATASET of the hub")
    model = said["TOKENIZER_MODEL"]
    if not model and not download_only:
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
        hub=hub,
        download_only=download_only,
        data_dir=Path(said["DATA_DIR"]).expanduser(),
        tokenizer_model=model,
        tokenizer_type=said["TOKENIZER_TYPE"],
        train_size=train_size,
        append_eod=_flag("APPEND_EOD", said["APPEND_EOD"]),
        max_mb=max_mb,
        workers=int(_number("WORKERS", said["WORKERS"], int)) if said["WORKERS"] else engine.cores(),
        overwrite=_flag("OVERWRITE", said["OVERWRITE"]),
    )


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

    The same request over its own finished output does nothing, and over what a killed one left goes on with it. Raises
    UsageError for everything a person can mend.
    """
    text = None if request.hub else corpus.find(request.input, request.max_mb)
    with _folder_to_ourselves(request.data_dir):
        if text is None:
            text = _fetched(request)
        if request.download_only:
            return str(Path(text.sources[0].path).parent)
        try:
            summary = _make(request, text)
        except OSError as error:
            raise UsageError(
                f"DATA_DIR={request.data_dir}: preparing failed: {error}. Check the space and permissions there"
            ) from None
        except engine.TextFault:
            discard(request.prefix)
            Path(f"{request.prefix}.journal").unlink(missing_ok=True)
            raise
    if not summary.made:
        print(f"{request.prefix}: already made from this text with this tokenizer")
    else:
        if summary.passed_over:
            print(f"skipped {summary.passed_over} files that are not UTF-8 text")
        print(summary)
    print(f"\nnext: DATA_PATH={shlex.quote(request.prefix)} bash examples/llama/train_llama3.sh")
    return request.prefix


def _fetched(request: PrepareRequest) -> Corpus:
    assert request.hub is not None
    files = hub_datasets.fetch(request.hub, request.data_dir)
    # By name, so that DATA_DIR may move; JSON Lines, whatever their ending.
    sources = [file(str(path.resolve()), name=path.name) for path in files]
    return Corpus(f"{request.hub.dataset} in {files[0].parent}", sources, request.hub.limit)


def _make(request: PrepareRequest, text: Corpus) -> engine.Summary:
    job = engine.Job(
        [text.name],
        request.prefix,
        UNTRAINED if request.train_size else inspect(request.tokenizer_model, request.tokenizer_type),
        append_eod=request.append_eod,
        skip_empty=True,
        workers=request.workers,
        limit=text.limit,
        overwrite=request.overwrite,
        input_key="INPUT",
        output_key="DATA_DIR",
        overwrite_flag="OVERWRITE=1",
        skip_flag=None,
    )
    if request.train_size:
        info = _trained(request, text, job)
        job = replace(job, tokenizer=info, recorded=replace(info, model=f"./{_tokenizer_dir(request).name}"))
    return engine.preprocess(job, text.sources)


def _trained(request: PrepareRequest, text: Corpus, job: engine.Job) -> TokenizerInfo:
    """The tokenizer trained on this text, from an earlier call if there was one."""
    assert request.train_size is not None
    folder = _tokenizer_dir(request)
    facts = {"by": "megatron-rocm", "vocab_size": request.train_size, "text": f"{stamp(text.sources)}-{text.limit}"}
    if folder.exists():
        try:
            if json.loads((folder / "trained.json").read_text()) == facts:
                return inspect(str(folder))
        except FileNotFoundError:
            raise UsageError(
                f"DATA_DIR={request.data_dir}: {folder} is there already and was not trained here; move it, name it as "
                "TOKENIZER_MODEL, or give another DATA_DIR"
            ) from None
        except (ValueError, UsageError):
            pass  # damaged: made anew
    engine.refuse_other(job)
    print(f"training a tokenizer of {request.train_size:,} ids on {text.name}", flush=True)
    # Data made with the tokenizer that goes now is data no more.
    Path(f"{request.prefix}.idx").unlink(missing_ok=True)
    # Read when tokenizers first starts its threads.
    os.environ.update(RAYON_NUM_THREADS=str(request.workers), TOKENIZERS_PARALLELISM="true")
    return train_bpe(_first_bytes(text, TRAIN_BYTES), request.train_size, folder, facts)


def _tokenizer_dir(request: PrepareRequest) -> Path:
    return request.data_dir / "tokenizer"


def _first_bytes(text: Corpus, limit: int) -> Iterator[str]:
    for document in corpus.texts(text.sources):
        yield document
        limit -= len(document)
        if limit <= 0:
            return


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
