"""The archives of torch.save: tensors read where they lie, by an allow-list, and single tensors framed for writing.

An archive is a zip file that compresses nothing: `data.pkl` describes the object, `data/<n>` are the bytes of its
storages. torch.load would map a whole file privately, which a machine refuses for a file larger than its memory, and
can't read an archive within a file, as `.distcp` files have them.
Source: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint.convert.mapped import Mapped
from megatron_rocm.errors import UsageError

STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
ALIGNMENT = 64  # of a storage's bytes in its archive


class _Window(io.RawIOBase):
    """A part of a mapped file, as a file of its own."""

    def __init__(self, file: Mapped, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise ValueError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        begin = self._offset + self._at
        self._at += count
        return bytes(self._file.bytes[begin : begin + count])


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers alone."""

    def __init__(self, content: bytes, file: Mapped, places: dict[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._file, self._places = file, places

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
        }
        if (module, name) not in known:
            raise UsageError(f"{self._file.path}: it names {module}.{name}, which weights never need: it is not read")
        return known[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        return _Storage(dtype, key, count)

    def _tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Tensor:
        begin, length = self._places[f"data/{storage.key}"]
        if storage.count * storage.dtype.itemsize != length:
            raise pickle.UnpicklingError(f"storage {storage.key} has {length} bytes for {storage.count} elements")
        flat = self._file.tensor(storage.dtype, (storage.count,), begin)
        return flat.as_strided(tuple(shape), tuple(stride), offset)


def read(file: Mapped, offset: int = 0, length: int | None = None) -> Any:
    """The object of the archive at `offset`; its tensors are views of the file. Executes nothing.

    Raises UsageError where it is none, is damaged, or holds more than tensors and plain containers.
    """
    length = file.size - offset if length is None else length
    try:
        with zipfile.ZipFile(_Window(file, offset, length)) as archive:
            places = {}
            for entry in archive.infolist():
                if entry.compress_type:
                    raise ValueError(f"{entry.filename} is compressed")
                header = offset + entry.header_offset
                name, extra = struct.unpack_from("<HH", file.bytes, header + 26)
                begin = header + 30 + name + extra
                if begin + entry.file_size > offset + length:
                    raise ValueError(f"{entry.filename} goes beyond its end")
                places[entry.filename.split("/", 1)[-1]] = begin, entry.file_size
            order = places.get("byteorder")
            if order and file.bytes[order[0] : sum(order)] != b"little":
                raise ValueError("its bytes are in big-endian order")
            begin, size = places["data.pkl"]
            return _Unpickler(file.bytes[begin : begin + size], file, places).load()
    except UsageError:
        raise
    except Exception as error:  # damage raises anything
        where = f" at byte {offset:,}" if offset else ""
        raise UsageError(
            f"{file.path}: not an archive of weights{where}, damaged or truncated ({error}): copy or download it again"
        ) from error


class _Pickler(pickle.Pickler):
    """Writes a tensor as torch.save does, from its description."""

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, _Storage):
            kind = next(name for name, dtype in STORAGES.items() if dtype == thing.dtype)
            return "storage", getattr(torch, kind), thing.key, "cpu", thing.count
        return None

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, _Described):
            return NotImplemented
        stride = [math.prod(thing.shape[dimension + 1 :]) for dimension in range(len(thing.shape))]
        parts: tuple[Any, ...] = (thing.storage, 0, thing.shape, tuple(stride), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, parts


@dataclass(frozen=True)
class _Described:
    storage: _Storage
    shape: tuple[int, ...]


def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before and after the bytes of a contiguous tensor in its archive, which torch.load reads.

    The tensor's own checksum is left out, as with torch.serialization.set_crc32_options(False): the manifest has a
    better one. Less than 4 GiB a tensor.
    """
    count = math.prod(shape)
    described = io.BytesIO()
    _Pickler(described, protocol=2).dump(_Described(_Storage(dtype, "0", count), shape))
    small = {"data.pkl": described.getvalue(), "byteorder": b"little", "version": b"3\n"}
    before, directory = bytearray(), bytearray()
    for name, content in small.items():
        _entry(before, directory, f"archive/{name}", len(content), zlib.crc32(content))
        before += content
    _entry(before, directory, "archive/data/0", count * dtype.itemsize, 0)
    start = len(before) + count * dtype.itemsize
    entries = len(small) + 1
    return bytes(before), bytes(directory) + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, entries, entries, len(directory), start, 0
    )


def _entry(before: bytearray, directory: bytearray, name: str, size: int, crc: int) -> None:
    """Append an entry's header to `before`, so that its bytes begin aligned, and its place to `directory`."""
    at, encoded = len(before), name.encode()
    padding = -(at + 30 + len(encoded) + 4) % ALIGNMENT
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0x21, crc, size, size, len(encoded), 4 + padding)
    before += b"PK\3\4" + common + encoded + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    common = struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0x21, crc, size, size, len(encoded), 0, 0, 0, 0, 0, at)
    directory += b"PK\1\2" + common + encoded
