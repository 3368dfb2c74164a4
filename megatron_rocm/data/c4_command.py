"""`megatron-rocm data c4 consolidate|preprocess`: what examples/mlperf_405b's scripts call."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rocm.config.request import nearest
from megatron_rocm.data import c4
from megatron_rocm.data.side_by_side import side_by_side
from megatron_rocm.errors import UsageError

SAMPLES = 91205  # tokenized by Mixtral 8x22B's, they are the 47,185,920 tokens that MLPerf evaluates on, and few more
# name: default, help
VARIABLES = {
    "C4_PATH": ("", "folder with C4's en/c4-train.?????-of-01024.json.gz and c4-validation.?????-of-00008.json.gz"),
    "MERGED_C4_PATH": ("", "folder with (consolidate: for) the merged files; preprocess: unset to read C4_PATH's"),
    "N_VALIDATION_SAMPLES": (str(SAMPLES), "how many of the first validation samples are evaluated on"),
    "SHARDS": ("0-7", "which of the 8 merged files, such as 6,7: the ones that MLPerf trains on"),
    "VERIFY": ("1", "consolidate: decompress each file on the way, for its checksums; 0 only copies"),
    "TOKENIZER_PATH": ("", "preprocess: the folder of Mixtral 8x22B's tokenizer"),
    "PREPROCESSED_PATH": ("", "preprocess: folder that receives …_text_document.bin, .idx and .json"),
    "APPEND_EOD": ("0", "preprocess: 1 ends each document with the tokenizer's EOS; the reference does not"),
    "ON_ERROR": ("stop", "preprocess: stop at a line without text, or skip and count it"),
    "OVERWRITE": ("0", "preprocess: 1 replaces data made from something else"),
    "WORKERS": ("", "CPUs to use on this machine; unset: all"),
}  # fmt: skip
CHOICES = {**dict.fromkeys(("VERIFY", "APPEND_EOD", "OVERWRITE"), ("0", "1")), "ON_ERROR": ("stop", "skip")}
NEEDED = {"consolidate": ("C4_PATH", "MERGED_C4_PATH"), "preprocess": ("TOKENIZER_PATH", "PREPROCESSED_PATH")}
HELP = """megatron-rocm data c4 consolidate|preprocess [--shard I/N] [KEY=VALUE …]

  consolidate   merge C4's files into MERGED_C4_PATH, byte for byte, and cut out the validation samples
  preprocess    turn them, or C4's files as they are, into PREPROCESSED_PATH/c4-train.en_6_text_document.bin, …

A second call goes on where the first one stood. --shard I/N does part I, from 0, of N; in a Slurm job array, and in a
job of several tasks, each does its own part.

Variables, from the environment or as KEY=VALUE arguments (the argument wins):
"""


@dataclass(frozen=True)
class Request:
    """What was asked for, checked one by one."""

    c4: Path | None
    merged: Path | None
    samples: int
    shards: tuple[int, ...]
    verify: bool
    tokenizer: str
    preprocessed: Path
    append_eod: bool
    on_error: str
    overwrite: bool
    workers: int
    part: tuple[int, int]


def main(arguments: Sequence[str]) -> int:
    """`megatron-rocm data c4 …`. Raises UsageError for what a person can mend."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(
            HELP
            + "\n".join(f"  {name:20} {help} [{default or 'unset'}]" for name, (default, help) in VARIABLES.items())
        )
        return 0
    action, *rest = arguments
    if action not in NEEDED:
        raise UsageError(f"data c4 {action}: there is {' and '.join(NEEDED)}")
    request = parse(action, rest, os.environ)
    consolidate(request) if action == "consolidate" else preprocess(request)
    return 0


def parse(action: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    """KEY=VALUE arguments over the environment. Raises UsageError naming key, value and rule."""
    said = {name: environment.get(name) or default for name, (default, _) in VARIABLES.items()}
    part = _own_part(environment)
    words = iter(arguments)
    for word in words:
        if word == "--shard" or word.startswith("--shard="):
            part = _part(next(words, "") if word == "--shard" else word.partition("=")[2])
            continue
        name, equals, value = word.partition("=")
        if not equals or name not in VARIABLES:
            raise UsageError(f"{word}: unknown key; {nearest(name, VARIABLES)}")
        said[name] = value or VARIABLES[name][0]
    for name in NEEDED[action]:
        if not said[name]:
            raise UsageError(f"{name} is needed: {VARIABLES[name][1]}")
    if action == "preprocess" and not (said["MERGED_C4_PATH"] or said["C4_PATH"]):
        raise UsageError("MERGED_C4_PATH is needed, made by consolidate_data.sh; or C4_PATH, to do without merging")
    for name, choices in CHOICES.items():
        if said[name] not in choices:
            raise UsageError(f"{name}={said[name]}: must be {' or '.join(choices)}")
    return Request(
        c4=_folder(said["C4_PATH"]),
        merged=_folder(said["MERGED_C4_PATH"]),
        samples=_whole("N_VALIDATION_SAMPLES", said["N_VALIDATION_SAMPLES"]),
        shards=_shards(said["SHARDS"]),
        verify=said["VERIFY"] == "1",
        tokenizer=said["TOKENIZER_PATH"],
        preprocessed=Path(said["PREPROCESSED_PATH"]).expanduser(),
        append_eod=said["APPEND_EOD"] == "1",
        on_error=said["ON_ERROR"],
        overwrite=said["OVERWRITE"] == "1",
        workers=_whole("WORKERS", said["WORKERS"]) if said["WORKERS"] else len(os.sched_getaffinity(0)),
        part=part,
    )


def _own_part(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's part of a Slurm job array times the tasks of its job; (0, 1) outside of Slurm."""

    def number(name: str, default: int) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else default

    jobs = number("SLURM_ARRAY_TASK_COUNT", 1)
    job = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // number("SLURM_ARRAY_TASK_STEP", 1)
    # Of a job step: a batch script, too, has SLURM_PROCID and SLURM_NTASKS, but is only one process.
    tasks = number("SLURM_STEP_NUM_TASKS", 1)
    return job * tasks + (number("SLURM_PROCID", 0) if tasks > 1 else 0), jobs * tasks


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UsageError(f"--shard={text}: must be I/N, I from 0 to N - 1, such as 0/9")
    return int(found[1]), int(found[2])


def _folder(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise UsageError(f"{name}={text}: must be a whole number above 0")
    return int(text)


def _shards(text: str) -> tuple[int, ...]:
    numbers: set[int] = set()
    for item in text.split(","):
        found = re.fullmatch(r"([0-7])(?:-([0-7]))?", item.strip())
        if not found:
            raise UsageError(f"SHARDS={text}: must be numbers from 0 to {c4.MERGED_FILES - 1}, such as 0-7 or 6,7")
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers))


def consolidate(request: Request) -> None:
    """Write this part's share of the merged training files, the merged validation file and the samples."""
    assert request.c4 is not None and request.merged is not None
    train = {shard: c4.find(c4.train_files(request.c4, shard), "C4_PATH") for shard in request.shards}
    validation = c4.find(c4.validation_files(request.c4), "C4_PATH")
    merged = request.merged
    tasks = [
        *((merged / f"{c4.merged_name(shard)}.json.gz", sources) for shard, sources in train.items()),
        (merged / f"{c4.MERGED_VALIDATION}.json.gz", validation),
        (merged / f"{c4.samples_name(request.samples)}.json.gz", None),
    ]

    def make(output: Path, sources: list[Path] | None) -> None:
        if sources is None:
            new = c4.write_samples(validation, request.samples, output)
        else:
            new = c4.merge(sources, output, request.verify)
        print(f"{output}: {'written' if new else 'is there already'}, {output.stat().st_size:,} bytes", flush=True)

    index, count = request.part
    # Decompressing and copying let other threads run.
    side_by_side([partial(make, *task) for task in tasks[index::count]], request.workers)


def preprocess(request: Request) -> None:
    """Tokenize this part's share of the training files and the validation samples.

    As in the reference, whose tool asks a tokenizer for no special tokens: no BOS, and no EOS but with APPEND_EOD=1.
    """
    tasks: list[tuple[str, list[Path] | None]] = [
        (c4.merged_name(shard), _train(request, shard)) for shard in request.shards
    ]
    tasks.append((c4.samples_name(request.samples), None))
    index, count = request.part
    for name, inputs in tasks[index::count]:
        _tokenize(inputs or [_samples(request)], name, request)


def _train(request: Request, shard: int) -> list[Path]:
    if request.merged is None:
        assert request.c4 is not None
        return c4.find(c4.train_files(request.c4, shard), "C4_PATH")
    path = request.merged / f"{c4.merged_name(shard)}.json.gz"
    if not path.is_file():
        raise UsageError(
            f"MERGED_C4_PATH={request.merged}: {path.name} is not there. Make it with consolidate_data.sh, leave it "
            "out with SHARDS, or unset MERGED_C4_PATH and set C4_PATH"
        )
    return [path]


def _samples(request: Request) -> Path:
    """The file of validation samples, cut out beside the output where merging was left out."""
    name = f"{c4.samples_name(request.samples)}.json.gz"
    if request.merged is not None and (request.merged / name).is_file():
        return request.merged / name
    if request.merged is not None:
        whole = request.merged / f"{c4.MERGED_VALIDATION}.json.gz"
        sources = [whole] if whole.is_file() else []
    else:
        assert request.c4 is not None
        sources = c4.find(c4.validation_files(request.c4), "C4_PATH")
    if not sources:
        raise UsageError(f"MERGED_C4_PATH={request.merged}: {name} is not there. Make it with consolidate_data.sh")
    c4.write_samples(sources, request.samples, request.preprocessed / name)
    return request.preprocessed / name


def _tokenize(inputs: list[Path], name: str, request: Request) -> None:
    from megatron_rocm.data.engine import Job
    from megatron_rocm.data.engine import preprocess as run
    from megatron_rocm.data.tokenizer import inspect

    job = Job(
        inputs=[str(path) for path in inputs],
        prefix=str(request.preprocessed / f"{name}_text_document"),
        tokenizer=inspect(request.tokenizer),
        append_eod=request.append_eod,
        bos=False,
        workers=request.workers,
        on_error=request.on_error,
        overwrite=request.overwrite,
        input_key="MERGED_C4_PATH" if request.merged else "C4_PATH",
        output_key="PREPROCESSED_PATH",
        overwrite_flag="OVERWRITE=1",
        skip_flag="ON_ERROR=skip",
    )
    request.preprocessed.mkdir(parents=True, exist_ok=True)
    print(run(job), flush=True)
