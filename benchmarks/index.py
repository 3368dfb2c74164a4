#!/usr/bin/env python3
"""Seconds and memory that the order of documents and samples takes: megatron-core's GPTDataset and ours.

    python benchmarks/index.py [--documents 50000000] [--rounds 1] [--folder FOLDER]

The data are made here: an .idx of that many documents with lengths as text has them, and a .bin of that size without
content (a sparse file, which takes no room). Each row is a process of its own, one at a time, and counts from the first
look at the data to a data set that samples can be read from. Peak memory is the whole process's, and what of it came on
top of its imports (torch and megatron-core, except for `data index`). Where others use the machine too, CPU time is the
better measure. The arrays of both are compared by their checksums.

    one epoch         GPTDataset as BlendedMegatronDatasetBuilder makes it, and our data set, each with an empty cache
    …, NumPy          ours without its compiled module
    …, data index     `megatron-rocm data index`, which needs no torch
    …, from the cache a second start. Ours reads and checks every byte of its file; megatron-core looks for names
    2.5 epochs        the documents of the first two in one order, of the last in another, as GPTDataset has them for so
                      many samples; ours by the same functions. (Our data set makes one epoch, however long the run is.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rocm.data.indexed import HEADER, MAGIC

SEQ_LENGTH, SEED, EPOCHS = 4096, 1234, 2.5
MEAN_LENGTH = 198
CHUNK = 1 << 22  # documents that are written at once

Arrays = Sequence[np.ndarray]
Build = Callable[[], Callable[[], Arrays]]  # does the work, and returns what reads the arrays for comparison


def write_data(prefix: Path, documents: int) -> int:
    """The pair PREFIX.idx and PREFIX.bin, which holds nothing but has its size. Returns its tokens."""
    lengths = np.random.RandomState(0).lognormal(np.log(MEAN_LENGTH) - 0.5, 1, documents).astype(np.int32) + 1
    pointers = np.cumsum(lengths, dtype=np.int64)
    tokens = int(pointers[-1])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        file.write(lengths.data)
        pointers -= lengths
        pointers *= 2
        file.write(pointers.data)
        for start in range(0, documents + 1, CHUNK):
            file.write(np.arange(start, min(start + CHUNK, documents + 1), dtype=np.int64).data)
        file.flush()
        os.fsync(file.fileno())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    return tokens


def theirs(prefix: str, cache: str, documents: int, epochs: float) -> Build:
    """megatron-core's data set over all documents, as its builder makes it."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from megatron_rocm.data.datasets import _Ids

    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ_LENGTH, blend=([prefix], None), split="1", path_to_cache=cache,
        tokenizer=_Ids(65_000, 0), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip

    def build() -> Callable[[], Arrays]:
        low_level = GPTDataset.build_low_level_dataset(prefix, config)
        samples = None if epochs == 1 else int(epochs * int(low_level.sequence_lengths.sum()) / SEQ_LENGTH)
        indices = np.arange(documents, dtype=np.int32)
        made = GPTDataset(low_level, prefix, indices, samples, Split.train, config)
        return lambda: (made.document_index, made.sample_index, made.shuffle_index)

    return build


def ours(prefix: str, cache: str, documents: int, epochs: float) -> Build:
    """The data set that training makes."""
    from megatron_rocm.data import datasets

    def build() -> Callable[[], Arrays]:
        train = datasets.build([(None, prefix)], "1", SEQ_LENGTH, SEED, cache, 0, 65_000, ("train",)).train
        return lambda: (train.epoch.document_index, train.epoch.sample_index, train.epoch.shuffle_index)

    return build


def ours_in_numpy(prefix: str, cache: str, documents: int, epochs: float) -> Build:
    from megatron_rocm.data import native

    native.compiled = None
    return ours(prefix, cache, documents, epochs)


def ours_beforehand(prefix: str, cache: str, documents: int, epochs: float) -> Build:
    """`megatron-rocm data index`."""
    from megatron_rocm.data import epoch_index, index_command

    def build() -> Callable[[], Arrays]:
        words = [
            f"DATA_PATH={prefix}",
            "SPLIT=1",
            f"SEQ_LENGTH={SEQ_LENGTH}",
            f"SEED={SEED}",
            f"DATA_CACHE_PATH={cache}",
        ]
        with open(os.devnull, "w") as nowhere:
            sys.stdout, stdout = nowhere, sys.stdout
            index_command.main(words)
            sys.stdout = stdout
        return read

    def read() -> Arrays:
        (epoch,) = epoch_index.plan([(None, prefix)], "1", ("train",), SEQ_LENGTH, SEED)["train"]
        return epoch_index.load(epoch, Path(cache))

    return build


def ours_of_several(prefix: str, cache: str, documents: int, epochs: float) -> Build:
    """GPTDataset's order of several epochs, the last of them apart where little of it is wanted."""
    from megatron_rocm.data import datasets as datasets  # for the same imports as theirs
    from megatron_rocm.data import native
    from megatron_rocm.data.epoch_index import order_dtype
    from megatron_rocm.data.indexed import open_index

    def build() -> Callable[[], Arrays]:
        index = open_index(prefix)
        wanted = int(epochs * index.tokens / SEQ_LENGTH)
        whole = -(-(wanted * SEQ_LENGTH + 1) // index.tokens)
        before_last = ((whole - 1) * index.tokens - 1) // SEQ_LENGTH
        apart = whole > 1 and wanted - before_last < int(0.8 * ((index.tokens - 1) // SEQ_LENGTH))
        random = np.random.RandomState(SEED)
        order = np.empty((whole, documents), np.int32)
        order[:] = np.arange(documents, dtype=np.int32)
        order = order.reshape(-1)
        together = (whole - apart) * documents
        for part in (order[:together], order[together:]):
            native.shuffle(part, random)
        samples = native.sample_index(index.lengths, SEQ_LENGTH, whole * index.tokens, order)
        count = len(samples) - 1
        shuffled = np.arange(count, dtype=order_dtype(count))
        together = before_last if apart else count
        for part in (shuffled[:together], shuffled[together:]):
            native.shuffle(part, random)
        for name, array in (("order", order), ("samples", samples), ("shuffled", shuffled)):
            np.save(Path(cache, name), array)
        return lambda: (order, samples, shuffled)

    return build


#        what                                   epochs  how              cache
ROWS = {
    "one epoch, megatron-core":               (1,      theirs,          "theirs"),
    "one epoch, megatron-rocm":               (1,      ours,            "ours"),
    "one epoch, megatron-rocm, NumPy":        (1,      ours_in_numpy,   "numpy"),
    "one epoch, megatron-rocm data index":    (1,      ours_beforehand, "beforehand"),
    "from the cache, megatron-core":          (1,      theirs,          "theirs"),
    "from the cache, megatron-rocm":          (1,      ours,            "ours"),
    "2.5 epochs, megatron-core":              (EPOCHS, theirs,          "several of theirs"),
    "2.5 epochs, megatron-rocm":              (EPOCHS, ours_of_several, "several of ours"),
}  # fmt: skip


def child(row: str, folder: str, documents: int) -> dict[str, Any]:
    """Make the index of a row: seconds, CPU seconds, peak memory and that before in bytes, checksums."""
    epochs, contender, cache = ROWS[row]
    place = Path(folder, cache)
    place.mkdir(exist_ok=True)
    build = contender(str(Path(folder, "data")), str(place), documents, epochs)
    before, began, used = peak_memory(), time.perf_counter(), time.process_time()
    read = build()
    found = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - used,
        "peak": peak_memory(),
        "before": before,
    }
    arrays = read()
    return {
        **found,
        "sums": [zlib.crc32(np.ascontiguousarray(array).data) for array in arrays],
        "types": [str(array.dtype) for array in arrays],
        "samples": len(arrays[2]),
    }


def peak_memory() -> int:
    """Of this process alone; getrusage's begins with that of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def measure(row: str, folder: str, documents: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", row, "--folder", folder, "--documents", str(documents)]
    run = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(run.stdout.splitlines()[-1])


def table(found: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Medians over the rounds, and by how much ours is faster and smaller."""
    yield "| | seconds | CPU seconds | peak MB | of it on top of imports | × faster | × faster, CPU | peak to theirs |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    reference: dict[str, float] = {}
    for row, results in found.items():
        one = {
            key: statistics.median(result[key] for result in results) for key in ("seconds", "cpu", "peak", "before")
        }
        cells = [row, f"{one['seconds']:.2f}", f"{one['cpu']:.2f}", f"{one['peak'] / 1e6:,.0f}"]
        cells.append(f"{(one['peak'] - one['before']) / 1e6:,.0f}")
        if row.endswith("megatron-core"):
            reference = one
            cells += ["", "", ""]
        else:
            cells += [f"{reference[key] / one[key]:.1f}" for key in ("seconds", "cpu")]
            cells.append(f"{one['peak'] / reference['peak']:.2f}")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where 3 GB are free for 50 M documents")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.folder, options.documents)))
        return
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            tokens = write_data(Path(folder, "data"), options.documents)
            for row in ROWS:
                found[row].append(measure(row, folder, options.documents))
                print(f"{row}: {found[row][-1]['seconds']:.2f} s", file=sys.stderr)
    for epochs in (1, EPOCHS):
        alike = {
            json.dumps([one[-1]["sums"], one[-1]["types"]]) for row, one in found.items() if ROWS[row][0] == epochs
        }
        if len(alike) != 1:
            sys.exit(f"{epochs} epochs: the indexes differ: {sorted(alike)}")
    print(
        f"{options.documents:,} documents, {tokens:,} tokens, SEQ_LENGTH={SEQ_LENGTH}; every index bit for bit the same"
    )
    print()
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
