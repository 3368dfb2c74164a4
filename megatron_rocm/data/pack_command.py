"""`megatron-rocm data pack`: prompts and answers, or others' packed .npy files, to packed sequences (supervised.py)."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_rocm.data import encode, npy, source
from megatron_rocm.data.command import Parser
from megatron_rocm.data.hub import is_hub_name
from megatron_rocm.data.native import pack
from megatron_rocm.data.source import Source
from megatron_rocm.data.supervised import PackWriter
from megatron_rocm.data.tokenizer import TYPES, Encoder, TokenizerInfo, inspect
from megatron_rocm.errors import UsageError

DESCRIPTION = (
    "Pack prompts and answers into sequences of a fixed length for fine-tuning: JSON Lines (also .gz, .zst) with a "
    "prompt and an answer a line, or the train.npy and validation.npy of NeMo and of MLPerf's Llama 2 70B LoRA, which "
    "are packed already. Writes PREFIX.bin, .idx, .mask.npy and .json."
)
NPY_MASK = (
    "whether a .npy's loss_mask stands at the token that is learnt, as MLPerf's does, or at the one before, as NeMo's "
    "own packing writes it (%(default)s)"
)
SHOWN = 5  # faults that are told one by one


def _parser() -> argparse.ArgumentParser:
    parser = Parser("pack", DESCRIPTION)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines files, folders, patterns or -; or a .npy")
    add("--output-prefix", required=True, metavar="PREFIX", help="of the files that are made")
    add("--tokenizer-model", required=True, metavar="NAME", help="a tokenizer's folder, file or hub name")
    add("--tokenizer-type", default=TYPES[0], metavar="TYPE", help="or Llama2Tokenizer (%(default)s)")
    add("--seq-length", type=int, default=8192, metavar="N", help="tokens of a packed sequence (%(default)s)")
    add("--prompt-key", default="prompt", metavar="KEY", help="(%(default)s)")
    add("--answer-key", default="answer", metavar="KEY", help="(%(default)s)")
    add("--template", default="{prompt}", metavar="TEXT", help="what the prompt is put into, at {prompt}")
    add("--loss", choices=("answers", "all"), default="answers", help="what is learnt (%(default)s)")
    add("--too-long", choices=("stop", "drop", "cut"), default="stop", help="an example over N tokens (%(default)s)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="a line that is no example (%(default)s)")
    add("--npy-mask", choices=("target", "input"), default="target", help=NPY_MASK)
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads (all CPUs)")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


class Examples(NamedTuple):
    """Of a chunk: ids, mask, lengths, and each one's line; `faults` are (line, what is wrong)."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    lines: list[int]
    faults: list[tuple[int, str]]


def main(argv: Sequence[str]) -> int:
    """Exit status 0. Raises UsageError for what a person can mend."""
    args = _parser().parse_args(argv)
    for name in ("seq_length", "workers"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(args, name)}: must be 1 or more")
    if args.template.count("{prompt}") != 1:
        raise UsageError(f"--template={args.template}: must have {{prompt}} in one place")
    prefix = args.output_prefix
    if Path(f"{prefix}.idx").exists() and not args.overwrite:
        raise UsageError(f"--output-prefix={prefix}: is there already. Give another, or --overwrite to replace it")
    packed = [name for name in args.input if name.endswith(".npy")]
    if packed and len(packed) < len(args.input):
        raise UsageError("--input: .npy files are packed already and can't be mixed with JSON Lines; make two")
    info = inspect(args.tokenizer_model, args.tokenizer_type)
    named = info if is_hub_name(info.model) else replace(info, model=str(Path(info.model).expanduser().resolve()))
    began = time.monotonic()
    try:
        Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        with PackWriter(prefix, named, args.seq_length) as writer:
            made = _from_npy(args, writer) if packed else _from_text(args, writer, info)
    except OSError as error:
        raise UsageError(
            f"--output-prefix={prefix}: can't be written ({error.strerror}). Check space and permissions there"
        ) from None
    supervised = made["supervised"]
    filled = 100 * made["tokens"] / (made["documents"] * args.seq_length)
    print(
        f"{prefix}: {supervised['examples']:,} examples in {made['documents']:,} sequences of {args.seq_length:,}, "
        f"{made['tokens']:,} tokens ({filled:.1f} % full), {supervised['targets']:,} to be learnt, "
        f"{made['skipped']:,} left out, {time.monotonic() - began:.1f} s"
    )
    return 0


def _from_npy(args: argparse.Namespace, writer: PackWriter) -> dict[str, Any]:
    bins: list[np.ndarray] = []
    packs = 0
    for path in args.input:
        for number, row in enumerate(npy.rows(path)):
            where = f"--input={path}: row {number:,}"
            if len(row.ids) > args.seq_length:
                raise UsageError(f"{where} has {len(row.ids):,} tokens; give --seq-length={len(row.ids)} or more")
            wrong = row.ids[(row.ids < 0) | (row.ids >= writer.tokenizer.vocab_size)]
            if len(wrong):
                raise UsageError(
                    f"{where} holds the id {wrong[0]:,}, --tokenizer-model={args.tokenizer_model} has only "
                    f"{writer.tokenizer.vocab_size:,}: another tokenizer made it"
                )
            lengths = np.diff(np.append(row.starts, len(row.ids)))
            writer.add(row.ids, _at_targets(row, args), lengths)
            bins.append(np.full(len(lengths), packs, np.int64))
            packs += 1
    if not packs:
        raise UsageError(f"--input={' '.join(args.input)}: holds no sequences")
    return writer.finish(np.concatenate(bins), packs, _source(args, args.input), skipped=0)


def _at_targets(row: npy.Row, args: argparse.Namespace) -> np.ndarray:
    mask = np.ones_like(row.mask) if args.loss == "all" else row.mask
    return mask if args.npy_mask == "target" or args.loss == "all" else np.concatenate([[False], mask[:-1]])


def _from_text(args: argparse.Namespace, writer: PackWriter, info: TokenizerInfo) -> dict[str, Any]:
    sources = source.find(args.input)
    for one in sources:
        if one.kind not in ("lines", "gzip", "zstd", "stdin"):
            raise UsageError(f"--input={one.path}: prompts and answers are read from JSON Lines, not from {one.kind}")
    encode.set_up_process()
    skipped = 0
    for chunk, found in _in_turns(args, sources, info):
        file = sources[chunk.source]
        if chunk.fault:
            raise UsageError(f"--input={file.path}: {chunk.fault}. Get or make the file again")
        for line, why in found.faults:
            told = f"--input={file.path}: line {chunk.line + line + 1:,}: {why}"
            if args.on_error == "stop":
                raise UsageError(f"{told}. Mend or remove it, or pass over such lines with --on-error=skip")
            skipped += 1
            if skipped <= SHOWN:
                print(f"  left out: {told}", flush=True)
        skipped += _add(args, writer, found, file, chunk.line)
    lengths = writer.lengths
    if not len(lengths):
        raise UsageError(f"--input={' '.join(args.input)}: holds no examples ({skipped:,} were left out)")
    bins, packs = pack(lengths, args.seq_length)
    return writer.finish(bins, packs, _source(args, [one.path for one in sources]), skipped=skipped)


def _in_turns(
    args: argparse.Namespace, sources: list[Source], info: TokenizerInfo
) -> Iterator[tuple[source.Chunk, Examples]]:
    """All chunks with their examples, in order; several are encoded at once."""
    running: deque[tuple[source.Chunk, Future[Examples]]] = deque()
    encoders: tuple[Encoder, Encoder] | None = None
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            for number, one in enumerate(sources):
                for chunk in source.read(number, one, 0, ""):
                    if encoders is None:
                        encoders = _encoders(chunk.payload, args, info)
                    running.append((chunk, pool.submit(_examples, chunk.payload, args, encoders, info.eod)))
                    if len(running) > args.workers + 1:
                        done, future = running.popleft()
                        yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _encoders(payload: Any, args: argparse.Namespace, info: TokenizerInfo) -> tuple[Encoder, Encoder]:
    """For prompts, which begin as the tokenizer begins a text, and for answers, which go on."""
    prompts, answers, _, _ = _parse(payload, args)
    made = [encode.choose(info, texts, bos) for texts, bos in ((prompts, True), (answers, False))]
    for choice, _ in made:
        if not choice.fast:
            print(f"the ordinary tokenizer is used: {choice.why}", flush=True)
    return made[0][1], made[1][1]


def _examples(payload: Any, args: argparse.Namespace, encoders: tuple[Encoder, Encoder], eod: int) -> Examples:
    prompts, answers, lines, faults = _parse(payload, args)
    prompt_ids, prompt_lengths = encoders[0].encode_batch(prompts)
    answer_ids, answer_lengths = encoders[1].encode_batch(answers, eod)
    # Prompt and answer of each in turn.
    lengths = np.stack([prompt_lengths, answer_lengths], 1).reshape(-1).astype(np.int64)
    of_answers = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    ids = np.empty(len(of_answers), np.uint32)
    ids[~of_answers], ids[of_answers] = prompt_ids, answer_ids
    mask = np.ones_like(of_answers) if args.loss == "all" else of_answers
    return Examples(ids, mask, lengths[::2] + lengths[1::2], lines, faults)


def _parse(payload: Any, args: argparse.Namespace) -> tuple[list[str], list[str], list[int], list[tuple[int, str]]]:
    prompts, answers, lines, faults = [], [], [], []
    for number, line in enumerate(payload.split(b"\n")):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            prompt, answer = (_text(example, key) for key in (args.prompt_key, args.answer_key))
            if not answer:
                raise ValueError(f"`{args.answer_key}` is empty")
        except (ValueError, TypeError, RecursionError) as error:
            faults.append((number, str(error)))
            continue
        prompts.append(args.template.replace("{prompt}", prompt))
        answers.append(answer)
        lines.append(number)
    return prompts, answers, lines, faults


def _text(example: Any, key: str) -> str:
    if not isinstance(example, dict):
        raise TypeError(f"it is a {type(example).__name__}, not an object with a prompt and an answer")
    if key not in example:
        raise ValueError(f"there is no key `{key}`")
    if not isinstance(example[key], str):
        raise TypeError(f"`{key}` is a {type(example[key]).__name__}, not a text")
    example[key].encode()  # an escaped half of a surrogate pair is no text
    return example[key]


def _add(args: argparse.Namespace, writer: PackWriter, found: Examples, file: Source, before: int) -> int:
    """Hand over the examples that fit; how many were dropped."""
    long = np.flatnonzero(found.lengths > args.seq_length)
    if not len(long):
        writer.add(found.ids, found.mask, found.lengths)
        return 0
    if args.too_long == "stop":
        raise UsageError(
            f"--seq-length={args.seq_length}: --input={file.path}: line {before + found.lines[long[0]] + 1:,} has "
            f"{found.lengths[long[0]]:,} tokens. Give a longer one, or --too-long=drop to leave such examples out, or "
            "=cut to shorten their answers"
        )
    at = np.arange(len(found.ids)) - np.repeat(np.cumsum(found.lengths) - found.lengths, found.lengths)
    kept = np.minimum(found.lengths, args.seq_length)
    if args.too_long == "drop":
        kept[long] = 0
    else:
        # A prompt that fills the sequence alone leaves nothing to learn.
        inside = np.where(at < args.seq_length, found.mask, False)
        kept[np.add.reduceat(inside.astype(np.int64), np.cumsum(found.lengths) - found.lengths) == 0] = 0
    stay = at < np.repeat(kept, found.lengths)
    writer.add(found.ids[stay], found.mask[stay], kept[kept > 0])
    return int((kept == 0).sum())


def _source(args: argparse.Namespace, paths: Sequence[str]) -> dict[str, Any]:
    said = {name: getattr(args, name) for name in ("prompt_key", "answer_key", "template", "loss", "too_long")}
    sizes = [(path, os.path.getsize(path)) for path in paths if path != source.STDIN]
    stamp = hashlib.sha256(json.dumps([sizes, said, args.seq_length]).encode()).hexdigest()
    return {"input": " ".join(args.input), "stamp": stamp, **said}
