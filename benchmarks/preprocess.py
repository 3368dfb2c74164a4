#!/usr/bin/env python3
"""Text to training data: CPU seconds, speed and memory of ours, tokenizers, datatrove and Megatron-LM's two tools.

    python benchmarks/preprocess.py --work FOLDER [--rounds 3] [--megatron CHECKOUT] [--datatrove PYTHON] [--large 5]

The corpus is at least 300 MB of text out of Debian's documentation packages, in eight languages, one JSON object a
page; `apt-get download` gets the packages. The BPE has the 131,072 ids of mistral-common's tekken vocabulary, the
SentencePiece model is mistral-common's first one (Llama 2's kind): `pip install mistral-common`.

Every contender is a process of its own, told to use two workers, and they take turns. CPU seconds are those of all its
processes, start and libraries included; memory is the highest sum of their proportional set sizes (PSS), looked at
up to ten times a second. Where others use the machine too, CPU time is the measure to trust.

    ours                tools/preprocess_data.py
    ours, split in 4    four shards and their merge, for what dividing costs
    tokenize only       the same encoder on texts that are in memory, nothing written
    tokenizers          encode_batch_fast of 1,000 documents at a time, ids to a file
    datatrove           JsonlReader and DocumentTokenizer, 2 tasks
    Megatron-LM         tools/preprocess_data.py and preprocess_data_fast.py of CHECKOUT
    …, SentencePiece    with that model; the library itself, as `sentencepiece`

`--check` makes the same files with the libraries themselves and megatron-core's IndexedDatasetBuilder, both tokenizers,
with and without EOD, and compares every byte. `--large GB` runs ours on the corpus over and over until so much is read,
for its memory.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import html
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "python3.11-doc", "postgresql-doc-15", "debian-handbook", "linux-doc-6.1", "vim-doc", "openjdk-17-doc",
    *(f"libreoffice-help-{language}" for language in ("ja", "zh-cn", "ru", "de", "ko", "fr", "hi")),
    "rust-doc",
)  # fmt: skip
TEXT_BYTES = 300_000_000
LONGEST = 2_000_000  # an index of 20 MB is no page, and would be all that the figures of memory tell of
PAGE = (".html", ".xhtml", ".txt", ".rst", ".gz")
WORKERS = 2


def corpus(work: Path) -> Path:
    """WORK/corpus.jsonl, made once."""
    path = work / "corpus.jsonl"
    if path.exists():
        return path
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    size = documents = 0
    with open(work / "corpus.partial", "w") as out:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", "-q", package], cwd=packages, check=True, stdout=subprocess.DEVNULL)
            archive = next(packages.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, packages / package], check=True)
            before = size
            for text in _pages(packages / package):
                out.write(json.dumps({"id": documents, "package": package, "text": text}) + "\n")
                size += len(text.encode())
                documents += 1
                if size >= TEXT_BYTES and package == PACKAGES[-1]:
                    break
            shutil.rmtree(packages / package)
            print(f"  {package}: {(size - before) / 1e6:.0f} MB", flush=True)
    os.replace(work / "corpus.partial", path)
    print(f"{path}: {documents:,} documents, {size / 1e6:.0f} MB of text")
    return path


def _pages(folder: Path) -> Iterator[str]:
    import gzip

    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.suffix not in PAGE:
            continue
        raw = path.read_bytes()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            if "<html" in text[:2000].lower():
                text = re.sub(r"(?s)<(script|style|head|nav)\b.*?</\1>", "", text)
                text = html.unescape(re.sub(r"(?s)<[^>]*>", "", text))
                text = re.sub(r"\n\s*\n+", "\n\n", text).strip()
            if 200 < len(text) < LONGEST:
                yield text


def tekken(folder: Path) -> Path:
    """mistral-common's tekken vocabulary as a tokenizer.json: byte-level BPE, merges in the order of the ranks."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    source = json.loads((_mistral_common() / "tekken_240911.json").read_bytes())
    config = source["config"]
    special = config["default_num_special_tokens"]
    ranked = source["vocab"][: config["default_vocab_size"] - special]
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in ranked}
    # GPT-2's letters for bytes: those that can be printed stand for themselves, the others follow from 256 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}

    def spelt(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    merges = sorted(
        (rank, ranks[left], ranks[right], spelt(left), spelt(right))
        for piece, rank in ranks.items()
        for left, right in ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if left in ranks and right in ranks
    )
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{at}>" for at in range(3, special))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": at, "content": name, **flags} for at, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: at for at, name in enumerate(names)}
            | {spelt(piece): rank + special for piece, rank in ranks.items()},
            "merges": [[left, right] for *_, left, right in merges],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def sentencepiece(folder: Path) -> Path:
    """The folder of a SentencePiece tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_mistral_common() / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def _mistral_common() -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data"


class Spent(NamedTuple):
    """Of one process with all its children: CPU seconds, wall seconds, peak of PSS in MB, what it printed."""

    cpu: float
    wall: float
    memory: float
    output: str


def measure(command: list[str], log: Path, environment: dict[str, str]) -> Spent:
    """Run it to its end. Raises CalledProcessError with the end of its output."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        peak = [0.0]
        seconds: dict[int, float] = {}
        watcher = threading.Thread(target=_watch, args=(process, peak, seconds))
        watcher.start()
        process.wait()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = log.read_text(errors="replace")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # A fork server does not tell of its children.
    return Spent(max(cpu, sum(seconds.values())), time.monotonic() - began, peak[0], output)


def _watch(process: subprocess.Popen[bytes], peak: list[float], seconds: dict[int, float]) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total, looked = 0, time.monotonic()
            for one in (root, *root.children(recursive=True)):
                with contextlib.suppress(OSError, psutil.Error):
                    spent = one.cpu_times()
                    seconds[one.pid] = spent.user + spent.system
                    for line in Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines():
                        if line.startswith("Pss:"):
                            total += int(line.split()[1])
            peak[0] = max(peak[0], total * 1024 / 1e6)
            time.sleep(max(0.1, 10 * (time.monotonic() - looked)))  # of large processes it takes long


Command = tuple[list[str], dict[str, str]]


def contenders(said: argparse.Namespace, path: Path) -> dict[str, Command]:
    """Name → command and what it needs in its environment."""
    bpe, spm = str(tekken(said.work / "tekken")), str(sentencepiece(said.work / "sentencepiece"))
    out = said.work / "out"
    me, tool = [sys.executable, __file__], [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    flags = ["--input", str(path), "--append-eod", "--workers", str(WORKERS)]
    with_bpe = [*flags, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", bpe]
    with_spm = [*flags, "--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model"]
    spm_file = f"{spm}/tokenizer.model"
    here = {"PYTHONPATH": str(ROOT)}
    one = {"RAYON_NUM_THREADS": "1"}
    found: dict[str, Command] = {
        "ours": ([*tool, *with_bpe, "--overwrite", "--output-prefix", f"{out}/ours"], here),
        "ours, 4 shards": ([*me, "--do", "shards", *with_bpe, "--overwrite", "--output-prefix", f"{out}/shards"], here),
        "tokenize only": ([*me, "--do", "encode", bpe, "HuggingFaceTokenizer", str(path)], here | one),
        "tokenizers": (
            [*me, "--do", "tokenizers", bpe, str(path), f"{out}/tokenizers.bin"],
            {"RAYON_NUM_THREADS": "2"},
        ),
        "ours, SentencePiece": ([*tool, *with_spm, spm_file, "--overwrite", "--output-prefix", f"{out}/ours-sp"], here),
        "sentencepiece": ([*me, "--do", "sentencepiece", spm_file, str(path), f"{out}/sp.bin"], {}),
    }
    if said.datatrove:
        found["datatrove"] = ([said.datatrove, __file__, "--do", "datatrove", bpe, str(path), f"{out}/datatrove"], {})
    if said.megatron:
        theirs = {"PYTHONPATH": f"{said.megatron}:{os.environ.get('PYTHONPATH', '')}"}
        slow, fast = (f"{said.megatron}/tools/preprocess_data{name}.py" for name in ("", "_fast"))
        found["Megatron-LM preprocess_data.py"] = (
            [sys.executable, slow, *with_bpe, "--output-prefix", f"{out}/megatron", "--log-interval", "100000"], theirs
        )  # fmt: skip
        found["Megatron-LM preprocess_data_fast.py"] = (
            [sys.executable, fast, *with_bpe[:3], *with_bpe[5:], "--use-gigatoken", "--output-prefix", f"{out}/fast"],
            theirs,
        )
    return {name: command for name, command in found.items() if not said.only or name in said.only}


def run(said: argparse.Namespace) -> None:
    """All contenders in turns, the slow ones once, and the table."""
    path = corpus(said.work)
    with open(path, "rb") as file:
        size = sum(len(json.loads(line)["text"].encode()) for line in file)
    spent: dict[str, list[Spent]] = {}
    for turn in range(said.rounds):
        for name, (command, environment) in contenders(said, path).items():
            if turn and not spent[name][0].cpu < 100:
                continue
            shutil.rmtree(said.work / "out", ignore_errors=True)  # ours would find its work done
            (said.work / "out").mkdir()
            try:
                last = measure(command, said.work / "log", environment)
            except subprocess.CalledProcessError as error:
                print(f"{name}: failed: {error.output}")
                last = Spent(float("nan"), float("nan"), float("nan"), "")
            spent.setdefault(name, []).append(last)
            print(f"  {name}: {last.cpu:.1f} CPU s, {last.wall:.1f} s, {last.memory:.0f} MB", flush=True)
    print(f"\n{size / 1e6:.0f} MB of text, {os.path.getsize(path) / 1e6:.0f} MB of JSON Lines, {WORKERS} workers\n")
    print(
        "| | rounds | CPU s | s | MB/s | peak memory, MB | its CPU time to ours |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    middle = {name: [statistics.median(row[at] for row in rows) for at in range(3)] for name, rows in spent.items()}  # type: ignore[type-var]
    for name, (cpu, wall, memory) in middle.items():
        ours = middle.get("ours, SentencePiece" if "entence" in name else "ours", [float("nan")])[0]
        print(
            f"| {name} | {len(spent[name])} | {cpu:.1f} | {wall:.1f} | {size / 1e6 / wall:.1f} | {memory:.0f} "
            f"| {cpu / ours:.1f} |"
        )
    if "tokenize only" in spent:
        said_of = [row.output.strip() for row in spent["tokenize only"]]
        alone = statistics.median(float(re.findall(r"([\d.]+) CPU s together", told)[-1]) for told in said_of)
        print(f"\n{said_of[-1]}\nours: {alone / middle['ours'][0]:.0%} of its throughput")


def do_encode(model: str, kind: str, path: str) -> None:
    """The engine's encoder alone, in its threads, over texts that are in memory."""
    from concurrent.futures import ThreadPoolExecutor

    from megatron_rocm.data import documents, encode, source, tokenizer

    encode.set_up_process()
    info = tokenizer.inspect(model, kind)
    chunks = [documents.texts(chunk.payload, "text")[0] for chunk in source.read(0, source.file(path), 0, "text")]
    size = sum(len(text.encode()) for texts in chunks for text in texts)
    began = time.process_time()
    _, encoder = encode.choose(info, chunks[0])
    ready, wall = time.process_time(), time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        tokens = sum(pool.map(lambda texts: len(encoder.encode_batch(texts)[0]), chunks))
    cpu, wall = time.process_time() - ready, time.monotonic() - wall
    print(
        f"tokenize only: {tokens:,} tokens; {ready - began:.1f} CPU s to load and prove, {cpu:.2f} CPU s and "
        f"{wall:.2f} s to encode: {size / 1e6 / cpu:.1f} MB per CPU second, {size / 1e6 / wall:.1f} MB/s; "
        f"{ready - began + cpu:.2f} CPU s together"
    )


def _documents(path: str) -> Iterator[list[str]]:
    batch: list[str] = []
    with open(path, "rb") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                yield batch
                batch = []
    yield batch


def do_tokenizers(model: str, path: str, out: str) -> None:
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    with open(out, "wb") as file:
        for batch in _documents(path):
            for one in tokenizer.encode_batch_fast(batch):
                file.write(np.array([*one.ids, 2], np.int32).data)


def do_sentencepiece(model: str, path: str, out: str) -> None:
    import numpy as np
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=model)
    with open(out, "wb") as file:
        for batch in _documents(path):
            for ids in processor.encode(batch, num_threads=WORKERS):
                file.write(np.array([*ids, 2], np.uint16).data)


def do_datatrove(model: str, path: str, out: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    shutil.rmtree(out, ignore_errors=True)
    # Its tasks share files, not parts of one: give each a half.
    halves = Path(f"{path}.halves")
    if not halves.exists():
        halves.mkdir()
        lines = Path(path).read_bytes().splitlines(keepends=True)
        for at in range(WORKERS):
            (halves / f"{at}.jsonl").write_bytes(b"".join(lines[at::WORKERS]))
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(halves)),
            DocumentTokenizer(
                output_folder=f"{out}/ids",
                tokenizer_name_or_path=f"{model}/tokenizer.json",
                eos_token="</s>",
                shuffle_documents=False,
            ),
        ],
        tasks=WORKERS,
        workers=WORKERS,
        logging_dir=f"{out}/logs",
        skip_completed=False,
    ).run()


def do_shards(*flags: str) -> None:
    from megatron_rocm.cli import main

    prefix = flags[flags.index("--output-prefix") + 1]
    for at in range(4):
        if main(["data", "preprocess", *flags, f"--shard={at}/4"]):
            sys.exit(1)
    sys.exit(main(["data", "preprocess", "--output-prefix", prefix, "--merge-shards=4", "--overwrite"]))


def check(said: argparse.Namespace) -> None:
    """Ours against the libraries and megatron-core's IndexedDatasetBuilder, byte by byte, over the whole corpus."""
    path = corpus(said.work)
    out = said.work / "out"
    out.mkdir(exist_ok=True)
    kinds = {
        "BPE": ("HuggingFaceTokenizer", str(tekken(said.work / "tekken"))),
        "SentencePiece": ("Llama2Tokenizer", str(sentencepiece(said.work / "sentencepiece"))),
    }
    for name, (kind, model) in kinds.items():
        subprocess.run(
            [sys.executable, __file__, "--do", "reference", kind, model, str(path), f"{out}/check"], check=True
        )
        for eod in ("", "--append-eod"):
            ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(path), "--overwrite"]
            ours += ["--output-prefix", f"{out}/mine", "--tokenizer-type", kind, "--tokenizer-model", model]
            subprocess.run([*ours, *filter(None, [eod])], check=True, stdout=subprocess.DEVNULL)
            same = all(
                _digest(f"{out}/mine_text_document.{end}") == _digest(f"{out}/check{eod}.{end}")
                for end in ("bin", "idx")
            )
            print(f"{name} {eod or 'without EOD'}: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def do_reference(kind: str, model: str, path: str, out: str) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encode: Callable[[list[str]], Any]
    if kind == "HuggingFaceTokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        tokenizer.encode_special_tokens = True
        encode, size, eod = lambda texts: [one.ids for one in tokenizer.encode_batch(texts)], 131_072, 2
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=f"{model}/tokenizer.model")
        size, eod = processor.get_piece_size(), processor.eos_id()
        encode = lambda texts: processor.encode(texts, add_bos=True, num_threads=WORKERS)  # noqa: E731
    builders = {
        end: IndexedDatasetBuilder(f"{out}{end}.bin", DType.optimal_dtype(size)) for end in ("", "--append-eod")
    }
    for batch in _documents(path):
        for ids in encode(batch):
            for end, builder in builders.items():
                whole = np.array(ids + [eod] * bool(end and ids), np.int64)
                builder.add_document(whole, [len(whole)] if len(whole) else [])
    for end, builder in builders.items():
        builder.finalize(f"{out}{end}.idx")


def large(said: argparse.Namespace) -> None:
    """Ours on so many GB, for its memory."""
    path = corpus(said.work)
    times = max(1, round(said.large * 1e9 / os.path.getsize(path)))
    command, environment = contenders(said, path)["ours"]
    command = [word for word in command if word != "--append-eod"]
    command[command.index("--input") + 1 : command.index("--input") + 2] = [str(path)] * times
    spent = measure(command, said.work / "log", environment)
    read = times * os.path.getsize(path)
    print(
        f"{read / 1e9:.1f} GB: {spent.cpu:.1f} CPU s, {spent.wall:.1f} s, {read / 1e6 / spent.wall:.1f} MB/s of input, "
        f"{spent.memory:.0f} MB of memory at most"
    )
    print(spent.output)


DO = {name.removeprefix("do_"): value for name, value in list(globals().items()) if name.startswith("do_")}


def main() -> None:
    if sys.argv[1:2] == ["--do"]:
        DO[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus and all output; 4 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--datatrove", help="the Python that has datatrove")
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--check", action="store_true", help="compare every byte instead")
    parser.add_argument("--large", type=float, metavar="GB", help="ours on so much instead")
    said = parser.parse_args()
    said.work.mkdir(parents=True, exist_ok=True)
    if said.check:
        check(said)
    elif said.large:
        large(said)
    else:
        run(said)


if __name__ == "__main__":
    main()
