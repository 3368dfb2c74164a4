"""`tools/preprocess_data.py`: the flags of Megatron-LM's tool of that name, and a few for what it has not.

Facts of the flags: NVIDIA/Megatron-LM, tools/preprocess_data.py and megatron/training/config/training_config.py.
"""

from __future__ import annotations

import argparse
import difflib
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rocm.data import encode, engine, shards, source, workers
from megatron_rocm.data.command import Parser
from megatron_rocm.data.engine import Job
from megatron_rocm.data.indexed import read_sidecar
from megatron_rocm.data.tokenizer import inspect_parsed
from megatron_rocm.errors import UsageError

# SentencePiece without BOS; Llama2Tokenizer has it.
WITHOUT_BOS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer")
IN_FILES = "it belongs into the tokenizer's own files: save it there, and leave this out"
JSON_WAY = "give --tokenizer-type HuggingFaceTokenizer and, as --tokenizer-model, a folder with a tokenizer.json"
DOCUMENTS = "sentences are BERT's; here a document is one sequence: leave it out"
WORKERS = "leave it out; --workers is all CPUs of this process unless you say otherwise"
# Flag of Megatron's → why it is not here, and the way out.
REFUSED = {
    "--split-sentences": DOCUMENTS,
    "--keep-newlines": DOCUMENTS,
    "--lang": DOCUMENTS,
    "--find-optimal-num-workers": WORKERS,
    "--workers-to-check": WORKERS,
    "--max-documents": WORKERS,
    "--vocab-file": JSON_WAY,
    "--merge-file": JSON_WAY,
    "--tiktoken-pattern": JSON_WAY,
    "--tiktoken-num-special-tokens": JSON_WAY,
    "--tokenizer-hf-no-use-fast": JSON_WAY,
    "--trust-remote-code": f"a tokenizer's code is not run here; {JSON_WAY}",
    "--vocab-size": "it is the tokenizer's own: leave it out",
    "--tokenizer-metadata": IN_FILES,
    "--tokenizer-special-tokens": IN_FILES,
    "--special-tokens": IN_FILES,
    "--vocab-extra-ids": IN_FILES,
    "--chat-template": "pretraining data has no chat: leave it out",
    "--tokenizer-sentencepiece-legacy": IN_FILES,
    "--null-tokenizer-eod-id": "for mock data train without DATA_PATH",
    "--null-tokenizer-pad-id": "for mock data train without DATA_PATH",
}
# Flag of Megatron's that changes nothing here → (takes a value, why).
WITHOUT_EFFECT = {
    "--log-interval": (True, "progress is shown by time"),
    "--keep-sequential-samples": (False, "the order is always that of the input"),
    "--use-gigatoken": (False, "the fastest proven tokenizer is chosen in any case"),
    "--legacy-tokenizer": (False, "there is one implementation of each tokenizer"),
    "--make-vocab-size-divisible-by": (True, "ids are stored, not the padded vocabulary"),
    "--dataset-impl": (True, "mmap is the only form"),
}
DESCRIPTION = """Turn text into the tokens that megatron-core trains on.

  python tools/preprocess_data.py --input 'c4/*.json.gz' --output-prefix out/c4 --append-eod \\
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model NousResearch/Meta-Llama-3-8B

writes out/c4_text_document.bin, .idx and .json. Killed or out of disk space, the same command goes on where it stood.
On many machines: --shard=0/8 … --shard=7/8 (a Slurm array: --shard=$SLURM_ARRAY_TASK_ID/8), then --merge-shards=8.
"""


def parser() -> Parser:
    """All flags but REFUSED and WITHOUT_EFFECT."""
    flags = Parser("preprocess", DESCRIPTION)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    add = flags.add_argument
    add(
        "--input", nargs="+", metavar="PATH", help="JSON Lines (plain, .gz, .zst), Parquet; files, patterns, folders, -"
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="the files are PREFIX_{key}_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a data set for each of these [text]")
    add("--tokenizer-type", default="HuggingFaceTokenizer", help="HuggingFaceTokenizer, Llama2Tokenizer (SentencePiece "
        "with BOS), GPTSentencePieceTokenizer (without) [HuggingFaceTokenizer]")  # fmt: skip
    add("--tokenizer-model", metavar="MODEL", help="its folder, file, or hub name")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's EOS")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="leave out the tokenizer's BOS")
    add("--workers", type=int, metavar="N", help="CPUs that parse and encode [all of this process]")
    add("--partitions", type=int, default=1, metavar="N", help="so many shards side by side, merged at the end [1]")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a line without a document [stop]")
    add("--shard", metavar="I/N", help="make the part I of N alone, I from 0 to N-1")
    add("--merge-shards", type=int, metavar="N", help="put N finished shards together; needs --output-prefix alone")
    add("--output-each", action="store_true", help="one output for each input file: PREFIX_{file}_{key}_document")
    add("--overwrite", action="store_true", help="replace output that was made from something else")
    return flags


def main(arguments: Sequence[str]) -> int:
    """Run the tool. Raises UsageError for what a person can mend."""
    flags = parser()
    said, unknown = flags.parse_known_args(_without_effect(_checked(arguments)))
    if unknown:
        known = [word for action in flags._actions for word in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, 1, 0)[0]
        raise UsageError(f"{unknown[0]}: unknown flag; did you mean {near}? `--help` shows all")
    prefixes = {key: f"{said.output_prefix}_{key}_document" for key in said.json_keys}
    if said.merge_shards is not None:
        for prefix in prefixes.values():
            _merge(prefix, said.merge_shards, said.overwrite)
        return 0
    for flag, value in (("--input", said.input), ("--tokenizer-model", said.tokenizer_model)):
        if not value:
            raise UsageError(f"{flag} is needed; `--help` shows the usage")
    if len(prefixes) > 1 and source.STDIN in said.input:
        raise UsageError("--json-keys: standard input can be read for one key only; give a file, or call once per key")
    cpus = engine.cores() if said.workers is None else said.workers
    if cpus < 1 or said.partitions < 1 or cpus % said.partitions:
        raise UsageError(
            f"--workers={cpus} --partitions={said.partitions}: both must be above 0, and the workers a multiple of "
            "the partitions"
        )
    without_bos = said.tokenizer_type in WITHOUT_BOS
    try:
        chooser = encode.Chooser(
            *inspect_parsed(said.tokenizer_model, "Llama2Tokenizer" if without_bos else said.tokenizer_type),
            bos=not (without_bos or said.tokenizer_hf_no_include_special_tokens),
        )
    except UsageError as error:
        raise UsageError(_as_flags(str(error))) from None
    job = Job(
        said.input,
        "",
        chooser.info,
        append_eod=said.append_eod,
        bos=chooser.bos,
        workers=cpus,
        on_error=said.on_error,
        shard=_shard(said.shard) if said.shard else None,
        overwrite=said.overwrite,
    )
    jobs = [replace(job, key=key, prefix=prefix) for key, prefix in prefixes.items()]
    if said.output_each and (said.shard or said.partitions > 1):
        raise UsageError("--output-each: files are parts already; give it without --shard and --partitions")
    if said.output_each:
        jobs = [one for keyed in jobs for one in _each(keyed, said.output_prefix)]
    for one in jobs:
        try:
            _run(one, said.partitions, chooser)
        except engine.TextFault as fault:
            # One of many outputs: a file without any text is no reason to leave out those after it.
            if not (said.output_each and said.on_error == "skip"):
                raise
            print(f"skipped: {fault}", flush=True)
        except UsageError as error:
            raise UsageError(_as_flags(str(error))) from None
    return 0


NEMO_DESCRIPTION = """Turn JSON Lines into training data, with the flags of the NeMo pretraining guide.

Reads INPUT_DIR/DATA_PREFIX.jsonl (or .json, also .gz or .zst, or .parquet) and writes
OUTPUT_DIR/preprocessed/DATA_PREFIX_text_document.bin, .idx and .json, each document ended with an EOD. Every other flag
goes to tools/preprocess_data.py.
"""


def main_nemo(arguments: Sequence[str]) -> int:
    """`examples/pretrain_llm/preprocess_data.sh`. Raises UsageError for what a person can mend."""
    flags = Parser("preprocess-nemo", NEMO_DESCRIPTION)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    add = flags.add_argument
    add("--ht-tokenizer", "--hf-tokenizer", required=True, metavar="MODEL", help="folder or hub name of the tokenizer")
    add("--data-prefix", required=True, metavar="NAME", help="file name without folder and ending")
    add("--input-dir", required=True, metavar="FOLDER")
    add("--output-dir", required=True, metavar="FOLDER")
    said, more = flags.parse_known_args(arguments)
    endings = source.IN_FOLDERS
    found = [path for end in endings if os.path.isfile(path := os.path.join(said.input_dir, said.data_prefix + end))]
    if len(found) != 1:
        have = ", ".join(found) or f"none of {', '.join(endings)}"
        raise UsageError(f"--data-prefix={said.data_prefix}: {said.input_dir} must hold one such file and has {have}")
    prefix = os.path.join(said.output_dir, "preprocessed", said.data_prefix)
    return main(
        ["--input", found[0], "--output-prefix", prefix, "--tokenizer-model", said.ht_tokenizer, "--append-eod", *more]
    )


def _checked(arguments: Sequence[str]) -> Sequence[str]:
    for word in arguments:
        flag = word.partition("=")[0]
        if flag in REFUSED:
            raise UsageError(f"{flag} is not supported: {REFUSED[flag]}")
    return arguments


def _without_effect(arguments: Sequence[str]) -> list[str]:
    kept, words = [], iter(arguments)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in WITHOUT_EFFECT:
            kept.append(word)
            continue
        takes_value, why = WITHOUT_EFFECT[flag]
        if takes_value and not equals:
            next(words, None)
        print(f"{flag} has no effect: {why}")
    return kept


def _as_flags(message: str) -> str:
    """A message in the words of this command line, not of the scripts that take TOKENIZER_MODEL=… ."""
    return re.sub(r"\bTOKENIZER_(TYPE|MODEL)=", lambda match: f"--tokenizer-{match[1].lower()}=", message)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard={text}: must be I/N with I from 0 to N-1, e.g. --shard=0/8")
    return int(match[1]), int(match[2])


def _each(job: Job, output_prefix: str) -> list[Job]:
    made: dict[str, str] = {}
    for one in source.find(job.inputs):
        stem = re.sub(r"(\.(json|jsonl|ndjson|gz|zst|zstd|parquet))+$", "", os.path.basename(one.path))
        prefix = f"{output_prefix}{'' if output_prefix.endswith('/') else '_'}{stem}_{job.key}_document"
        if prefix in made:
            raise UsageError(
                f"--output-each: {made[prefix]} and {one.path} would both be written to {prefix}; rename one"
            )
        made[prefix] = one.path
    return [replace(job, prefix=prefix, inputs=[path]) for prefix, path in made.items()]


def _run(job: Job, partitions: int, chooser: encode.Chooser) -> None:
    if job.shard:
        job = replace(job, prefix=shards.prefix(job.prefix, job.shard))
    if partitions == 1:
        summary = engine.preprocess(job, chooser=chooser)
        print(summary if summary.made else f"{job.prefix}: already made from this text with this tokenizer")
        return
    if job.shard:
        raise UsageError("--partitions: a shard is one part already; give it --workers alone")
    made = engine.made_before(job)
    parts = [
        replace(job, shard=(at, partitions), prefix=shards.prefix(job.prefix, (at, partitions)), overwrite=True,
                workers=job.workers // partitions)
        for at in range(partitions)
    ]  # fmt: skip
    if made:
        _remove(parts)
        print(f"{job.prefix}: already made from this text with this tokenizer")
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_partition, args=(part, os.getpid())) for part in parts]
    with workers.unheard_interrupts():
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
            process.join()
        raise
    if any(process.exitcode for process in processes):
        raise UsageError(f"--partitions={partitions}: not all parts were made, see above; run the same command again")
    documents = sum((read_sidecar(part.prefix) or {})["documents"] for part in parts)
    if documents:
        _merge(job.prefix, partitions, job.overwrite)
    _remove(parts)
    if not documents:
        raise engine.TextFault(
            f"--input={' '.join(job.inputs)}: holds no text. Give JSON Lines with the key `{job.key}`"
        )


def _remove(parts: Sequence[Job]) -> None:
    for part in parts:
        for kind in ("idx", "json", "bin"):
            Path(f"{part.prefix}.{kind}").unlink(missing_ok=True)


def _partition(job: Job, parent: int) -> None:
    workers.end_with(parent)  # left alone, it would keep the next call out
    try:
        print(engine.preprocess(job))
    except UsageError as error:
        sys.exit(_as_flags(str(error)))


def _merge(prefix: str, count: int, overwrite: bool) -> None:
    made = shards.merge(prefix, count, overwrite)
    if made is None:
        print(f"{prefix}: already made of these {count} shards")
        return
    sidecar = read_sidecar(prefix) or {}
    print(
        f"{prefix}: {made.documents:,} documents, {made.tokens:,} tokens, {sidecar.get('bytes', 0):,} bytes of text, "
        f"{sidecar.get('skipped', 0):,} lines skipped, of {count} shards, {made.checksum}"
    )
