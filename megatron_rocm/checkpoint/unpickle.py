"""Reads the pickle inside a checkpoint, `.metadata`, by an allow-list: a checkpoint from elsewhere is data, not code.

`common.pt` and the tensors need nothing of ours: torch.load(weights_only=True) has an allow-list of its own.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_rocm.errors import UsageError

DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
)  # fmt: skip

# By the names in the pickle, which are the module's where torch wrote them and not always a class's own.
ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up by name, no more
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # Python 3.13
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (metadata, (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )),
            (planner, ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
            (filesystem, ("_StorageInfo", "_StoragePrefix")),
        )
        for name in names
        if hasattr(module, name)
    },
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which metadata never needs") from None


def read_metadata(folder: str | Path) -> metadata.Metadata:
    """The `.metadata` of a torch_dist checkpoint folder.

    Raises UsageError where there is none, where it is damaged, or where it names anything but torch's own checkpoint
    classes; nothing it names is called then.
    """
    path = Path(folder) / ".metadata"
    try:
        with path.open("rb") as file:
            read = _Unpickler(file).load()
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror}); a torch_dist checkpoint folder has it") from error
    except Exception as error:  # a damaged pickle raises anything
        raise UsageError(f"{path}: not the metadata of a checkpoint, or damaged: {error}") from error
    if not isinstance(read, metadata.Metadata):
        raise UsageError(f"{path}: not the metadata of a checkpoint: it holds a {type(read).__name__}")
    return read
