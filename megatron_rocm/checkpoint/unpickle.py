"""Reads the pickles inside a checkpoint by allow-lists: a checkpoint from elsewhere is data, not code.

`.metadata` is a bare pickle. What torch.save has written (`common.pt`, objects such as the random generators' state)
goes through torch's own restricted unpickler, whose list knows tensors and plain values; ours adds to it.
"""

from __future__ import annotations

import io
import pickle
import signal
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import IO, Any

import numpy
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

_reconstruct = numpy.zeros(0).__reduce__()[0]  # whatever this numpy calls its module

# Beyond torch's own, by the names in the pickle: Megatron-LM's arguments, and the state of numpy's random generator.
OBJECTS: tuple[tuple[Any, str], ...] = (
    (Namespace, "argparse.Namespace"),
    (SimpleNamespace, "types.SimpleNamespace"),
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
    (io.BytesIO, "_io.BytesIO"),  # extra state of Transformer Engine's layers
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (numpy.ndarray, "numpy.ndarray"),
    (numpy.dtype, "numpy.dtype"),
    (type(numpy.dtype("uint32")), "numpy.dtypes.UInt32DType"),
    (signal.Signals, "signal.Signals"),
    *((number, f"signal.{number.name}") for number in signal.Signals),  # as Python before 3.11 writes them
)
# Of these packages Megatron-LM's arguments hold enumerations and the like, which nothing here asks for.
NOT_ASKED_FOR = ("megatron.", "transformer_engine.")


class Inert:
    """Stands for an object of a class that is not imported: it keeps what the pickle says of it."""

    def __init__(self, *said: Any) -> None:
        self.said: Any = said

    def __setstate__(self, state: Any) -> None:
        self.said = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.said!r}"


def read_saved(file: str | Path | IO[bytes], name: str | Path | None = None) -> Any:
    """What torch.save has written into `file`; tensors come to host memory.

    Objects of megatron's and Transformer Engine's classes are Inert, unless these are imported. Raises OSError, and
    UsageError, which calls the file `name`, where it is damaged or names anything but tensors and plain values; nothing
    it names is called then.
    """
    path = name or file
    opened = io.BytesIO(Path(file).read_bytes()) if isinstance(file, str | Path) else file
    try:
        with torch.serialization.safe_globals(list(OBJECTS)):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            refused = sorted(name for name in names if not name.startswith(NOT_ASKED_FOR))
            if refused:
                raise UsageError(f"{path}: it names {', '.join(refused[:3])}, which a checkpoint never needs")
            inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
            with torch.serialization.safe_globals(inert):
                opened.seek(0)
                return torch.load(opened, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged archive raises anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: not what torch.save writes, or damaged ({type(error).__name__}: {reason})"
        ) from error


def read_common(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint folder holds beside tensors, `common.pt`. Raises UsageError as `read_saved` does."""
    path = Path(folder) / "common.pt"
    try:
        common = read_saved(path)
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror}); a torch_dist checkpoint folder has it") from error
    if not isinstance(common, dict):
        raise UsageError(f"{path}: not the common state of a checkpoint: it holds a {type(common).__name__}")
    return common


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
