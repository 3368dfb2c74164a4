"""Writes a torch_dist checkpoint folder tensor by tensor, without a model and without a process group.

The files are those of torch.distributed.checkpoint's FileSystemWriter below megatron-core: `.metadata` says where in
the `.distcp` files each part of a tensor lies. Whole tensors are described, with no layout in them, so that training
loads them in any.
"""

from __future__ import annotations

import importlib
import json
import math
import pickle
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.convert import archive
from megatron_rocm.checkpoint.convert.stream import Stream
from megatron_rocm.checkpoint.folder import WHOLE
from megatron_rocm.platform.disk import sync_file, sync_folder

MOST_PART = 1 << 30  # bytes of one archive, which may have less than 4 GiB
MOST_FILE = 10 * 10**9  # bytes of one file
FORMATS_MODULE = "torch.distributed.checkpoint.filesystem"
FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip


@dataclass
class _Whole:
    """A tensor, and where its parts lie: their corner and shape in it, file, byte offset and length."""

    size: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]] = field(default_factory=list)


class TorchDistWriter:
    """A new checkpoint folder. Use as a context; `finish` within it makes it whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, _Whole] = {}
        self._files: dict[str, manifest.File] = {}
        self._stream: Stream | None = None
        self._name = ""
        # Takes more than a second, and is needed at the end.
        threading.Thread(target=importlib.import_module, args=(FORMATS_MODULE,), daemon=True).start()

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream:
            self._stream.__exit__(kind, error, trace)

    def tensor(self, key: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
        """Declare a whole tensor; its parts come with `part`."""
        self._tensors[key] = _Whole(size, dtype)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def part(self, key: str, offsets: tuple[int, ...], part: Tensor) -> None:
        """Write a part of a declared tensor that lies at `offsets` in it. It has the tensor's dimensions and type."""
        cut = 0 if part.shape[0] > 1 else min(1, part.dim() - 1)  # a layer of a stack has its rows one dimension on
        rows = max(1, MOST_PART // max(1, part.nbytes // part.shape[cut]))
        for first in range(0, part.shape[cut], rows):
            piece = part.narrow(cut, first, min(rows, part.shape[cut] - first)).contiguous()
            place = list(offsets)
            place[cut] += first
            self._archive(key, tuple(place), piece)

    def _archive(self, key: str, offsets: tuple[int, ...], piece: Tensor) -> None:
        entry = self._tensors[key]
        assert piece.dtype == entry.dtype
        stream = self._open()
        before, after = archive.frame(piece.dtype, tuple(piece.shape))
        start = stream.size
        stream.write(before)
        stream.write(piece)
        stream.write(after)
        entry.parts.append((offsets, tuple(piece.shape), self._name, start, stream.size - start))

    def _open(self) -> Stream:
        if self._stream and self._stream.size >= MOST_FILE:
            self._close()
        if not self._stream:
            self._name = f"__0_{len(self._files)}.distcp"
            self._stream = Stream(self._folder / self._name, hashed=True)
        return self._stream

    def _close(self) -> None:
        if self._stream:
            self._stream.close()
            self._files[self._name] = self._stream.done
            self._stream = None

    def finish(self, common: dict[str, Any]) -> None:
        """Write what describes the tensors, `common` and the manifest, of what is in the folder already too."""
        for key, entry in self._tensors.items():
            there = sum(math.prod(shape) for _, shape, *_ in entry.parts)
            assert there == math.prod(entry.size), f"{key}: {there} of {math.prod(entry.size)} elements"
        self._close()
        (self._folder / ".metadata").write_bytes(pickle.dumps(_metadata(self._tensors)))
        torch.save(common, self._folder / "common.pt")
        (self._folder / WHOLE).write_text(json.dumps(FORMAT))
        written = {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()}
        small = written - self._files.keys()
        for name in small:
            sync_file(self._folder / name)
        manifest.write(self._folder, {**self._files, **manifest.described(self._folder, *small)})
        sync_folder(self._folder)


def _metadata(tensors: dict[str, _Whole]) -> Any:
    """As torch.distributed.checkpoint describes them."""
    from torch.distributed.checkpoint import filesystem, metadata

    described: dict[str, Any] = {}
    places = {}
    for key, entry in tensors.items():
        chunks = []
        for number, (corner, shape, name, start, length) in enumerate(entry.parts):
            chunks.append(metadata.ChunkStorageMetadata(torch.Size(corner), torch.Size(shape)))
            places[metadata.MetadataIndex(key, corner, number)] = filesystem._StorageInfo(name, start, length)
        properties = metadata.TensorProperties(dtype=entry.dtype)
        described[key] = metadata.TensorStorageMetadata(properties, torch.Size(entry.size), chunks)
    return metadata.Metadata(described, None, places)
