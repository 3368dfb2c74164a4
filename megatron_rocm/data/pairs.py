"""Passes over whole .bin/.idx pairs in bounded memory: each offset and id checked, new pairs written as streams.

Where indexed.py opens a pair in no time by what its two ends say, this reads all of it.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_rocm.data.indexed import DTYPES, HEADER, MAGIC, Header, broken, discard, partial, publish, read_header
from megatron_rocm.data.progress import Heartbeat
from megatron_rocm.errors import UsageError

BLOCK = 1 << 20  # entries of an index, or ids, read at once


# What an `.idx` holds after its header: type of the entries, and bytes per sequence that lie before them.
ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "lengths": (np.int32, 0),
    "offsets": (np.int64, 4),
    "boundaries": (np.int64, 12),
}


@dataclass(frozen=True)
class Pair:
    """A pair whose every offset has been checked."""

    prefix: str
    head: Header
    tokens: int

    @property
    def documents(self) -> int:
        return self.head.boundaries - 1

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each sequence (int32), block by block."""
        return _blocks(self.prefix, self.head, "lengths", 0, self.head.sequences)

    def ends(self) -> Iterator[np.ndarray]:
        """The document boundaries without the leading 0: sequences up to the end of each document (int64)."""
        return _blocks(self.prefix, self.head, "boundaries", 1, self.head.boundaries)

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document (int64), block by block."""
        begin = 0
        for ends in self.ends():
            lengths = read_entries(self.prefix, self.head, "lengths", begin, int(ends[-1]))
            counted = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            yield np.diff(counted[ends - begin], prepend=0)
            begin = int(ends[-1])


def read_entries(prefix: str, head: Header, name: str, start: int, stop: int) -> np.ndarray:
    """Entries of one of ARRAYS. Read, not mapped: what is mapped of a file counts as this process's memory."""
    dtype, before = ARRAYS[name]
    at = HEADER.size + before * head.sequences + np.dtype(dtype).itemsize * start
    found = np.fromfile(f"{prefix}.idx", dtype, stop - start, offset=at)
    if len(found) < stop - start:
        raise UsageError(f"{prefix}.idx became shorter while it was read; is somebody writing it?")
    return found


def _blocks(prefix: str, head: Header, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
    for begin in range(start, stop, BLOCK):
        yield read_entries(prefix, head, name, begin, min(begin + BLOCK, stop))


def mapped(prefix: str, head: Header, name: str) -> np.ndarray:
    """One of ARRAYS, mapped into memory to look single entries up.

    It is not aligned, so numpy's searchsorted would copy it; bisect does not.
    """
    dtype, before = ARRAYS[name]
    count = head.boundaries if name == "boundaries" else head.sequences
    if not count:
        return np.empty(0, dtype)
    return np.memmap(f"{prefix}.idx", dtype, "r", HEADER.size + before * head.sequences, (count,))


def check_offsets(prefix: str, key: str = "DATA_PATH") -> Pair:
    """Read all of PREFIX.idx: boundaries, lengths and offsets must follow from each other and end where `.bin` does.

    Raises UsageError, naming `key` and the first document that is wrong. A pair without documents is a good pair.
    """
    head = read_header(prefix, key)
    _check_boundaries(prefix, head, key)
    lengths = _blocks(prefix, head, "lengths", 0, head.sequences)
    pointers = _blocks(prefix, head, "offsets", 0, head.sequences)
    before = offset = 0
    for counted, said in zip(lengths, pointers, strict=True):
        following = offset + np.cumsum(counted, dtype=np.int64) * head.dtype.itemsize
        expected = np.concatenate([[offset], following[:-1]])
        wrong = (counted < 0) | (said != expected)
        if wrong.any():
            at = int(wrong.argmax())
            document = _document_of(prefix, head, before + at)
            why = (
                f"{counted[at]:,} tokens" if counted[at] < 0
                else f"offset {said[at]:,}, where {expected[at]:,} follows from the lengths before it"
            )  # fmt: skip
            raise broken(
                prefix, "idx", f"is damaged from document {document:,} on (sequence {before + at:,}): {why}", key
            )
        before, offset = before + len(counted), int(following[-1])
    if head.bin_size != offset:
        state = "truncated" if head.bin_size < offset else "not the one that belongs to its .idx"
        first = document_at(prefix, head, head.bin_size)
        more = f"; document {first:,} is the first that is not whole" if head.bin_size < offset else ""
        raise broken(prefix, "bin", f"is {state}: {head.bin_size} bytes, the .idx announces {offset}{more}", key)
    return Pair(prefix, head, offset // head.dtype.itemsize)


def _check_boundaries(prefix: str, head: Header, key: str) -> None:
    last = -1
    done = 0
    for ends in _blocks(prefix, head, "boundaries", 0, head.boundaries):
        steps = np.diff(ends, prepend=last)
        wrong = (steps < 0) | (ends > head.sequences)
        if not done:
            wrong[0] = ends[0] != 0
        if wrong.any():
            at = int(wrong.argmax())
            why = f"is damaged: document {max(0, done + at - 1):,} ends at sequence {ends[at]:,} of {head.sequences:,}"
            raise broken(prefix, "idx", why, key)
        done, last = done + len(ends), int(ends[-1])
    if last != head.sequences:
        raise broken(prefix, "idx", f"is damaged: its documents end at sequence {last:,} of {head.sequences:,}", key)


def _document_of(prefix: str, head: Header, sequence: int) -> int:
    """The number of the document that holds a sequence."""
    return bisect.bisect_right(mapped(prefix, head, "boundaries"), sequence) - 1


def document_at(prefix: str, head: Header, byte: int) -> int:
    """The number of the document that holds a byte of PREFIX.bin."""
    return _document_of(prefix, head, max(0, bisect.bisect_right(mapped(prefix, head, "offsets"), byte) - 1))


def raw_blocks(prefix: str, head: Header) -> Iterator[np.ndarray]:
    """All ids of PREFIX.bin, a block at a time; each block is overwritten by the next. Says how far it is."""
    space = np.empty(BLOCK * 4, head.dtype)
    view = space.data.cast("B")
    read = 0
    progress = Heartbeat(f"{prefix}.bin", head.bin_size)
    with open(f"{prefix}.bin", "rb", buffering=0) as file:
        while size := file.readinto(view):
            while size % head.dtype.itemsize:
                more = file.readinto(view[size:])
                if not more:
                    break
                size += more
            read += size
            yield space[: size // head.dtype.itemsize]
            progress.show(read)
    if read != head.bin_size:
        raise UsageError(f"{prefix}.bin changed while it was read: {read} bytes instead of {head.bin_size}")


@dataclass(frozen=True)
class Content:
    """What all ids of a pair say: the highest one, and sha256 over the bytes of the `.bin` file."""

    highest: int
    checksum: str


def check_ids(pair: Pair, vocab_size: int | None, key: str = "DATA_PATH") -> Content:
    """Read all of PREFIX.bin. Raises UsageError for an id below 0 or, where `vocab_size` is given, not below that.

    The message names the first document that holds one.
    """
    digest = hashlib.sha256()
    highest, done = -1, 0
    for ids in raw_blocks(pair.prefix, pair.head):
        digest.update(ids.data)
        top, low = int(ids.max()), int(ids.min())
        highest = max(highest, top)
        if low < 0 or (vocab_size is not None and top >= vocab_size):
            wrong = ids < 0
            if vocab_size is not None:
                wrong |= ids >= vocab_size
            at = int(wrong.argmax())
            document = document_at(pair.prefix, pair.head, (done + at) * pair.head.dtype.itemsize)
            rule = "ids begin at 0" if ids[at] < 0 else f"its tokenizer has {vocab_size:,} ids only"
            raise UsageError(
                f"{key}={pair.prefix}: document {document:,} holds the id {ids[at]:,} (token {done + at:,}), and "
                f"{rule}. The file is damaged, or another tokenizer made it"
            )
        done += len(ids)
    return Content(highest, f"sha256:{digest.hexdigest()}")


def require_counts(pair: Pair, sidecar: dict[str, Any], key: str) -> None:
    """Raise UsageError where the sidecar is that of other data."""
    for name, found in (("documents", pair.documents), ("tokens", pair.tokens)):
        if sidecar.get(name, found) != found:
            raise UsageError(
                f"{key}={pair.prefix}: {pair.prefix}.json speaks of {sidecar[name]} {name} and the .idx of {found}. "
                "Copy .bin, .idx and .json together, or prepare them anew"
            )


def require_checksum(pair: Pair, sidecar: dict[str, Any] | None, checksum: str, key: str) -> None:
    """Raise UsageError where the sidecar names another checksum of the `.bin` file."""
    if sidecar and sidecar.get("checksum", checksum) != checksum:
        raise UsageError(
            f"{key}={pair.prefix}: its .bin has not the checksum that {pair.prefix}.json names: it was changed or "
            "copied badly. Copy the three files again, or prepare them anew"
        )


class PairWriter:
    """Streams raw ids and index entries into PREFIX.bin.partial and .idx.partial; `finish` gives them their names.

    Left by an exception, it takes its partial files with it. Raises UsageError, naming `key`, where another process
    writes the same prefix.
    """

    def __init__(self, prefix: str, dtype: np.dtype, key: str) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._bin = open(partial(prefix, "bin"), "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._bin.close()
            raise self._taken(key) from None
        except OSError:
            pass  # a file system without locks
        # Opened just before the one that held the lock gave the file its final name, or removed it.
        if not os.path.exists(self._bin.name) or not os.path.samestat(
            os.fstat(self._bin.fileno()), os.stat(self._bin.name)
        ):
            self._bin.close()
            raise self._taken(key)
        self._bin.truncate(0)
        Path(partial(prefix, "json")).unlink(missing_ok=True)  # of a killed one, and `publish` would take it

    def _taken(self, key: str) -> UsageError:
        return UsageError(f"{key}={self.prefix}: another process is writing there. Wait for it, or name another")

    @property
    def checksum(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def write(self, ids: np.ndarray) -> None:
        """Append ids of this dtype to the `.bin` file."""
        raw = np.ascontiguousarray(ids).data
        self._bin.write(raw)
        self._digest.update(raw)
        self.bytes += raw.nbytes

    def index(self, sequences: int, documents: int, lengths: Iterable[np.ndarray], ends: Iterable[np.ndarray]) -> None:
        """Write the `.idx` file: lengths of the sequences, offsets that follow from them, ends of the documents."""
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        path = partial(self.prefix, "idx")
        with open(path, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, sequences, documents + 1))
            for block in lengths:
                file.write(block.data)
            file.flush()
            offset = 0
            with open(path, "rb", buffering=0) as written:
                written.seek(HEADER.size)
                for left in range(sequences, 0, -BLOCK):
                    following = np.cumsum(np.fromfile(written, np.int32, min(left, BLOCK)), dtype=np.int64)
                    following *= self.dtype.itemsize
                    file.write((offset + np.concatenate([[0], following[:-1]])).data)
                    offset += int(following[-1])
            file.write(np.zeros(1, np.int64).data)
            for block in ends:
                file.write(block.data)
            _to_disk(file)
            if file.tell() != HEADER.size + 12 * sequences + 8 * (documents + 1) or offset != self.bytes:
                raise UsageError(f"{self.prefix}: the pairs read for it changed meanwhile; is somebody writing them?")

    def finish(self, sidecar: dict[str, Any] | None) -> None:
        """Have all on disk, then under the final names. `sidecar` becomes PREFIX.json."""
        _to_disk(self._bin)
        if sidecar is not None:
            with open(partial(self.prefix, "json"), "wb") as file:
                file.write(json.dumps(sidecar, indent=1).encode() + b"\n")
                _to_disk(file)
        publish(self.prefix)

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            discard(self.prefix)
        self._bin.close()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
