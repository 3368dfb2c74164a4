"""One rank's part of a torch_dist checkpoint: what it is, its copy in host memory, its file, and all parts' metadata.

The format is torch.distributed.checkpoint's, as its FileSystemWriter writes and its FileSystemReader reads it, and keys
are megatron-core's. Written anew because neither can be told to hash what it writes, nor to do its collective calls
once: the parts of a run are the same at each of its saves.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_rocm.checkpoint.manifest import File, HashingFile, described

COMMON, INDEX, WHOLE = "common.pt", ".metadata", "metadata.json"
SLAB = 1 << 28  # bytes of pinned memory taken at a time; torch rounds what it pins up to a power of two
ALIGNED = 64


@dataclass(frozen=True)
class Chunk:
    """A box of a whole tensor; sizes in elements."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype


class Part(NamedTuple):
    """What this rank writes."""

    chunks: list[Chunk]
    tensors: list[Tensor]  # of the chunks, with as many elements each
    objects: dict[str, bytes]

    @property
    def contents(self) -> Contents:
        return tuple(self.chunks), tuple(self.objects)


Contents = tuple[tuple[Chunk, ...], tuple[str, ...]]  # the chunks and the objects' keys, in the file's order


class Written(NamedTuple):
    """A part's file, and where in it each of its contents lies."""

    file: File
    places: list[tuple[int, int]]  # (first byte, bytes)


def file_name(rank: int) -> str:
    """Of the rank's part."""
    return f"__{rank}_0.distcp"


def part_of(sharded: dict[str, Any]) -> Part:
    """What of megatron-core's sharded state dict this rank is the one to write."""
    part = Part([], [], {})
    for one in nested_values(sharded):
        if not is_main_replica(one.replica_id):
            continue
        if isinstance(one, ShardedObject):
            part.objects[one.unique_key] = serialized([one.data])
        elif one.data.numel():
            assert one.flattened_range is None, one.key
            shape = (1,) * one.prepend_axis_num + tuple(one.local_shape)
            part.chunks.append(Chunk(one.key, tuple(one.global_offset), shape, tuple(one.global_shape), one.dtype))
            part.tensors.append(one.data.detach())
    return part


def serialized(content: Any) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


class HostCopy:
    """Host memory for copies of a run's tensors: as much as they need, taken at the first copy and reused after."""

    def __init__(self) -> None:
        self._room: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tensors, which are the next call's to overwrite."""
        if not self._room:
            self._room = _room(tensors)
        for room, tensor in zip(self._room, tensors, strict=True):
            room.view(tensor.shape).copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return self._room


def _room(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A flat tensor for each, with a storage of its own within slabs: torch.save writes whole storages."""
    sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED for tensor in tensors]
    on_device = any(tensor.is_cuda for tensor in tensors)
    slabs: list[tuple[Any, int]] = []  # (memory, bytes in use)
    found: dict[int, Tensor] = {}
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size, tensor = sizes[number], tensors[number]
        fits = next((at for at, (memory, used) in enumerate(slabs) if used + size <= len(memory)), len(slabs))
        if fits == len(slabs):
            slabs.append((_memory(max(SLAB, 1 << (size - 1).bit_length()), pinned=on_device), 0))
        memory, used = slabs[fits]
        slabs[fits] = memory, used + size
        count = tensor.numel() * tensor.element_size()
        found[number] = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=used).view(tensor.dtype)
    return [found[number] for number in range(len(tensors))]


def _memory(size: int, *, pinned: bool) -> Any:
    """So many bytes; pinned, a device copies into them fast, else they take no memory before they are written."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
        except RuntimeError:  # the system pins no more: slower
            pass
    return torch.empty(size, dtype=torch.uint8, device="cpu").numpy()


def on_host(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """A copy of each, one at a time."""
    return (tensor.contiguous().cpu().clone() for tensor in tensors)


def write(path: Path, part: Part, tensors: Iterable[Tensor]) -> Written:
    """Write the part's file, hashed, to disk; `tensors` are on the host and each has a storage of its own."""
    places: list[tuple[int, int]] = []
    with HashingFile(path) as file:
        try:
            for chunk, tensor in zip(part.chunks, tensors, strict=True):
                begin = file.tell()
                torch.save(tensor.view(chunk.shape), file)  # type: ignore[arg-type]  # it needs no more than write
                places.append((begin, file.tell() - begin))
            for content in part.objects.values():
                places.append((file.tell(), len(content)))
                file.write(content)
        except Exception as error:  # torch's own writer tells of a failing disk in its own words
            raise file.fault or error from error
    return Written(file.done, places)


def write_common(
    folder: Path, common: bytes, contents: Sequence[Contents], written: Sequence[Written]
) -> dict[str, File]:
    """Write what there is one of for all ranks, given each rank's contents and what it has written, in their order.

    Not on disk yet. Raises ValueError where the parts are not the whole.
    """
    (folder / COMMON).write_bytes(common)
    (folder / INDEX).write_bytes(pickle.dumps(index(contents, [one.places for one in written])))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return described(folder, COMMON, INDEX, WHOLE)


def index(contents: Sequence[Contents], places: Sequence[Sequence[tuple[int, int]]]) -> dcp.Metadata:
    """torch's metadata of a checkpoint. Raises ValueError where the parts are not the whole."""
    entries: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for rank, ((chunks, objects), where) in enumerate(zip(contents, places, strict=True)):
        for chunk, (begin, length) in zip(chunks, where, strict=False):
            entry = entries.setdefault(chunk.key, _entry(chunk))
            offset = torch.Size(chunk.offset)
            place = dcp.MetadataIndex(chunk.key, offset, len(entry.chunks))
            if place in storage:
                raise ValueError(f"two ranks have written {chunk.key} at {chunk.offset}")
            entry.chunks.append(dcp.ChunkStorageMetadata(offset, torch.Size(chunk.shape)))
            storage[place] = _StorageInfo(file_name(rank), begin, length)
        for name, (begin, length) in zip(objects, where[len(chunks) :], strict=True):
            entries[name] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(name)] = _StorageInfo(file_name(rank), begin, length)
    for key, entry in entries.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            found = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if found != math.prod(entry.size):
                raise ValueError(f"{found} of {math.prod(entry.size)} elements of {key} are written")
    return dcp.Metadata(state_dict_metadata=entries, storage_data=storage)


def _entry(chunk: Chunk) -> dcp.TensorStorageMetadata:
    return dcp.TensorStorageMetadata(dcp.TensorProperties(chunk.dtype), torch.Size(chunk.whole), [])
