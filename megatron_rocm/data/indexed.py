"""megatron-core's indexed dataset, PREFIX.bin and PREFIX.idx, read, checked and written with numpy alone.

Layout of `.idx` (megatron.core.datasets.indexed_dataset): 9 bytes magic, version (8 bytes), dtype code (1),
sequence count S (8), document index count D (8), then S int32 lengths in tokens, S int64 offsets into `.bin` in
bytes, D int64 document boundaries counted in sequences.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_rocm.errors import UsageError
from megatron_rocm.platform.disk import sync_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SIDECAR_FORMAT = 1
TOKENIZER_KEYS = {"type": str, "model": str, "vocab_size": int, "eod": int, "fingerprint": str}


@dataclass(frozen=True)
class Index:
    """A checked pair of files. `lengths` is memory-mapped: tokens per sequence, int32."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    documents: int
    tokens: int


@dataclass(frozen=True)
class Header:
    """The head of a whole `.idx` file, and its `.bin` file's size in bytes. `boundaries` are documents + 1."""

    dtype: np.dtype
    sequences: int
    boundaries: int
    bin_size: int


def read_header(prefix: str, key: str = "DATA_PATH") -> Header:
    """What PREFIX.idx announces; both files are there, and the `.idx` has the size of what it announces.

    Raises UsageError, naming `key`, where that is not so.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    if len(missing) == 2:
        raise UsageError(
            f"{key}={prefix}: there is no {bin_path} and no {idx_path}. Give the prefix of a .bin/.idx pair; "
            "`bash examples/llama/prepare_dataset.sh` makes one"
        )
    if missing:
        raise UsageError(
            f"{key}={prefix}: {missing[0]} is missing, its other half is there: copy both, or prepare them anew"
        )
    try:
        size, bin_size = idx_path.stat().st_size, bin_path.stat().st_size
        with open(idx_path, "rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise UsageError(f"{key}={prefix}: {idx_path} can't be read: {error.strerror}") from None
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise broken(prefix, "idx", "is not a megatron-core index (it does not begin with MMIDIDX)", key)
    if len(head) < HEADER.size:
        raise broken(prefix, "idx", f"is truncated: {size} bytes, the header alone has {HEADER.size}", key)
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1:
        raise broken(prefix, "idx", f"has version {version}, known is 1", key)
    if code not in DTYPES:
        raise broken(prefix, "idx", f"holds data type {code}, not token ids", key)
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise broken(prefix, "idx", "is a multimodal index, which a Llama can't be trained on", key)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise broken(prefix, "idx", f"is {state}: {size} bytes, its header announces {expected}", key)
    return Header(np.dtype(DTYPES[code]), sequences, boundaries, bin_size)


def broken(prefix: str, kind: str, why: str, key: str = "DATA_PATH") -> UsageError:
    """The error that PREFIX.`kind` is damaged."""
    return UsageError(f"{key}={prefix}: {prefix}.{kind} {why}: copy both files again, or prepare them anew")


def open_index(prefix: str, key: str = "DATA_PATH") -> Index:
    """The index of PREFIX.bin/PREFIX.idx. Raises UsageError, naming `key`, where the two are not whole and a pair."""
    head = read_header(prefix, key)
    if not head.sequences:
        raise broken(prefix, "idx", "holds no documents", key)
    idx_path, sequences, boundaries, dtype = f"{prefix}.idx", head.sequences, head.boundaries, head.dtype
    lengths = np.memmap(idx_path, np.int32, "r", HEADER.size, (sequences,))
    pointers = np.memmap(idx_path, np.int64, "r", HEADER.size + 4 * sequences, (sequences,))
    ends = np.memmap(idx_path, np.int64, "r", HEADER.size + 12 * sequences, (boundaries,))
    tokens = int(lengths.sum(dtype=np.int64))
    last = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if int(lengths.min()) < 0 or not boundaries or int(ends[-1]) != sequences or last != tokens * dtype.itemsize:
        raise broken(prefix, "idx", "is damaged: its lengths, offsets and document ends contradict each other", key)
    if head.bin_size != last:
        state = "truncated" if head.bin_size < last else "not the one that belongs to its .idx"
        why = f"is {state}: {head.bin_size} bytes, {Path(idx_path).name} announces {last}"
        raise broken(prefix, "bin", why, key)
    return Index(prefix, dtype, lengths, boundaries - 1, tokens)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """What `prepare` wrote beside the data; None where PREFIX.json is missing or is somebody else's file.

    Raises UsageError for one of ours that was cut short on its way.
    """
    path = Path(f"{prefix}.json")
    try:
        if path.stat().st_size > 1 << 24:
            return None
        text = path.read_bytes()
    except OSError:
        return None
    try:
        sidecar = json.loads(text)
    except ValueError as error:
        if not text.startswith(b'{\n "format"'):
            return None
        raise UsageError(f"{path} is damaged ({error}): copy it again from where the data were made") from None
    try:
        known = sidecar["format"] == SIDECAR_FORMAT and isinstance(sidecar["source"], dict)
        tokenizer = sidecar["tokenizer"]
        typed = all(isinstance(tokenizer[key], kind) for key, kind in TOKENIZER_KEYS.items())
        return sidecar if known and typed else None
    except (KeyError, TypeError, AttributeError):
        return None


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores ids of this vocabulary in (DType.optimal_dtype)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


PARTIAL = ("bin", "lengths", "idx", "json")
AT_ONCE = 1 << 20  # lengths that are in memory while the index is made


class IndexedWriter:
    """Streams documents into PREFIX.bin.partial; `finalize` gives the three files their names, `.idx` last.

    A pair with an `.idx` is therefore always whole. Byte-identical to Megatron-LM's IndexedDatasetBuilder with one
    sequence per document: one without ids is a document of no sequence. Lengths wait in PREFIX.lengths.partial, so
    memory does not grow. `tokens` and `documents` go on with the files of a writer that had committed so many.
    Left by an exception, it takes its partial files with it.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, tokens: int = 0, documents: int = 0) -> None:
        self.prefix = str(prefix)
        self.dtype = token_dtype(vocab_size)
        self.tokens = tokens
        self.documents = documents
        self._bin = self._open("bin", tokens * self.dtype.itemsize)
        self._lengths = self._open("lengths", documents * 4)

    def _open(self, kind: str, size: int) -> FileIO:
        # Unbuffered: what a full disk refused must not be written again when the file is closed.
        file = open(partial(self.prefix, kind), "r+b" if size else "w+b", buffering=0)  # noqa: SIM115
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids one after the other, and the length of each."""
        _write(self._bin, np.ascontiguousarray(ids, self.dtype))
        _write(self._lengths, np.ascontiguousarray(lengths, np.int32))
        self.tokens += len(ids)
        self.documents += len(lengths)

    def commit(self) -> None:
        """Have on the disk what has been added."""
        _sync(self._bin)
        _sync(self._lengths)

    def finalize(self, sidecar: dict[str, Any] | None = None) -> None:
        """Write everything out and rename it. `sidecar` becomes PREFIX.json."""
        self.seal(sidecar)
        publish(self.prefix)

    def seal(self, sidecar: dict[str, Any] | None = None) -> None:
        """All of `finalize` but the renaming, which `publish` does."""
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(partial(self.prefix, "idx"), "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, 0, self.documents + 1))
            sequences = 0
            for lengths in self._blocks():
                file.write(lengths[lengths > 0].data)
                sequences += np.count_nonzero(lengths)
            offset = 0
            for lengths in self._blocks():
                lengths = lengths[lengths > 0].astype(np.int64) * self.dtype.itemsize
                ends = np.cumsum(lengths) + offset
                file.write((ends - lengths).data)
                offset = int(ends[-1]) if len(ends) else offset
            documents = 0
            file.write(np.zeros(1, np.int64).data)
            for lengths in self._blocks():
                ends = np.cumsum(lengths > 0, dtype=np.int64) + documents
                file.write(ends.data)
                documents = int(ends[-1])
            file.seek(0)
            file.write(HEADER.pack(MAGIC, 1, code, sequences, self.documents + 1))
            _sync(file)
        self.commit()
        self.close()
        if sidecar is not None:
            with open(partial(self.prefix, "json"), "w") as text:
                json.dump(sidecar, text, indent=1)
                text.write("\n")
                _sync(text)

    def _blocks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while len(block := np.frombuffer(self._lengths.read(4 * AT_ONCE), np.int32)):
            yield block

    def close(self) -> None:
        """Leave the partial files as they are."""
        self._bin.close()
        self._lengths.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        discard(self.prefix)


def partial(prefix: str, kind: str) -> str:
    """Where a file of PREFIX is written before it gets its name."""
    return f"{prefix}.{kind}.partial"


def publish(prefix: str) -> None:
    """Give sealed files their names, `.idx` last; where that was interrupted, the rest of them."""
    if os.path.exists(partial(prefix, "bin")):
        # What stood here before stops being a pair first: old ids must never be read through a new index.
        for kind in ("idx", "json"):
            Path(f"{prefix}.{kind}").unlink(missing_ok=True)
    for kind in ("bin", "json", "idx"):
        if os.path.exists(partial(prefix, kind)):
            os.replace(partial(prefix, kind), f"{prefix}.{kind}")
    sync_folder(Path(prefix).parent)
    discard(prefix)


def discard(prefix: str) -> None:
    """Remove what an unfinished writer left."""
    for kind in PARTIAL:
        Path(partial(prefix, kind)).unlink(missing_ok=True)


def _write(file: FileIO, array: np.ndarray) -> None:
    left = array.view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
