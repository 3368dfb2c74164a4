"""Reads single tensors out of a torch_dist checkpoint folder, without a model and without a process group."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_rocm.checkpoint import manifest
from megatron_rocm.checkpoint.convert import archive
from megatron_rocm.checkpoint.convert.mapped import Mapped
from megatron_rocm.checkpoint.convert.table import Row, Weight
from megatron_rocm.checkpoint.unpickle import read_metadata
from megatron_rocm.errors import UsageError

# Keys to read one after the other, each with its place in the stack where layers are stacked.
Keys = list[tuple[str, "int | None"]]


class TorchDist:
    """The weights in one `iter_…` folder. A tensor is put together from its parts only when it is read.

    Layers lie stacked in one tensor [layers, …], or, where megatron-core was asked for that, in one tensor a layer
    with gate (`_w`) and up (`_v`) apart.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._metadata = read_metadata(self.folder)
        entries = self._metadata.state_dict_metadata.items()
        self._listed = manifest.read(self.folder) or {}
        self._files: dict[str, Mapped] = {}
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._tensors[self._find(weight)[0][0]].properties.dtype

    def read(self, weight: Weight) -> Tensor:
        """The whole tensor. Raises UsageError where it is missing, incomplete or damaged."""
        parts = [self._read(key, index) for key, index in self._find(weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, key: str, index: int | None = None) -> Tensor:
        """The tensor of a key, or the `index`th of those that lie stacked in it. Raises UsageError as `read` does."""
        return self._read(key, index)

    def rows(self, key: str) -> int:
        """Of the whole tensor of a key. Raises UsageError where there is none."""
        if key not in self._tensors:
            raise UsageError(f"{self.folder}: holds no {key}: not of a Llama")
        return int(self._tensors[key].size[0])

    def layers(self, key: str) -> int:
        """How many tensors lie stacked in that of a key."""
        return int(self._tensors[key].size[0])

    def _find(self, weight: Weight) -> Keys:
        for pattern in self._patterns(weight.row):
            alone = pattern.format(weight.layer)
            choices: list[Keys] = [[(alone, None)], [(alone + "_w", None), (alone + "_v", None)]]
            if weight.layer is not None:
                choices.append([(pattern.replace("{}.", ""), weight.layer)])
            for keys in choices:
                if all(key in self._tensors for key, _ in keys):
                    return keys
        raise UsageError(f"{self.folder}: holds no {weight.megatron}: not of the model it is said to be of")

    @staticmethod
    def _patterns(row: Row) -> list[str]:
        return [row.megatron] + ([row.local] if row.local else [])

    def _read(self, key: str, index: int | None) -> Tensor:
        entry = self._tensors[key]
        if index is not None and index >= entry.size[0]:
            raise UsageError(f"{self.folder}: {key} has {entry.size[0]} layers, the model more")
        shape = tuple(entry.size if index is None else entry.size[1:])
        parts = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if index is not None and not offsets[0] <= index < offsets[0] + sizes[0]:
                continue
            part = self._load(MetadataIndex(key, chunk.offsets)).reshape(sizes)
            if index is not None:
                part, offsets, sizes = part[index - offsets[0]], offsets[1:], sizes[1:]
            if part.dtype != entry.properties.dtype:
                raise UsageError(f"{self.folder}: {key} is {part.dtype}, and .metadata says {entry.properties.dtype}")
            parts.append((offsets, part))
        filled, expected = sum(part.numel() for _, part in parts), math.prod(shape)
        if filled != expected:
            raise UsageError(f"{self.folder}: {key} is incomplete ({filled} of {expected} elements)")
        if len(parts) == 1:
            return parts[0][1]  # as it lies in the file
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        for offsets, part in parts:
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))] = part
        return whole

    def ahead(self, weight: Weight) -> None:
        """Begin to read it."""
        for key, index in self._find(weight):
            for chunk in self._tensors[key].chunks:
                if index is None or chunk.offsets[0] <= index < chunk.offsets[0] + chunk.sizes[0]:
                    place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                    self._file(place).ahead(place.offset, place.length)

    def _load(self, index: MetadataIndex) -> Tensor:
        place = self._metadata.storage_data[index]
        if getattr(place, "transform_descriptors", None):
            raise UsageError(f"{self.folder}: {index.fqn} is stored compressed, which is not in this version")
        file = self._file(place)
        try:
            found = archive.read(file, place.offset, place.length)
        except UsageError as error:
            raise UsageError(
                f"{file.path}: damaged where {index.fqn} lies; choose another --iteration. {error}"
            ) from error
        if not isinstance(found, Tensor):
            raise UsageError(f"{self.folder}: {index.fqn} is not a tensor but a {type(found).__name__}")
        return found

    def _file(self, place: Any) -> Mapped:
        name = place.relative_path
        if name not in self._files:
            if Path(name).name != name:
                raise UsageError(f"{self.folder}: .metadata names a file outside it, {name}")
            try:
                file = Mapped(self.folder / name)
            except UsageError as error:
                raise UsageError(f"{error}; or choose another --iteration") from error
            listed = self._listed.get(name)
            if listed and listed.size != file.size:
                raise UsageError(
                    f"{file.path}: has {file.size:,} bytes instead of {listed.size:,}: damaged; choose another "
                    "--iteration"
                )
            self._files[name] = file
        return self._files[name]

    def files(self, weights: Iterable[Weight]) -> set[str]:
        """The names of the files that hold these weights."""
        keys = {key for weight in weights for key, _ in self._find(weight)}
        places = self._metadata.storage_data.items()
        return {place.relative_path for index, place in places if index.fqn in keys}
