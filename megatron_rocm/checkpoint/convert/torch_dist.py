"""Reads single tensors out of a torch_dist checkpoint folder, without a model and without a process group."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

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
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._tensors[self._find(weight)[0][0]].properties.dtype

    def read(self, weight: Weight) -> Tensor:
        """The whole tensor. Raises UsageError where it is missing, incomplete or damaged."""
        parts = [self._read(key, index) for key, index in self._find(weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
        whole = torch.empty(entry.size if index is None else entry.size[1:], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if index is not None and not offsets[0] <= index < offsets[0] + sizes[0]:
                continue
            part = self._load(MetadataIndex(key, chunk.offsets)).reshape(sizes)
            if index is not None:
                part, offsets, sizes = part[index - offsets[0]], offsets[1:], sizes[1:]
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] = part
            filled += part.numel()
        if filled != whole.numel():
            raise UsageError(f"{self.folder}: {key} is incomplete ({filled} of {whole.numel()} elements)")
        return whole

    def _load(self, index: MetadataIndex) -> Tensor:
        place = self._metadata.storage_data[index]
        if getattr(place, "transform_descriptors", None):
            raise UsageError(f"{self.folder}: {index.fqn} is stored compressed, which is not in this version")
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive raises anything
            raise UsageError(
                f"{path}: damaged or missing where {index.fqn} lies ({error}); choose another --iteration"
            ) from error
