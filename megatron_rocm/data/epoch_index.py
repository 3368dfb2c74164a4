"""The order of one epoch's samples, as megatron-core's GPTDataset has it, made once and kept in a verified file.

The file: HEADER_SIZE bytes of MAGIC and JSON (what it was made of, the CRC-32 of each array), then `documents`,
`samples` and `order` as they lie in memory, each padded with zeros to a multiple of ALIGNED bytes. Its name is made of
what decides its content: the lengths of the documents, which of them there are, SEQ_LENGTH and SEED. So it follows data
that changes under its name, and data that is moved or copied keeps it. No torch: it is made beforehand on any machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megatron_rocm.config.blend import OWN_PATHS, Paths, blends
from megatron_rocm.data import native
from megatron_rocm.data.facts import blends_of, documents_of, require_sample
from megatron_rocm.data.indexed import HEADER as IDX_HEADER
from megatron_rocm.data.indexed import open_index
from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

log = logging.getLogger(__name__)

MAGIC = b"EPOCHIDX"
HEADER_SIZE = 4096
ALIGNED = 64
BLOCK = 1 << 22  # bytes read at once


class EpochIndex(NamedTuple):
    """`documents`: int32, ids in this epoch's order. `samples`: [samples + 1, 2], where each begins: place in
    `documents`, and offset in tokens. `order`: [samples], numbers of samples in the order they are read."""

    documents: np.ndarray
    samples: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """What an index is made of. `lengths` is the CRC-32 of the documents' lengths, `tokens` their sum."""

    prefix: str
    start: int
    stop: int
    lengths: int
    tokens: int
    seq_length: int
    seed: int

    @property
    def facts(self) -> dict[str, int]:
        """What decides the content of the index: not where the data lies."""
        return {"format": 1, **{name: value for name, value in asdict(self).items() if name != "prefix"}}

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()
        return f"{Path(self.prefix).name[:100]}-{digest[:16]}.epoch"

    @property
    def samples(self) -> int:
        return (self.tokens - 1) // self.seq_length


def plan(paths: Paths, split: str, names: Sequence[str], seq_length: int, seed: int) -> dict[str, list[Epoch]]:
    """The epochs of those splits in `names` that have data: one of each prefix of the split's blend.

    Raises UsageError for damaged data, and where the documents of an epoch don't fill one sequence.
    """
    cut = None if isinstance(paths, Mapping) else split
    found: dict[str, list[Epoch]] = {}
    for name, blend in blends_of(paths, split, names).items():
        found[name] = []
        for _, prefix in blend:
            index = open_index(prefix, OWN_PATHS[name] if cut is None else "DATA_PATH")
            documents = documents_of(paths, split, name, len(index.lengths))
            epoch = _epoch(prefix, documents, seq_length, seed)
            if epoch.samples < 1:
                require_sample(index, name, documents, cut, seq_length)
            found[name].append(epoch)
    return found


def _epoch(prefix: str, documents: range, seq_length: int, seed: int) -> Epoch:
    """Reads the documents' lengths once, in little memory."""
    crc = tokens = 0
    step = BLOCK // 4
    for start in range(documents.start, documents.stop, step):
        lengths = _lengths(prefix, start, min(start + step, documents.stop))
        crc = zlib.crc32(lengths.data, crc)
        tokens += int(lengths.sum(dtype=np.int64))
    return Epoch(prefix, documents.start, documents.stop, crc, tokens, seq_length, seed)


def _lengths(prefix: str, start: int, stop: int) -> np.ndarray:
    """Read, not mapped: what is mapped of a file counts as this process's memory."""
    return np.fromfile(f"{prefix}.idx", np.int32, stop - start, offset=IDX_HEADER.size + 4 * start)


def make(epoch: Epoch) -> EpochIndex:
    """The index in memory, in the order of draws that GPTDataset has: documents, then samples."""
    random = np.random.RandomState(epoch.seed)
    count, step = epoch.stop - epoch.start, BLOCK // 4
    # A document's number and length side by side, as one item: shuffled together, no length has to be looked up after.
    pairs = np.empty((count, 2), np.int32)
    for start in range(0, count, step):
        part = pairs[start : start + step]
        part[:, 0] = np.arange(epoch.start + start, epoch.start + start + len(part), dtype=np.int32)
        part[:, 1] = _lengths(epoch.prefix, epoch.start + start, epoch.start + start + len(part))
    native.shuffle(pairs.view(np.int64).reshape(-1), random)
    samples = native.sample_index(pairs[:, 1], epoch.seq_length, epoch.tokens)
    documents = pairs.reshape(-1)
    for start in range(0, count, step):  # the numbers move together, in the same memory
        documents[start : min(start + step, count)] = pairs[start : start + step, 0]
    order = positions(len(samples) - 1)
    native.shuffle(order, random)
    return EpochIndex(documents[:count], samples, order)


def positions(size: int) -> np.ndarray:
    """0 to `size` - 1, as numbers of samples."""
    return np.arange(size, dtype=order_dtype(size))


def order_dtype(samples: int) -> np.dtype:
    """The type of GPTDataset's shuffle index."""
    return np.dtype(np.uint32 if samples < 2**32 - 2 else np.int64)


def cache_folder(cache_path: str | Path | None, paths: Paths) -> Path:
    """DATA_CACHE_PATH, by default `cache` beside the first prefix."""
    return Path(cache_path) if cache_path else Path(blends(paths)[0][0][1]).parent / "cache"


def ensure(epoch: Epoch, folder: Path) -> bool:
    """Have the verified index file of `epoch` in `folder`. False where it was there.

    A file that is damaged, or somebody else's, is made anew, and a line says so. Raises UsageError where none can be
    written.
    """
    path = folder / epoch.file_name
    if os.path.lexists(path):
        fault = _fault(path, epoch)
        if fault is None:
            return False
        log.warning("%s %s: it is made anew", path, fault)
    index = make(epoch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, epoch, index)
    except OSError as error:
        raise UsageError(
            f"DATA_CACHE_PATH={folder}: index files can't be written ({error.strerror}). "
            "Give a folder that this user may write to, with room for 4 bytes per document and 12 per sample"
        ) from None
    return True


def load(epoch: Epoch, folder: Path) -> EpochIndex:
    """The arrays of the file that `ensure` has left in `folder`, memory-mapped."""
    mapped = np.memmap(folder / epoch.file_name, np.uint8, "r")
    documents, samples, order = (
        np.frombuffer(mapped, dtype, math.prod(shape), offset).reshape(shape)
        for offset, dtype, shape in _layout(epoch)[:-1]
    )
    return EpochIndex(documents, samples, order)


def _layout(epoch: Epoch) -> list[tuple[int, np.dtype, tuple[int, ...]]]:
    """(offset in bytes, type, shape) of each array in the file, and of nothing where the file ends."""
    count, samples = epoch.stop - epoch.start, epoch.samples
    arrays: list[tuple[np.dtype, tuple[int, ...]]] = [
        (np.dtype(np.int32), (count,)),
        (native.sample_dtype(count), (samples + 1, 2)),
        (order_dtype(samples), (samples,)),
        (np.dtype(np.uint8), (0,)),
    ]
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in arrays]
    offsets = accumulate((size + -size % ALIGNED for size in sizes[:-1]), initial=HEADER_SIZE)
    return [(offset, dtype, shape) for offset, (dtype, shape) in zip(offsets, arrays, strict=True)]


def _fault(path: Path, epoch: Epoch) -> str | None:
    """What is wrong with a file: None where every byte is as it was written."""
    layout = _layout(epoch)
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER_SIZE), os.fstat(file.fileno()).st_size
            if not head.startswith(MAGIC):
                return "is not an index file of ours"
            if size != layout[-1][0]:
                return f"has {size} bytes and should have {layout[-1][0]}"
            sums = [_crc(file, end - start) for (start, *_), (end, *_) in pairwise(layout)]
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None if head == _header(epoch, sums) else "is damaged, or was made of other data: its checksums are others"


def _header(epoch: Epoch, sums: list[int]) -> bytes:
    text = MAGIC + json.dumps({"made_of": epoch.facts, "crc32": sums}).encode()
    return text + b" " * (HEADER_SIZE - len(text))


def _crc(file: BinaryIO, size: int) -> int:
    """Of the next `size` bytes."""
    crc = 0
    while size and (block := file.read(min(size, BLOCK))):
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc


def _write(path: Path, epoch: Epoch, index: EpochIndex) -> None:
    """Under its name once it is whole and on disk: several processes may write the same file at a time."""
    ours = f"{path.name}.{os.uname().nodename}"
    for left in path.parent.glob(f"{glob.escape(ours)}.*.partial"):
        _remove_abandoned(left)
    partial = path.with_name(f"{ours}.{os.getpid()}.partial")
    sums = []
    try:
        with open(partial, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(HEADER_SIZE)
            for array in index:
                padding = bytes(-array.nbytes % ALIGNED)
                file.write(array.data)
                file.write(padding)
                sums.append(zlib.crc32(padding, zlib.crc32(array.data)))
            file.seek(0)
            file.write(_header(epoch, sums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _remove_abandoned(partial: Path) -> None:
    """Remove what a killed process of this host was writing: a live one holds its lock from before its first byte."""
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_size:
            partial.unlink()
