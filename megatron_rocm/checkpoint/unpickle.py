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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import EnumMeta
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


def _member(*said: Any) -> Any:
    """What Python 3.11.0 to 3.11.3 write for a member of an enumeration: builtins.getattr, here of nothing else."""
    match said:
        case (EnumMeta() as of, str(name)) if name in of.__members__:
            return of[name]
        case (type() as of, str(name)) if issubclass(of, Inert):
            return of(name)
    raise pickle.UnpicklingError("it names builtins.getattr of something else than an enumeration")


# By the names in the pickle, which are the module's where torch wrote them and not always a class's own.
ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up by name, no more
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "getattr"): _member,
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


def _dtype(name: str, *how: bool) -> numpy.dtype[Any]:
    """numpy.dtype of the one type that is asked for: an array of objects can be made of pointers."""
    if name not in ("u4", "uint32"):
        raise ValueError(f"it has an array of {name!r}, and the random generator's state is of u4")
    return numpy.dtype(numpy.uint32)


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
    (_dtype, "numpy.dtype"),
    (type(numpy.dtype("uint32")), "numpy.dtypes.UInt32DType"),
    (_member, "builtins.getattr"),
    (signal.Signals, "signal.Signals"),
    *((number, f"signal.{number.name}") for number in signal.Signals),  # as Python before 3.11 writes them
)
# What `common.pt` holds, where it does.
COMMON = {
    "iteration": int, "consumed_train_samples": int, "run": dict, "content_metadata": dict, "opt_param_scheduler": dict,
}  # fmt: skip
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


@contextmanager
def _knowing(objects: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """Have torch's restricted unpickler know these beyond its own, and not what imported libraries have added."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(objects))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_saved(file: str | Path | IO[bytes], name: str | Path | None = None) -> Any:
    """What torch.save has written into `file`; tensors come to host memory.

    Objects of megatron's and Transformer Engine's classes are Inert. Raises OSError, and UsageError, which calls the
    file `name`, where it is damaged or names anything but tensors and plain values; nothing it names is called then.
    """
    path = name or file
    opened = io.BytesIO(Path(file).read_bytes()) if isinstance(file, str | Path) else file
    try:
        with _knowing(OBJECTS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            refused = sorted(name for name in names if not name.startswith(NOT_ASKED_FOR))
            if refused:
                raise UsageError(f"{path}: it names {', '.join(refused[:3])}, which a checkpoint never needs")
        inert = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with _knowing([*OBJECTS, *inert]):
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged archive raises anything
        # Torch begins with advice to read the file without the restriction.
        said = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        reason = " ".join(said.split())[:200]
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
    for name, kind in COMMON.items():
        if name in common and not isinstance(common[name], kind):
            raise UsageError(f"{path}: damaged: its {name} is {type(common[name]).__name__} instead of {kind.__name__}")
    if "iteration" not in common or not all(isinstance(section, dict) for section in common.get("run", {}).values()):
        raise UsageError(
            f"{path}: not the common state of a checkpoint, or damaged: it tells no iteration, or no settings"
        )
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
    try:
        wrong = next(filter(None, _wrong(read)), "")
    except (AttributeError, TypeError, ValueError) as error:
        wrong = str(error)
    if wrong:
        raise UsageError(f"{path}: not the metadata of a checkpoint, or damaged: {wrong}")
    return read


def _wrong(read: metadata.Metadata) -> Iterator[str]:
    """What is wrong with each place and each tensor that it names, or "". Raises AttributeError and the like too."""
    for place in read.storage_data.values():
        name, sizes = place.relative_path, (place.offset, place.length)
        if not isinstance(name, str) or Path(name).name != name:
            yield f"it names a file outside its folder, {name!r}"
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            yield f"a part of {name} begins at {sizes[0]} and has {sizes[1]} bytes"
    for key, entry in read.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.size, tuple):
                yield f"{key} has no shape or type"
            for chunk in entry.chunks:
                if metadata.MetadataIndex(key, chunk.offsets) not in read.storage_data:
                    yield f"it does not say where a part of {key} lies"
