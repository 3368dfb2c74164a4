"""megatron-core's indexed dataset, PREFIX.bin and PREFIX.idx, read, checked and written with numpy alone.

Layout of `.idx` (megatron.core.datasets.indexed_dataset): 9 bytes magic, version (8 bytes), dtype code (1),
sequence count S (8), document index count D (8), then S int32 lengths in tokens, S int64 offsets into `.bin` in
bytes, D int64 document boundaries counted in sequences.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
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


def open_index(prefix: str, key: str = "DATA_PATH") -> Index:
    """The index of PREFIX.bin/PREFIX.idx. Raises UsageError, naming `key`, where the two are not whole and a pair."""
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

    def broken(path: Path, why: str) -> UsageError:
        return UsageError(f"{key}={prefix}: {path} {why}: copy both files again, or prepare them anew")

    try:
        size, bin_size = idx_path.stat().st_size, bin_path.stat().st_size
        with open(idx_path, "rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise UsageError(f"{key}={prefix}: {idx_path} can't be read: {error.strerror}") from None
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise broken(idx_path, "is not a megatron-core index (it does not begin with MMIDIDX)")
    if len(head) < HEADER.size:
        raise broken(idx_path, f"is truncated: {size} bytes, the header alone has {HEADER.size}")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1:
        raise broken(idx_path, f"has version {version}, known is 1")
    if code not in DTYPES:
        raise broken(idx_path, f"holds data type {code}, not token ids")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise broken(idx_path, "is a multimodal index, which a Llama can't be trained on")
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise broken(idx_path, f"is {state}: {size} bytes, its header announces {expected}")
    if not sequences:
        raise broken(idx_path, "holds no documents")

    lengths = np.memmap(idx_path, np.int32, "r", HEADER.size, (sequences,))
    pointers = np.memmap(idx_path, np.int64, "r", HEADER.size + 4 * sequences, (sequences,))
    ends = np.memmap(idx_path, np.int64, "r", HEADER.size + 12 * sequences, (boundaries,))
    dtype = np.dtype(DTYPES[code])
    tokens = int(lengths.sum(dtype=np.int64))
    last = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if int(lengths.min()) < 0 or not boundaries or int(ends[-1]) != sequences or last != tokens * dtype.itemsize:
        raise broken(idx_path, "is damaged: its lengths, offsets and document ends contradict each other")
    if bin_size != last:
        state = "truncated" if bin_size < last else "not the one that belongs to its .idx"
        raise broken(bin_path, f"is {state}: {bin_size} bytes, {idx_path.name} announces {last}")
    return Index(prefix, dtype, lengths, boundaries - 1, tokens)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """What `prepare` wrote beside the data; None where PREFIX.json is missing or is somebody else's file."""
    path = Path(f"{prefix}.json")
    try:
        if path.stat().st_size > 1 << 20:
            return None
        sidecar = json.loads(path.read_bytes())
        known = sidecar["format"] == SIDECAR_FORMAT and isinstance(sidecar["source"], dict)
        tokenizer = sidecar["tokenizer"]
        typed = all(isinstance(tokenizer[key], kind) for key, kind in TOKENIZER_KEYS.items())
        return sidecar if known and typed else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores ids of this vocabulary in (DType.optimal_dtype)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Streams documents into PREFIX.bin.partial; `finalize` gives the three files their names, `.idx` last.

    A pair with an `.idx` is therefore always whole. Byte-identical to Megatron-LM's IndexedDatasetBuilder with one
    sequence per document. Left by an exception, it takes its partial files with it.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self.documents = 0
        self._lengths: list[np.ndarray] = []
        self._bin = open(self._partial("bin"), "wb")  # noqa: SIM115

    def _partial(self, kind: str) -> str:
        return f"{self.prefix}.{kind}.partial"

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their ids one after the other, and the length of each. An empty one is left out."""
        lengths = np.asarray(lengths, np.int32)
        lengths = lengths[lengths > 0]
        self._bin.write(np.ascontiguousarray(ids, self.dtype).data)
        self._lengths.append(lengths)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def finalize(self, sidecar: dict[str, Any] | None = None) -> None:
        """Write everything out and rename it. `sidecar` becomes PREFIX.json."""
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
        pointers *= self.dtype.itemsize
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(self._partial("idx"), "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            for array in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
                file.write(array.data)
            _sync(file)
        _sync(self._bin)
        self._bin.close()
        if sidecar is not None:
            with open(self._partial("json"), "w") as text:
                json.dump(sidecar, text, indent=1)
                text.write("\n")
                _sync(text)
        # What stood here before stops being a pair first: old ids must never be read through a new index.
        for kind in ("idx", "json"):
            Path(f"{self.prefix}.{kind}").unlink(missing_ok=True)
        for kind in ("bin", "json", "idx") if sidecar is not None else ("bin", "idx"):
            os.replace(self._partial(kind), f"{self.prefix}.{kind}")
        sync_folder(Path(self.prefix).parent)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for part in ("bin", "json", "idx"):
            Path(self._partial(part)).unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
